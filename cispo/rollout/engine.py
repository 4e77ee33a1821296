"""Continuous batching of groups: submit prompts, step, collect finished groups.

A step is schedule -> run -> postprocess. Groups are admitted whole: the prompt is read once, in pieces beside the
decode steps of others, and forked to the group's completions. On a GPU the next step is launched before the tokens of
the last one are looked at, so what a stop wastes is at most one token of its sequence.

S slots, B sequences of a step, N packed tokens, L layers that have a router, K experts a token.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH
from cispo.kernels.head_loss import head_logits
from cispo.model.cache import PAGE_LENGTH, Slots
from cispo.model.decoder import Decoder
from cispo.model.routing import ExpertRecord, RoutingControl, RoutingLog
from cispo.model.tokenizer import Tokenizer
from cispo.rollout import ends
from cispo.rollout.cuts import Cuts
from cispo.rollout.decode_step import Ids, Logprobs, Sampled, fetch, open_stepper
from cispo.rollout.request import GroupRequest, RequestError
from cispo.rollout.room import Room
from cispo.rollout.sampling import noise_key, sample_tokens, uniforms
from cispo.rollout.sequence import GroupState, OpenTurn, ParkedGroup, Reading, RequestFailure, Stage
from cispo.rollout.sequence import Sequence as Completion
from cispo.rollout.slots import SlotArrays, Tokens
from cispo.types import Group, Rollout, StopReason


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """What all requests share: the most tokens after a prompt, and the seed of the sampling noise."""

    max_completion_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class _UnderWay:
    """Tokens that were launched: for which slots, wanted while their epochs stand, and by which policy."""

    sampled: Sampled
    slots: Slots
    epoch_B: Slots
    version: int


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
        self.completion_tokens = self.prompt_tokens = self.steps = self.interruptions = 0
        self.stop_reasons: Counter[StopReason] = Counter()
        self._max_prompt_tokens, self._max_prefill_tokens = max_prompt_tokens, max_prefill_tokens
        self._device = decoder.head_weight.device
        limit = settings.max_completion_tokens
        self._cache = decoder.new_cache(
            capacity=max_concurrent_completions, max_tokens=max_prompt_tokens + limit, pages=cache_pages
        )
        self._stepper = open_stepper(decoder, self._cache)
        self._runs_ahead = self._device.type == "cuda"
        self._record = ExpertRecord(decoder.config) if records_experts else None
        experts = self._record.room(max_concurrent_completions, limit).numpy() if self._record else None
        self._arrays = SlotArrays(max_concurrent_completions, limit, experts)
        self._room = Room(self._cache, self._arrays)
        self._cuts = Cuts(decoder.trained_ids, self._device)
        self._routing_log = routing_log
        self._under_way: deque[_UnderWay] = deque()
        self._groups: dict[int, GroupState] = {}
        self._open: dict[int, Completion] = {}
        self._turns: list[OpenTurn] = []
        self._finished: list[Group] = []
        self._failures: list[RequestFailure] = []
        self._submitted = self._numbered = 0

    def submit(self, request: GroupRequest) -> None:
        """Queue a group. RequestError when it can never be sampled; nothing else is touched then."""
        self._queue(self._checked(request))

    def resume(self, parked: ParkedGroup) -> None:
        """Queue a group that was taken out of an engine; its unfinished completions go on from their last token."""
        group = self._checked(parked.request)
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

    def _checked(self, request: GroupRequest) -> GroupState:
        prompt_ids = self._prompt_ids(request)
        name, limit = f"prompt {request.prompt.id}", self.settings.max_completion_tokens
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
        request.drawing.check(self.decoder.trained_ids)
        request.stops.check(limit)
        if not 0 <= request.expert_threshold < 1:
            raise RequestError(f"expert_threshold is {request.expert_threshold:g}; it must be in [0, 1), and 0 is off")
        if request.expert_threshold and self._record is not None:
            raise RequestError("no experts can be recorded where an expert_threshold drops some; leave one out")
        longest = len(prompt_ids) + (request.stops.max_new_tokens or limit)
        forks = request.group_size - 1 if len(prompt_ids) % PAGE_LENGTH else 0
        pages = max(-(-longest // PAGE_LENGTH), -(-len(prompt_ids) // PAGE_LENGTH) + forks)
        if pages > self._cache.pages:
            raise RequestError(
                f"{name} may take {pages} pages of {PAGE_LENGTH} tokens, and the cache has {self._cache.pages}; raise "
                "cache_pages, or ask for fewer tokens or completions"
            )
        self._submitted += 1
        group = GroupState(request, prompt_ids, self._submitted)
        return ends.with_interruption(group, self.tokenizer, request.stops.max_new_tokens or limit)

    def _prompt_ids(self, request: GroupRequest) -> list[int]:
        if request.prompt_ids is None:
            if not request.prompt.text.strip():
                raise RequestError(f"prompt {request.prompt.id} is empty; give it some text")
            return self.tokenizer.render_prompt(request.prompt.text)
        ids = [int(token) for token in request.prompt_ids]
        if not ids:
            raise RequestError(f"prompt {request.prompt.id} has no tokens; give at least one")
        self._refuse_strange(ids)
        return ids

    def _refuse_strange(self, ids: Sequence[int]) -> None:
        strange = [token for token in ids if not 0 <= token < self.decoder.config.vocabulary_size]
        if strange:
            raise RequestError(f"token id {strange[0]} is none of the policy's {self.decoder.config.vocabulary_size}")

    @property
    def is_idle(self) -> bool:
        """Whether no group is queued or under way; one with an open turn is."""
        return not self._groups and not self._under_way

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
        launched = self._decode()
        launched |= self._read()
        while self._under_way and (len(self._under_way) > 1 or not (self._runs_ahead and launched)):
            self._take_in(self._under_way.popleft())

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

    def extend(self, turn: OpenTurn, token_ids: Sequence[int]) -> bool:
        """Go on with a turn after these tokens, which are not the policy's and carry no loss.

        False where they leave no room for a token of the policy's: then the completion has ended, by length, without
        them. RequestError for ids that are none, or a turn that is not open.
        """
        ids = [int(token) for token in token_ids]
        if not ids:
            raise RequestError("a turn can only be extended by tokens; close it to end the completion")
        self._refuse_strange(ids)
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

    def _decode(self) -> bool:
        """Launch a token for every completion that decodes; whether there was one."""
        slots = self._ready()
        if self._cache.pages_for_step(slots) > self._room.pages_to_give:
            self._settle()
            slots = self._room.make_pages(self._ready())
        if not slots.size:
            return False
        arrays, routing = self._arrays, self._routing(slots)
        uniform_B = uniforms(arrays.key_S[slots], arrays.launched_S[slots])
        cut = (
            self._cuts.filters([self._room.in_slot[int(slot)].group for slot in slots])
            if self._has_cut(slots)
            else None
        )
        sampled = self._stepper.launch(slots, uniform_B, arrays.temperature_S[slots], cut, routing)
        if self._record is not None and arrays.expert_ids_STLK is not None:
            ids_BLK = self._record.ids_NLK[: len(slots)].cpu().numpy()
            arrays.expert_ids_STLK[slots, arrays.launched_S[slots]] = ids_BLK
        self._await(sampled, slots)
        return True

    def _ready(self) -> Slots:
        slots = self._room.decoding()
        return slots[self._arrays.launched_S[slots] < self._arrays.limit_S[slots]]

    def _has_cut(self, slots: Slots) -> bool:
        return bool(self._arrays.has_cut_S[slots].any())

    def _await(self, sampled: Sampled, slots: Slots) -> None:
        self._arrays.launched_S[slots] += 1
        self._under_way.append(_UnderWay(sampled, slots, self._arrays.epoch_S[slots], self.policy_version))

    def _read(self) -> bool:
        """Read queued tokens, as many as a step may; where a reading is done, sample what comes after it."""
        pieces = self._pieces()
        if not pieces:
            return False
        slots = [reading.slot for reading, _ in pieces]
        target = self._cache.extend(slots, [length for _, length in pieces])
        ends_B = np.cumsum([length for _, length in pieces])
        spans = list(zip([reading for reading, _ in pieces], target.starts, np.diff(ends_B, prepend=0), strict=True))
        ids = [token for reading, start, length in spans for token in reading.ids[start : start + length]]
        positions_N = np.concatenate([np.arange(start, start + length) for _, start, length in spans])
        done = np.array([start + length == len(reading.ids) for reading, start, length in spans])
        hidden_ND = self.decoder(
            torch.tensor(ids).to(self._device),
            torch.from_numpy(positions_N).to(self._device),
            torch.tensor([0, *ends_B.tolist()], dtype=torch.int32),
            target,
            routing=self._routing(np.array(slots)),
        )
        self.prompt_tokens += len(ids)
        self._record_read(spans)
        readings = [reading for (reading, _), is_done in zip(pieces, done, strict=True) if is_done]
        if readings:
            self._sample_first(readings, hidden_ND.index_select(0, torch.from_numpy(ends_B[done] - 1).to(self._device)))
        return True

    def _pieces(self) -> list[tuple[Reading, int]]:
        """What is read in this step: whole readings, and of the last as many whole chunks as there is room for."""
        pieces: list[tuple[Reading, int]] = []
        left, pages = self._max_prefill_tokens, self._cache.free_pages
        for reading in self._room.readings:
            read = self._cache.length(reading.slot)
            wanted = len(reading.ids) - read
            if wanted > left:
                wanted = (read + left) // CHUNK_LENGTH * CHUNK_LENGTH - read
            pages -= reading.pages_wanted(read)
            if wanted <= 0 or pages < 0:
                break
            pieces.append((reading, wanted))
            left -= wanted
        return pieces

    def _sample_first(self, readings: list[Reading], last_RD: Tensor) -> None:
        """Fork what was read to the sequences that go on from it, and sample a token of each."""
        self._room.readings = [one for one in self._room.readings if one not in readings]
        self._cache.fork_all((one.slot, [fork.slot for fork in one.sequences[1:]]) for one in readings)
        completions = [completion for reading in readings for completion in reading.sequences]
        for completion in completions:
            completion.stage = Stage.DECODING
        slots, arrays = np.array([completion.slot for completion in completions]), self._arrays
        sizes = torch.tensor([len(reading.sequences) for reading in readings], device=self._device)
        logits_BV = head_logits(last_RD, self.decoder.head_weight).repeat_interleave(sizes, 0)
        uniform_B = uniforms(arrays.key_S[slots], arrays.launched_S[slots])
        noise = [torch.from_numpy(x).to(self._device) for x in (uniform_B, arrays.temperature_S[slots])]
        cut = self._cuts.filters([completion.group for completion in completions]) if self._has_cut(slots) else None
        ids_B, logprob_B = sample_tokens(logits_BV, noise[0], noise[1], cut)
        self._stepper.last_id_S.index_copy_(0, torch.from_numpy(slots).to(self._device), ids_B)
        self._await(fetch(ids_B, logprob_B), slots)

    def _routing(self, slots: Slots) -> RoutingControl | None:
        """What the routers are told of the sequences in these slots, if anything."""
        thresholds = self._arrays.threshold_S[slots]
        if self._record is None and self._routing_log is None and not thresholds.any():
            return None
        return RoutingControl(
            expert_thresholds=thresholds.tolist() if thresholds.any() else None,
            log=self._routing_log,
            log_sequences=self._arrays.log_sequence_S[slots].tolist(),
            record=self._record,
        )

    def _record_read(self, spans: list[tuple[Reading, int, int]]) -> None:
        """Keep the experts of what was read, with the token that comes after each."""
        experts = self._arrays.expert_ids_STLK
        if self._record is None or experts is None:
            return
        ids_NLK, first = self._record.ids_NLK.cpu().numpy(), 0
        for reading, start, length in spans:
            ids_TLK, first = ids_NLK[first : first + length], first + length
            ends.keep_experts(experts, reading, start, ids_TLK)

    def _settle(self) -> None:
        """Take in all tokens under way."""
        while self._under_way:
            self._take_in(self._under_way.popleft())

    def _take_in(self, arrived: _UnderWay) -> None:
        """Record the tokens that are still wanted, and end or interrupt the completions that have come to it."""
        ids_B, logprob_B = arrived.sampled.wait()
        is_wanted = self._arrays.epoch_S[arrived.slots] == arrived.epoch_B
        slots, ids_B, logprob_B = arrived.slots[is_wanted], ids_B[is_wanted], logprob_B[is_wanted]
        self._arrays.append_sampled(slots, ids_B, logprob_B, arrived.version)
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
            text=ends.text_before_stop(text, completion) if reason is StopReason.STOP_STRING else text,
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
