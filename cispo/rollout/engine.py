"""Continuous batching of groups: submit prompts, step, collect finished groups.

A step is schedule -> run -> postprocess. Groups are admitted whole: the prompt is read once, in pieces beside the
decode steps of others, and forked to the group's completions. On a GPU the next step is launched before the tokens of
the last one are looked at, so what a stop wastes is at most one token of its sequence.

B sequences of a step.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH
from cispo.model.cache import Slots
from cispo.model.decoder import Decoder
from cispo.model.routing import ExpertRecord, RoutingLog
from cispo.model.tokenizer import Tokenizer
from cispo.rollout import ends
from cispo.rollout.checks import Checks
from cispo.rollout.decode_step import Ids, Logprobs
from cispo.rollout.groups import Groups
from cispo.rollout.request import GroupRequest, RequestError
from cispo.rollout.room import Room
from cispo.rollout.runner import Runner, UnderWay
from cispo.rollout.sampling import noise_key
from cispo.rollout.sequence import OpenTurn, ParkedGroup, RequestFailure, Stage
from cispo.rollout.sequence import Sequence as Completion
from cispo.rollout.slots import SlotArrays
from cispo.types import Group, Rollout, StopReason

Caches = Literal["keep", "recompute"]
"""What completions under way do about states that older weights left: go on from them, or read all tokens again."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """What all requests share: the most tokens after a prompt, and the seed of the sampling noise."""

    max_completion_tokens: int
    seed: int


class Engine:
    """Samples groups of completions from one decoder. Not safe to use from two threads at once.

    max_concurrent_completions bounds the sequences in slots, max_prompt_tokens the length of a prompt, cache_pages the
    pages of 64 tokens of keys and values (None: enough for all at their longest); they fix the cache's memory.
    max_prefill_tokens: tokens read in one step, beside those that decode. records_experts: keep in the rollouts which
    experts every token went to, for the learner to take again. routing_log: filled with what the routers decide.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        settings: SamplingSettings,
        *,
        max_concurrent_completions: int,
        max_prompt_tokens: int,
        cache_pages: int | None = None,
        max_prefill_tokens: int = 16_384,
        records_experts: bool = False,
        routing_log: RoutingLog | None = None,
    ) -> None:
        self.decoder, self.tokenizer, self.settings = decoder, tokenizer, settings
        self.policy_version = 0
        self.completion_tokens = self.steps = self.interruptions = 0
        limit = settings.max_completion_tokens
        self._refuse_sizes(max_concurrent_completions, max_prompt_tokens, limit, max_prefill_tokens)
        self._cache = decoder.new_cache(
            capacity=max_concurrent_completions, max_tokens=max_prompt_tokens + limit, pages=cache_pages
        )
        record = ExpertRecord(decoder.config) if records_experts else None
        experts = record.room(max_concurrent_completions, limit).numpy() if record else None
        self._arrays = SlotArrays(max_concurrent_completions, limit, experts)
        self._room = Room(self._cache, self._arrays)
        self._groups = Groups(tokenizer, self._arrays, self._room)
        self._runner = Runner(
            decoder,
            self._cache,
            self._arrays,
            self._room,
            max_prefill_tokens=max_prefill_tokens,
            record=record,
            routing_log=routing_log,
        )
        self._checks = Checks(
            decoder,
            tokenizer,
            self._cache,
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=limit,
            records_experts=records_experts,
            routing_log=routing_log,
        )
        self._runs_ahead = decoder.head_weight.is_cuda
        self._under_way: deque[tuple[UnderWay, int]] = deque()
        self._submitted = 0

    @staticmethod
    def _refuse_sizes(completions: int, prompt_tokens: int, completion_tokens: int, prefill_tokens: int) -> None:
        """ValueError for sizes with which no request could ever be sampled."""
        sizes = (
            ("max_concurrent_completions", completions, 1),
            ("max_prompt_tokens", prompt_tokens, 1),
            ("max_completion_tokens", completion_tokens, 1),
            ("max_prefill_tokens", prefill_tokens, CHUNK_LENGTH),
        )
        for name, value, least in sizes:
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")

    def submit(self, request: GroupRequest) -> None:
        """Queue a group. RequestError when it can never be sampled; nothing else is touched then."""
        group = self._checks.group(request, self._submitted)
        self._submitted += 1
        self._groups.add(group)
        self._room.queue(group)

    def resume(self, parked: ParkedGroup) -> None:
        """Queue a group that was taken out of an engine; its unfinished completions go on from their last token.

        Turns that were open are open again, and in `collect_turns`. RequestError as for `submit`.
        """
        if not parked.has_begun:
            self.submit(parked.request)
            return
        group = self._checks.parked(parked, self._submitted)
        self._submitted += 1
        self._groups.add(group)
        self._groups.put_back(group, parked)

    @property
    def is_idle(self) -> bool:
        """Whether no group is queued or under way; one with an open turn is."""
        return not self._groups and not self._under_way

    @property
    def prompt_tokens(self) -> int:
        """Tokens that were read, of prompts and of what was put in, again where that was needed."""
        return self._runner.prompt_tokens

    @property
    def active_completions(self) -> int:
        return len(self._room.in_slot)

    @property
    def waiting_groups(self) -> int:
        return self._room.waiting_groups

    @property
    def open_turns(self) -> int:
        return self._groups.open_turns

    @property
    def stop_reasons(self) -> Counter[StopReason]:
        """How many completions have ended, by reason."""
        return self._groups.stop_reasons

    @property
    def times_set_aside(self) -> int:
        """How often a sequence has given its slot up for want of room."""
        return self._room.times_set_aside

    @property
    def cache_share(self) -> float:
        """Pages in use, of all."""
        return self._cache.pages_in_use / max(self._cache.pages, 1)

    @torch.inference_mode()
    def step(self) -> None:
        """Read a piece of the prompts that were admitted, and sample one token of every completion that decodes."""
        for completion in self._room.admit():
            self._set_rules(completion)
        self.steps += 1
        launched = [one for one in (self._runner.decode(self._settle), self._runner.read()) if one is not None]
        self._under_way.extend((one, self.policy_version) for one in launched)
        # On a GPU the tokens of this step are looked at after the next one is launched.
        kept = len(launched) if self._runs_ahead else 0
        while len(self._under_way) > kept:
            self._take_in(*self._under_way.popleft())

    def collect(self) -> list[Group]:
        """Groups that have ended since the last call, each with its rollouts in order of completion index."""
        finished, self._groups.finished = self._groups.finished, []
        return finished

    def collect_failures(self) -> list[RequestFailure]:
        """Groups that failed since the last call."""
        failures, self._groups.failures = self._groups.failures, []
        return failures

    def collect_turns(self) -> list[OpenTurn]:
        """Turns of open requests that have ended since the last call and wait to be extended or closed."""
        turns, self._groups.turns = self._groups.turns, []
        return turns

    def tokens_so_far(self) -> Iterator[tuple[GroupRequest, int, npt.NDArray[np.int32]]]:
        """Request, index and tokens after the prompt of each completion that has a slot; read them before `step`."""
        for slot, completion in self._room.in_slot.items():
            yield completion.group.request, completion.index, self._arrays.ids_ST[slot, : self._arrays.count_S[slot]]

    def rollouts_so_far(self) -> Iterator[tuple[GroupRequest, Rollout]]:
        """Completions that have ended, of groups that have not."""
        for group in self._groups.in_order():
            yield from ((group.request, rollout) for rollout in group.rollouts.values())

    def extend(self, turn: OpenTurn, token_ids: Sequence[int]) -> bool:
        """Go on with a turn after these tokens, which are not the policy's and carry no loss.

        False where they leave no room for a token of the policy's: then the completion has ended, by length, without
        them. RequestError for ids that are none, or a turn that is not open.
        """
        ids = [int(token) for token in token_ids]
        if not ids:
            raise RequestError("a turn can only be extended by tokens; close it to end the completion")
        self._checks.given_ids("the extension of a turn", ids)
        completion = self._groups.take_opened(turn)
        if not self._put_in(completion, ids):
            self._groups.end(completion, StopReason.LENGTH)
            return False
        completion.ended_by = None
        return True

    def close_turn(self, turn: OpenTurn) -> None:
        """End a completion with the turn that ended; its stop reason is what ended that."""
        completion = self._groups.take_opened(turn)
        assert completion.ended_by is not None
        self._groups.end(completion, completion.ended_by)

    @torch.inference_mode()
    def park(self) -> list[ParkedGroup]:
        """Take all unfinished groups out, in order of rank; `resume` goes on with them, here or elsewhere.

        What ends with the tokens that are under way is in `collect` and `collect_failures` after it.
        """
        self._settle()
        return [self._groups.park(group) for group in self._groups.in_order()]

    @torch.inference_mode()
    def update_weights(
        self, version: int, tensors: Mapping[str, Tensor], *, caches: Caches = "keep"
    ) -> None:
        """Take new weights between two steps, in place; completions under way go on."""
        parameters = dict(self.decoder.named_parameters())
        if set(parameters) != set(tensors):
            raise ValueError(f"weights of version {version} name other parameters: {set(parameters) ^ set(tensors)}")
        strange = [name for name, parameter in parameters.items() if parameter.shape != tensors[name].shape]
        if strange:
            raise ValueError(f"weights of version {version} have other shapes: {', '.join(strange)}; none was taken")
        with torch.no_grad(), self.changing_weights(caches=caches):
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        self.policy_version = version

    @contextmanager
    def changing_weights(self, *, caches: Caches) -> Iterator[None]:
        """For who writes new weights over the decoder's own, between two steps, and their version into policy_version.

        `update_weights` does where they are whole. All must be written, or the engine holds no policy any more.
        """
        if caches == "recompute":
            with torch.inference_mode():
                self._settle()
                self._forget_states()
        yield
        torch.autograd.graph.increment_version(list(self.decoder.parameters()))

    def _forget_states(self) -> None:
        shared = {reading.slot for reading in self._room.readings if len(reading.sequences) > 1}
        waiting_for = {one.slot for reading in self._room.readings for one in reading.sequences[1:]}
        for slot, completion in list(self._room.in_slot.items()):
            if slot in shared:
                self._cache.release(slot)
            elif slot not in waiting_for:
                self._room.set_aside(completion, keeps_states=False)
        for group in self._groups.in_order():
            # Rollouts that have ended keep the experts that they were sampled with.
            group.prompt_expert_ids_TLK = None
            for completion in group.sequences:
                completion.states, completion.read = None, 0

    def _limit(self, completion: Completion) -> int:
        return completion.group.request.stops.max_new_tokens or self.settings.max_completion_tokens

    def _set_rules(self, completion: Completion) -> None:
        """What a slot's arrays say of how its sequence is drawn and ended."""
        arrays, slot, request = self._arrays, completion.slot, completion.group.request
        arrays.limit_S[slot] = self._limit(completion)
        arrays.key_S[slot] = noise_key(self.settings.seed, request.stream, request.prompt.id, completion.index)
        arrays.temperature_S[slot] = request.drawing.temperature
        arrays.has_cut_S[slot] = request.drawing.has_cut
        arrays.threshold_S[slot] = request.expert_threshold
        arrays.log_sequence_S[slot] = request.log_sequence
        ends.set_rules(arrays, completion)

    def _settle(self) -> None:
        """Take in all tokens under way."""
        while self._under_way:
            self._take_in(*self._under_way.popleft())

    def _take_in(self, arrived: UnderWay, version: int) -> None:
        """Record the tokens that are still wanted, and end or interrupt the completions that have come to it."""
        ids_B, logprob_B = arrived.sampled.wait()
        is_wanted = self._arrays.epoch_S[arrived.slots] == arrived.epoch_B
        slots, ids_B, logprob_B = arrived.slots[is_wanted], ids_B[is_wanted], logprob_B[is_wanted]
        self._arrays.append_sampled(slots, ids_B, logprob_B, version)
        self.completion_tokens += len(slots)
        for at in self._remarkable(slots, ids_B, logprob_B):
            completion = self._room.in_slot.get(int(slots[at]))
            if completion is None or completion.stage is not Stage.DECODING:
                continue
            if not np.isfinite(logprob_B[at]):
                message = "the policy's logits are not finite numbers; its weights are damaged"
                self._groups.fail(completion.group, message)
                continue
            reason = ends.reason_to_end(self._arrays, completion, int(ids_B[at]), self.tokenizer.eos_id)
            if reason is None and ends.is_out_of_thinking(self._arrays, completion):
                reason = self._interrupt(completion)
            if reason is None:
                continue
            if completion.group.request.is_open and reason in ends.ENDS_OF_TURN:
                self._groups.open_turn(completion, reason)
            else:
                self._groups.end(completion, reason)

    def _remarkable(self, slots: Slots, ids_B: Ids, logprob_B: Logprobs) -> npt.NDArray[np.int64]:
        """Which of these tokens may end or change anything."""
        arrays = self._arrays
        is_last = (ids_B == self.tokenizer.eos_id) | (arrays.count_S[slots] >= arrays.limit_S[slots])
        is_last |= (arrays.run_S[slots] >= arrays.run_limit_S[slots]) | arrays.is_watched_S[slots]
        return np.flatnonzero(is_last | ~np.isfinite(logprob_B))

    def _interrupt(self, completion: Completion) -> StopReason | None:
        """Put in what ends the thinking of a completion; where that leaves no room for an answer, why it ends."""
        # Before it may lose its slot.
        ends.end_thinking(self._arrays, completion)
        if not self._put_in(completion, completion.group.forced_ids):
            return StopReason.LENGTH
        completion.is_interrupted = True
        self.interruptions += 1
        return None

    def _put_in(self, completion: Completion, ids: list[int]) -> bool:
        """Go on after tokens that the policy did not sample; False where they leave no room for another of its own."""
        if self._groups.count(completion) + len(ids) >= self._limit(completion):
            return False
        ends.read_given(completion, ids)
        if completion.aside is not None:
            completion.aside = completion.aside.with_given(ids)
            completion.stage = Stage.ASIDE
            self._room.queue(completion)
        else:
            self._arrays.append_given(completion.slot, ids)
            self._room.read_on(completion)
        return True
