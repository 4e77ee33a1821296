"""Continuous batching of groups: submit prompts, step, collect finished groups.

A step is schedule -> run -> postprocess. Groups are admitted whole: the prompt is prefilled once and forked to the
group's completions. Sequences occupy dense slots; when one ends, the last moves into its place and waiting groups move
up.

S slots, B active sequences, N packed tokens, T tokens of one sequence, L layers that have a router, K experts a token.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.kernels.head_loss import head_logits
from cispo.model.decoder import Decoder
from cispo.model.routing import ExpertRecord, RoutingControl, RoutingLog
from cispo.model.tokenizer import Tokenizer
from cispo.rollout.decode_step import DecodeStepper, Ids, Logprobs
from cispo.rollout.sampling import noise_key, sample_tokens, uniforms
from cispo.types import ExpertIdArray, Group, Prompt, Rollout, StopReason, Turn


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """What all requests share: tokens after which a completion is cut off, and the seed of the sampling noise."""

    max_completion_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """A prompt to sample group_size completions of, at a temperature; 0 takes the likeliest token each time.

    stream: separates the noise of passes over the same prompt. expert_threshold: in [0, 1), a token's experts with less
    of the gate weight are dropped (see `RoutingControl`). log_sequence: the number of this group in the engine's
    routing log.
    """

    prompt: Prompt
    group_size: int
    temperature: float
    stream: str
    expert_threshold: float = 0.0
    log_sequence: int = 0


@dataclass(slots=True, eq=False)
class _Sampling:
    """A group under way: its prompt's ids, the experts of all but the last, and the completions that have ended."""

    request: GroupRequest
    prompt_ids: list[int]
    rollouts: dict[int, Rollout]
    prompt_expert_ids_TLK: ExpertIdArray | None = None


class Engine:
    """Samples groups of completions from one decoder.

    max_concurrent_completions bounds the sequences decoded together, max_prompt_tokens the length of a prompt; both fix
    the cache's memory. records_experts: keep in the rollouts which experts every token went to, for the learner to take
    again. routing_log: filled with what the routers decide, by group. Not safe to use from two threads at once.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        settings: SamplingSettings,
        *,
        max_concurrent_completions: int,
        max_prompt_tokens: int,
        records_experts: bool = False,
        routing_log: RoutingLog | None = None,
    ) -> None:
        self.decoder, self.tokenizer, self.settings = decoder, tokenizer, settings
        self.policy_version = 0
        self.completion_tokens = 0
        self._max_prompt_tokens = max_prompt_tokens
        self._max_concurrent = max_concurrent_completions
        self._device = decoder.head_weight.device
        self._cache = decoder.new_cache(
            capacity=max_concurrent_completions, max_tokens=max_prompt_tokens + settings.max_completion_tokens
        )
        self._stepper = DecodeStepper(decoder, self._cache)
        slots, limit = self._cache.capacity, settings.max_completion_tokens
        self._waiting: deque[_Sampling] = deque()
        self._finished: list[Group] = []
        self._active = 0
        self._sampling: list[_Sampling | None] = [None] * slots
        self._every_S = np.arange(slots)
        self._completion_index_S = np.zeros(slots, np.int64)
        self._key_S = np.zeros(slots, np.uint64)
        self._temperature_S = np.ones(slots, np.float32)
        self._sampled_S = np.zeros(slots, np.int64)
        self._last_id_S = np.zeros(slots, np.int64)
        self._threshold_S = np.zeros(slots, np.float32)
        self._log_sequence_S = np.zeros(slots, np.int64)
        self._per_slot: tuple[npt.NDArray[Any], ...] = (
            self._completion_index_S, self._key_S, self._temperature_S, self._sampled_S, self._last_id_S,
            self._threshold_S, self._log_sequence_S,
        )  # fmt: skip
        self._ids_ST = np.zeros((slots, limit), np.int32)
        self._logprobs_ST = np.zeros((slots, limit), np.float32)
        self._versions_ST = np.zeros((slots, limit), np.int32)
        self._record = ExpertRecord(decoder.config) if records_experts else None
        self._routing_log = routing_log
        self._experts_STLK = self._record.room(slots, limit).numpy() if self._record else None

    def submit(self, request: GroupRequest) -> None:
        """Queue a group. ValueError when the group or its prompt can never fit."""
        prompt_ids = self.tokenizer.render_prompt(request.prompt.text)
        if not 1 <= request.group_size <= self._max_concurrent:
            raise ValueError(
                f"group_size {request.group_size} does not fit max_concurrent_completions {self._max_concurrent}; "
                "raise the latter"
            )
        if len(prompt_ids) > self._max_prompt_tokens:
            raise ValueError(
                f"prompt {request.prompt.id} has {len(prompt_ids)} tokens, more than max_prompt_tokens "
                f"{self._max_prompt_tokens}; raise it or shorten the prompt"
            )
        if request.temperature < 0:
            raise ValueError(f"temperature is {request.temperature:g}; it must be at least 0")
        if not 0 <= request.expert_threshold < 1:
            raise ValueError(f"expert_threshold is {request.expert_threshold:g}; it must be in [0, 1), and 0 is off")
        if request.expert_threshold and self._record is not None:
            raise ValueError("no experts can be recorded where an expert_threshold drops some; leave one out")
        self._waiting.append(_Sampling(request, prompt_ids, {}))

    @property
    def is_idle(self) -> bool:
        return not self._waiting and self._active == 0

    @property
    def active_completions(self) -> int:
        return self._active

    @property
    def waiting_groups(self) -> int:
        return len(self._waiting)

    @torch.inference_mode()
    def step(self) -> None:
        """Sample one token of every active completion, or the first tokens of groups that were just admitted."""
        admitted = self._schedule()
        if admitted:
            self._postprocess(*self._prefill(admitted))
        elif self._active:
            self._postprocess(0, *self._decode())

    def collect(self) -> list[Group]:
        """Groups that have ended since the last call, each with its rollouts in order of completion index."""
        finished, self._finished = self._finished, []
        return finished

    def update_weights(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Take new weights between two steps, in place; completions under way go on, their states kept."""
        parameters = dict(self.decoder.named_parameters())
        if set(parameters) != set(tensors):
            raise ValueError(f"weights of version {version} name other parameters: {set(parameters) ^ set(tensors)}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        self.policy_version = version

    def _schedule(self) -> list[_Sampling]:
        admitted, occupied = [], self._active
        while self._waiting and occupied + self._waiting[0].request.group_size <= self._max_concurrent:
            admitted.append(self._waiting.popleft())
            occupied += admitted[-1].request.group_size
        return admitted

    def _prefill(self, admitted: Sequence[_Sampling]) -> tuple[int, Ids, Logprobs]:
        """Run the prompts packed, fork each to its completions; returns the first new slot and their first tokens."""
        first, sources = self._active, []
        for sampling in admitted:
            sources.append(self._active)
            for index in range(sampling.request.group_size):
                self._occupy(self._active, sampling, index)
                self._active += 1
        lengths = [len(sampling.prompt_ids) for sampling in admitted]
        target = self._cache.extend(sources, lengths)
        ids_N = torch.tensor([token for sampling in admitted for token in sampling.prompt_ids], device=self._device)
        positions_N = torch.cat([torch.arange(length) for length in lengths]).to(self._device)
        ends_B = torch.tensor(lengths).cumsum(0)
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), ends_B)).to(self._device, torch.int32)
        hidden_ND = self.decoder(ids_N, positions_N, cu_seqlens, target, routing=self._routing(sources))
        self._record_prompts(admitted, sources)
        for source, sampling in zip(sources, admitted, strict=True):
            self._cache.fork(source, range(source + 1, source + sampling.request.group_size))
        last_BD = hidden_ND.index_select(0, (ends_B - 1).to(self._device))
        logits_BV = head_logits(last_BD, self.decoder.head_weight)
        sizes = torch.tensor([sampling.request.group_size for sampling in admitted], device=self._device)
        new = slice(first, self._active)
        uniform_B = torch.from_numpy(uniforms(self._key_S[new], self._sampled_S[new])).to(self._device)
        temperature_B = torch.from_numpy(self._temperature_S[new]).to(self._device)
        ids_B, logprob_B = sample_tokens(logits_BV.repeat_interleave(sizes, 0), uniform_B, temperature_B)
        return first, ids_B.to("cpu").numpy(), logprob_B.to("cpu").numpy()

    def _routing(self, slots: slice | list[int]) -> RoutingControl | None:
        """What the routers are told of the sequences in these slots, if anything."""
        thresholds = self._threshold_S[slots]
        if self._record is None and self._routing_log is None and not thresholds.any():
            return None
        return RoutingControl(
            expert_thresholds=thresholds.tolist() if thresholds.any() else None,
            log=self._routing_log,
            log_sequences=self._log_sequence_S[slots].tolist(),
            record=self._record,
        )

    def _record_prompts(self, admitted: Sequence[_Sampling], sources: Sequence[int]) -> None:
        """Keep the experts of prompts; those of a prompt's last token go to the first token of each completion."""
        if self._record is None or self._experts_STLK is None:
            return
        ends = np.cumsum([len(sampling.prompt_ids) for sampling in admitted])
        parts = np.split(self._record.ids_NLK.cpu().numpy(), ends[:-1])
        for sampling, source, ids_TLK in zip(admitted, sources, parts, strict=True):
            sampling.prompt_expert_ids_TLK = ids_TLK[:-1].copy()
            self._experts_STLK[source : source + sampling.request.group_size, 0] = ids_TLK[-1]

    def _occupy(self, slot: int, sampling: _Sampling, completion_index: int) -> None:
        request = sampling.request
        self._sampling[slot] = sampling
        self._completion_index_S[slot] = completion_index
        self._key_S[slot] = noise_key(self.settings.seed, request.stream, request.prompt.id, completion_index)
        self._temperature_S[slot] = request.temperature
        self._threshold_S[slot] = request.expert_threshold
        self._log_sequence_S[slot] = request.log_sequence
        self._sampled_S[slot] = 0

    def _decode(self) -> tuple[Ids, Logprobs]:
        every = slice(0, self._active)
        uniform_B = uniforms(self._key_S[every], self._sampled_S[every])
        sampled = self._stepper.run(self._last_id_S[every], uniform_B, self._temperature_S[every], self._routing(every))
        if self._record is not None and self._experts_STLK is not None:
            active = self._every_S[every]
            self._experts_STLK[active, self._sampled_S[active]] = self._record.ids_NLK[: self._active].cpu().numpy()
        return sampled

    def _postprocess(self, first: int, ids_B: Ids, logprob_B: Logprobs) -> None:
        """Record the token sampled for each slot from `first` on, and retire completions that have ended."""
        new = slice(first, self._active)
        slots, sampled_B = self._every_S[new], self._sampled_S[new]
        self._last_id_S[new] = ids_B
        self._ids_ST[slots, sampled_B] = ids_B
        self._logprobs_ST[slots, sampled_B] = logprob_B
        self._versions_ST[slots, sampled_B] = self.policy_version
        sampled_B += 1
        self.completion_tokens += len(slots)
        is_eos = ids_B == self.tokenizer.eos_id
        ended = is_eos | (sampled_B == self.settings.max_completion_tokens)
        if ended.any():
            for at in reversed(np.nonzero(ended)[0]):
                self._retire(first + int(at), StopReason.EOS if is_eos[at] else StopReason.LENGTH)

    def _retire(self, slot: int, reason: StopReason) -> None:
        sampling = self._sampling[slot]
        assert sampling is not None
        length = int(self._sampled_S[slot])
        index = int(self._completion_index_S[slot])
        turn = Turn(
            token_ids_T=self._ids_ST[slot, :length].copy(),
            loss_mask_T=np.ones(length, np.bool_),
            logprobs_T=self._logprobs_ST[slot, :length].copy(),
            policy_versions_T=self._versions_ST[slot, :length].copy(),
            expert_ids_TLK=None if self._experts_STLK is None else self._experts_STLK[slot, :length].copy(),
        )
        sampling.rollouts[index] = Rollout(
            prompt_id=sampling.request.prompt.id,
            completion_index=index,
            prompt_token_ids_T=np.asarray(sampling.prompt_ids, np.int32),
            turns=(turn,),
            stop_reason=reason,
            text=self.tokenizer.decode(turn.token_ids_T.tolist()),
            prompt_expert_ids_TLK=sampling.prompt_expert_ids_TLK,
        )
        if len(sampling.rollouts) == sampling.request.group_size:
            in_order = tuple(sampling.rollouts[i] for i in range(sampling.request.group_size))
            self._finished.append(Group(sampling.request.prompt, in_order))
        self._vacate(slot)

    def _vacate(self, slot: int) -> None:
        """Free a slot and keep the active ones dense."""
        self._cache.release(slot)
        last = self._active - 1
        if slot != last:
            self._cache.move(last, slot)
            self._sampling[slot] = self._sampling[last]
            for per_slot in self._per_slot:
                per_slot[slot] = per_slot[last]
            length = self._sampled_S[slot]
            for per_token in (self._ids_ST, self._logprobs_ST, self._versions_ST):
                per_token[slot, :length] = per_token[last, :length]
            if self._experts_STLK is not None:
                self._experts_STLK[slot, :length] = self._experts_STLK[last, :length]
        self._sampling[last] = None
        self._active = last
