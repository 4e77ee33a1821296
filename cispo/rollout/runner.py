"""The run part of a step: launch a token for everything that decodes, and read pieces of what was admitted.

N packed tokens, B sequences of a step, R readings that are done, K experts a token, L layers that have a router.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH
from cispo.kernels.head_loss import head_logits
from cispo.model.cache import DecodeCache, Slots
from cispo.model.decoder import Decoder
from cispo.model.routing import ExpertRecord, RoutingControl, RoutingLog
from cispo.rollout import ends
from cispo.rollout.cuts import Cuts
from cispo.rollout.decode_step import Sampled, fetch, open_stepper
from cispo.rollout.filters import Filters
from cispo.rollout.room import Room
from cispo.rollout.sampling import sample_tokens, uniforms
from cispo.rollout.sequence import Reading, Stage
from cispo.rollout.slots import SlotArrays


@dataclass(frozen=True, slots=True, eq=False)
class UnderWay:
    """Tokens that were launched: for which slots, wanted while their epochs stand."""

    sampled: Sampled
    slots: Slots
    epoch_B: Slots


class Runner:
    """Runs one decoder on the sequences that have room. record, routing_log: as the engine has them.

    prompt_tokens: how many were read so far.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: DecodeCache,
        arrays: SlotArrays,
        room: Room,
        *,
        max_prefill_tokens: int,
        record: ExpertRecord | None,
        routing_log: RoutingLog | None,
    ) -> None:
        self._decoder, self._cache, self._arrays, self._room = decoder, cache, arrays, room
        self._device = decoder.head_weight.device
        self._max_prefill_tokens = max_prefill_tokens
        self._record, self._routing_log = record, routing_log
        self._stepper = open_stepper(decoder, cache)
        self._cuts = Cuts(decoder.trained_ids, self._device)
        self.prompt_tokens = 0

    def decode(self, settle: Callable[[], None]) -> UnderWay | None:
        """Launch a token for every completion that decodes; None where there is none.

        settle: takes in all tokens under way, before sequences are set aside for want of pages.
        """
        slots = self._ready()
        if self._cache.pages_for_step(slots) > self._room.pages_to_give:
            settle()
            slots = self._room.make_pages(self._ready())
        if not slots.size:
            return None
        arrays, routing = self._arrays, self._routing(slots)
        uniform_B = uniforms(arrays.key_S[slots], arrays.launched_S[slots])
        cut = self._cut(slots)
        sampled = self._stepper.launch(slots, uniform_B, arrays.temperature_S[slots], cut, routing)
        if self._record is not None and arrays.expert_ids_STLK is not None:
            ids_BLK = self._record.ids_NLK[: len(slots)].cpu().numpy()
            arrays.expert_ids_STLK[slots, arrays.launched_S[slots]] = ids_BLK
        return self._launched(sampled, slots)

    def _cut(self, slots: Slots) -> Filters | None:
        """What of each row's distribution may be drawn; None where that is all of every row's."""
        if not self._arrays.has_cut_S[slots].any():
            return None
        return self._cuts.filters([self._room.in_slot[int(slot)].group for slot in slots])

    def _ready(self) -> Slots:
        slots = self._room.decoding()
        return slots[self._arrays.launched_S[slots] < self._arrays.limit_S[slots]]

    def _launched(self, sampled: Sampled, slots: Slots) -> UnderWay:
        self._arrays.launched_S[slots] += 1
        return UnderWay(sampled, slots, self._arrays.epoch_S[slots])

    def read(self) -> UnderWay | None:
        """Read queued tokens, as many as a step may; where readings are done, launch what comes after them."""
        pieces = self._pieces()
        if not pieces:
            return None
        slots = [reading.slot for reading, _ in pieces]
        target = self._cache.extend(slots, [length for _, length in pieces])
        ends_B = np.cumsum([length for _, length in pieces])
        spans = list(zip([reading for reading, _ in pieces], target.starts, np.diff(ends_B, prepend=0), strict=True))
        ids = [token for reading, start, length in spans for token in reading.ids[start : start + length]]
        positions_N = np.concatenate([np.arange(start, start + length) for _, start, length in spans])
        done = np.array([start + length == len(reading.ids) for reading, start, length in spans])
        hidden_ND = self._decoder(
            torch.tensor(ids).to(self._device),
            torch.from_numpy(positions_N).to(self._device),
            torch.tensor([0, *ends_B.tolist()], dtype=torch.int32),
            target,
            routing=self._routing(np.array(slots)),
        )
        self.prompt_tokens += len(ids)
        self._record_read(spans)
        readings = [reading for (reading, _), is_done in zip(pieces, done, strict=True) if is_done]
        if not readings:
            return None
        last_N = torch.from_numpy(ends_B[done] - 1).to(self._device)
        return self._sample_first(readings, hidden_ND.index_select(0, last_N))

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

    def _sample_first(self, readings: list[Reading], last_RD: Tensor) -> UnderWay:
        """Fork what was read to the sequences that go on from it, and sample a token of each."""
        done = set(map(id, readings))
        self._room.readings = [one for one in self._room.readings if id(one) not in done]
        self._cache.fork_all((one.slot, [fork.slot for fork in one.sequences[1:]]) for one in readings)
        completions = [completion for reading in readings for completion in reading.sequences]
        for completion in completions:
            completion.stage = Stage.DECODING
        slots, arrays = np.array([completion.slot for completion in completions]), self._arrays
        sizes = torch.tensor([len(reading.sequences) for reading in readings], device=self._device)
        logits_BV = head_logits(last_RD, self._decoder.head_weight).repeat_interleave(sizes, 0)
        uniform_B = uniforms(arrays.key_S[slots], arrays.launched_S[slots])
        noise = [torch.from_numpy(x).to(self._device) for x in (uniform_B, arrays.temperature_S[slots])]
        cut = self._cut(slots)
        ids_B, logprob_B = sample_tokens(logits_BV, noise[0], noise[1], cut)
        self._stepper.last_id_S.index_copy_(0, torch.from_numpy(slots).to(self._device), ids_B)
        return self._launched(fetch(ids_B, logprob_B), slots)

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
