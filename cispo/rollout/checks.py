"""Whether a request can be served at all, asked before anything is queued."""

from collections.abc import Sequence

from cispo.model.cache import PAGE_LENGTH, DecodeCache
from cispo.model.decoder import Decoder
from cispo.model.routing import RoutingLog
from cispo.model.tokenizer import Tokenizer
from cispo.rollout import ends
from cispo.rollout.request import GroupRequest, RequestError, refuse_strange
from cispo.rollout.sequence import GroupState, ParkedGroup


class Checks:
    """What an engine's sizes and policy allow. records_experts, routing_log: as the engine has them."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        cache: DecodeCache,
        *,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        records_experts: bool,
        routing_log: RoutingLog | None,
    ) -> None:
        self._decoder, self._tokenizer, self._cache = decoder, tokenizer, cache
        self._max_prompt_tokens, self._max_completion_tokens = max_prompt_tokens, max_completion_tokens
        self._records_experts = records_experts
        self._log_sequences = None if routing_log is None else routing_log.tokens_BLE.shape[0]

    def group(self, request: GroupRequest, order: int) -> GroupState:
        """The request as a group under way. RequestError for what can never be served."""
        prompt_ids = self._prompt_ids(request)
        name, limit = f"prompt {request.prompt.id}", self._max_completion_tokens
        if len(prompt_ids) > self._max_prompt_tokens:
            raise RequestError(
                f"{name} has {len(prompt_ids)} tokens, more than max_prompt_tokens "
                f"{self._max_prompt_tokens}; raise it or shorten the prompt"
            )
        if not 1 <= request.group_size <= self._cache.capacity:
            raise RequestError(
                f"group_size {request.group_size} does not fit max_concurrent_completions {self._cache.capacity}; "
                "raise the latter"
            )
        request.drawing.check(self._decoder.trained_ids)
        request.stops.check(limit, self._decoder.trained_ids)
        if not 0 <= request.expert_threshold < 1:
            raise RequestError(f"expert_threshold is {request.expert_threshold:g}; it must be in [0, 1), and 0 is off")
        if request.expert_threshold and self._records_experts:
            raise RequestError("no experts can be recorded where an expert_threshold drops some; leave one out")
        if self._log_sequences is not None and not 0 <= request.log_sequence < self._log_sequences:
            raise RequestError(
                f"log_sequence is {request.log_sequence}, and the engine's routing log has {self._log_sequences} "
                "sequences; number them from 0, or make a larger log"
            )
        longest = len(prompt_ids) + (request.stops.max_new_tokens or limit)
        forks = request.group_size - 1 if len(prompt_ids) % PAGE_LENGTH else 0
        pages = max(-(-longest // PAGE_LENGTH), -(-len(prompt_ids) // PAGE_LENGTH) + forks)
        if pages > self._cache.pages:
            raise RequestError(
                f"{name} may take {pages} pages of {PAGE_LENGTH} tokens, and the cache has {self._cache.pages}; raise "
                "cache_pages, or ask for fewer tokens or completions"
            )
        return ends.with_interruption(
            GroupState(request, prompt_ids, order), self._tokenizer, request.stops.max_new_tokens or limit
        )

    def parked(self, parked: ParkedGroup, order: int) -> GroupState:
        """A group to go on with, likewise. RequestError also where its completions are too long already."""
        group = self.group(parked.request, order)
        limit = parked.request.stops.max_new_tokens or self._max_completion_tokens
        for index, one in parked.completions.items():
            if len(one.tokens) + (one.ended_by is None) > limit:
                raise RequestError(
                    f"completion {index} of prompt {parked.request.prompt.id} has {len(one.tokens)} tokens already, "
                    f"which leaves no room in {limit}; resume it in an engine with more max_completion_tokens"
                )
        group.rollouts = dict(parked.rollouts)
        return group

    def _prompt_ids(self, request: GroupRequest) -> list[int]:
        if request.prompt_ids is None:
            if not request.prompt.text.strip():
                raise RequestError(f"prompt {request.prompt.id} is empty; give it some text")
            return self._tokenizer.render_prompt(request.prompt.text, request.prompt.earlier)
        ids = [int(token) for token in request.prompt_ids]
        if not ids:
            raise RequestError(f"prompt {request.prompt.id} has no tokens; give at least one")
        self.given_ids(f"prompt {request.prompt.id}", ids)
        return ids

    def given_ids(self, name: str, ids: Sequence[int]) -> None:
        """RequestError for an id among these that the policy cannot read."""
        refuse_strange(name, ids, self._decoder.config.vocabulary_size)
