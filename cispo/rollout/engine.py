"""Continuous batching of groups: submit prompts, step, collect finished groups.

A step is schedule -> run -> postprocess. Groups are admitted whole: the prompt is read once, in pieces beside the
decode steps of others, and forked to the group's completions. On a GPU the next step is launched before the tokens of
the last one are looked at, so what a stop wastes is at most one token of its sequence.

B sequences of a step.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.model.cache import Slots
from cispo.model.decoder import Decoder
from cispo.model.routing import ExpertRecord, RoutingLog
from cispo.model.tokenizer import Tokenizer
from cispo.rollout import ends
from cispo.rollout.checks import Checks
from cispo.rollout.decode_step import Ids, Logprobs
from cispo.rollout.request import GroupRequest, RequestError
from cispo.rollout.room import Room
from cispo.rollout.runner import Runner, UnderWay
from cispo.rollout.sampling import noise_key
from cispo.rollout.sequence import GroupState, OpenTurn, ParkedGroup, RequestFailure, Stage
from cispo.rollout.sequence import Sequence as Completion
from cispo.rollout.slots import SlotArrays, Tokens
from cispo.types import Group, Rollout, StopReason


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
        self.stop_reasons: Counter[StopReason] = Counter()
        limit = settings.max_completion_tokens
        self._cache = decoder.new_cache(
            capacity=max_concurrent_completions, max_tokens=max_prompt_tokens + limit, pages=cache_pages
        )
        record = ExpertRecord(decoder.config) if records_experts else None
        experts = record.room(max_concurrent_completions, limit).numpy() if record else None
        self._arrays = SlotArrays(max_concurrent_completions, limit, experts)
        self._room = Room(self._cache, self._arrays)
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
        )
        self._runs_ahead = decoder.head_weight.is_cuda
        self._under_way: deque[tuple[UnderWay, int]] = deque()
        self._groups: dict[int, GroupState] = {}
        self._open: dict[int, Completion] = {}
        self._turns: list[OpenTurn] = []
        self._finished: list[Group] = []
        self._failures: list[RequestFailure] = []
        self._submitted = self._numbered = 0

    def submit(self, request: GroupRequest) -> None:
        """Queue a group. RequestError when it can never be sampled; nothing else is touched then."""
        self._queue(self._new_group(request))

    def resume(self, parked: ParkedGroup) -> None:
        """Queue a group that was taken out of an engine; its unfinished completions go on from their last token."""
        group = self._new_group(parked.request)
        group.rollouts = dict(parked.rollouts)
        if not parked.rollouts and not any(map(len, parked.tokens.values())):
            self._queue(group)
            return
        self._groups[group.order] = group
        missing = sorted(set(range(parked.request.group_size)) - set(parked.rollouts))
        for index in missing:
            completion = self._new_completion(group, index, Stage.ASIDE)
            completion.aside = parked.tokens.get(index, Tokens.none())
            completion.is_thinking = ends.still_thinks(completion, completion.aside, self.tokenizer)
            self._room.aside.append(completion)

    def _new_group(self, request: GroupRequest) -> GroupState:
        group = self._checks.group(request, self._submitted)
        self._submitted += 1
        return group

    def _queue(self, group: GroupState) -> None:
        for index in range(group.request.group_size):
            self._new_completion(group, index, Stage.READING)
        self._groups[group.order] = group
        self._room.queue(group)

    def _new_completion(self, group: GroupState, index: int, stage: Stage) -> Completion:
        self._numbered += 1
        completion = Completion(
            self._numbered, group, index, stage, is_thinking=group.request.stops.thinking is not None
        )
        if ends.reads_text(group):
            completion.text_decoder = self.tokenizer.text_decoder()
        group.sequences.append(completion)
        return completion

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
        return len(self._open)

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
        finished, self._finished = self._finished, []
        return finished

    def collect_failures(self) -> list[RequestFailure]:
        """Groups that failed since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def collect_turns(self) -> list[OpenTurn]:
        """Turns of open requests that have ended since the last call and wait to be extended or closed."""
        turns, self._turns = self._turns, []
        return turns

    def tokens_so_far(self) -> Iterator[tuple[GroupRequest, int, npt.NDArray[np.int32]]]:
        """Request, index and tokens after the prompt of each completion that has a slot; read them before `step`."""
        for slot, completion in self._room.in_slot.items():
            yield completion.group.request, completion.index, self._arrays.ids_ST[slot, : self._arrays.count_S[slot]]

    def rollouts_so_far(self) -> Iterator[tuple[GroupRequest, Rollout]]:
        """Completions that have ended, of groups that have not."""
        for group in self._groups.values():
            yield from ((group.request, rollout) for rollout in group.rollouts.values())

    def extend(self, turn: OpenTurn, token_ids: Sequence[int]) -> bool:
        """Go on with a turn after these tokens, which are not the policy's and carry no loss.

        False where they leave no room for a token of the policy's: then the completion has ended, by length, without
        them. RequestError for ids that are none, or a turn that is not open.
        """
        ids = [int(token) for token in token_ids]
        if not ids:
            raise RequestError("a turn can only be extended by tokens; close it to end the completion")
        self._checks.refuse_strange(ids)
        completion = self._opened(turn)
        del self._open[turn.number]
        given, aside = ids, completion.aside
        count = len(aside) if aside is not None else int(self._arrays.count_S[completion.slot])
        if count + len(given) >= self._limit(completion):
            self._end(completion, StopReason.LENGTH)
            return False
        completion.ended_by = None
        if aside is not None:
            completion.aside = aside.with_given(given)
            ends.read_given(completion, given)
            completion.stage = Stage.ASIDE
            self._room.aside.append(completion)
        else:
            self._put_in(completion, given)
        return True

    def close_turn(self, turn: OpenTurn) -> None:
        """End a completion with the turn that ended; its stop reason is what ended that."""
        completion = self._opened(turn)
        del self._open[turn.number]
        assert completion.ended_by is not None
        self._end(completion, completion.ended_by)

    def _opened(self, turn: OpenTurn) -> Completion:
        if turn.number not in self._open:
            raise RequestError(f"completion {turn.completion_index} of prompt {turn.prompt_id} has no open turn")
        return self._open[turn.number]

    @torch.inference_mode()
    def park(self) -> list[ParkedGroup]:
        """Take all unfinished groups out, in order of rank; `resume` goes on with them, here or elsewhere."""
        self._settle()
        groups = sorted(self._groups.values(), key=lambda group: group.rank)
        self._room.take_waiting()
        parked = []
        for group in groups:
            tokens = {
                one.index: one.aside if one.aside is not None else self._arrays.tokens(one.slot)
                for one in group.sequences
                if one.index not in group.rollouts and (one.aside is not None or one.slot >= 0)
            }
            parked.append(ParkedGroup(group.request, dict(group.rollouts), tokens))
            self._drop(group)
        return parked

    @torch.inference_mode()
    def update_weights(
        self, version: int, tensors: Mapping[str, Tensor], *, caches: Literal["keep", "recompute"] = "keep"
    ) -> None:
        """Take new weights between two steps, in place; completions under way go on.

        caches: `keep` goes on from states that the old weights left, `recompute` reads all tokens again with the new.
        """
        parameters = dict(self.decoder.named_parameters())
        if set(parameters) != set(tensors):
            raise ValueError(f"weights of version {version} name other parameters: {set(parameters) ^ set(tensors)}")
        if caches == "recompute":
            self._settle()
            self._forget_states()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        self.policy_version = version

    def _forget_states(self) -> None:
        shared = {reading.slot for reading in self._room.readings if len(reading.sequences) > 1}
        waiting_for = {one.slot for reading in self._room.readings for one in reading.sequences[1:]}
        for slot, completion in list(self._room.in_slot.items()):
            if slot in shared:
                self._cache.release(slot)
            elif slot not in waiting_for:
                self._room.set_aside(completion, keeps_states=False)
        for group in self._groups.values():
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
                self._fail(completion.group, "the policy's logits are not finite numbers; its weights are damaged")
                continue
            reason = ends.reason_to_end(self._arrays, completion, int(ids_B[at]), self.tokenizer.eos_id)
            if reason is not None:
                self._end_turn(completion, reason)
            elif ends.is_out_of_thinking(self._arrays, completion):
                self.interruptions += 1
                completion.is_thinking = False
                self._put_in(completion, completion.group.forced_ids)

    def _remarkable(self, slots: Slots, ids_B: Ids, logprob_B: Logprobs) -> npt.NDArray[np.int64]:
        """Which of these tokens may end or change anything."""
        arrays = self._arrays
        is_last = (ids_B == self.tokenizer.eos_id) | (arrays.count_S[slots] >= arrays.limit_S[slots])
        is_last |= (arrays.run_S[slots] >= arrays.run_limit_S[slots]) | arrays.is_watched_S[slots]
        return np.flatnonzero(is_last | ~np.isfinite(logprob_B))

    def _put_in(self, completion: Completion, ids: list[int]) -> None:
        """Go on after tokens that the policy did not sample."""
        self._arrays.append_given(completion.slot, ids)
        ends.read_given(completion, ids)
        self._room.read_on(completion)

    def _end_turn(self, completion: Completion, reason: StopReason) -> None:
        if not (completion.group.request.is_open and reason in ends.ENDS_OF_TURN):
            self._end(completion, reason)
            return
        completion.stage, completion.ended_by = Stage.OPEN, reason
        self._arrays.epoch_S[completion.slot] += 1
        self._arrays.launched_S[completion.slot] = self._arrays.count_S[completion.slot]
        self._open[completion.number] = completion
        request, turn = completion.group.request, self._arrays.tokens(completion.slot).turns()[-1]
        ids = tuple(turn.token_ids_T.tolist())
        text = self.tokenizer.decode(ids)
        self._turns.append(OpenTurn(completion.number, request.prompt.id, request.stream, completion.index, ids, text))

    def _end(self, completion: Completion, reason: StopReason) -> None:
        tokens = completion.aside if completion.aside is not None else self._arrays.tokens(completion.slot)
        group, text = completion.group, self.tokenizer.decode(tokens.ids_T.tolist())
        group.rollouts[completion.index] = Rollout(
            prompt_id=group.request.prompt.id,
            completion_index=completion.index,
            prompt_token_ids_T=np.asarray(group.prompt_ids, np.int32),
            turns=tokens.turns(),
            stop_reason=reason,
            text=text[: completion.stopped_at] if reason is StopReason.STOP_STRING else text,
            prompt_expert_ids_TLK=group.prompt_expert_ids_TLK,
        )
        self.stop_reasons[reason] += 1
        self._room.vacate(completion)
        completion.stage, completion.aside, completion.states = Stage.ENDED, None, None
        if len(group.rollouts) == group.request.group_size:
            in_order = tuple(group.rollouts[index] for index in range(group.request.group_size))
            self._finished.append(Group(group.request.prompt, in_order))
            del self._groups[group.order]

    def _fail(self, group: GroupState, message: str) -> None:
        request = group.request
        self._failures.append(
            RequestFailure(request.prompt.id, request.stream, f"prompt {request.prompt.id}: {message}")
        )
        self._drop(group)

    def _drop(self, group: GroupState) -> None:
        self._room.forget(group)
        for completion in group.sequences:
            self._open.pop(completion.number, None)
        self._groups.pop(group.order, None)
