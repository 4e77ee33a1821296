"""Decode steps as CUDA graphs: the whole step, from last tokens to next tokens, in one launch.

A graph is captured once for each of a ladder of batch sizes, when it is first wanted, and rows up to the size are made
up with idle ones, which read and write a spare slot and a spare page. What a step needs of the host is one small copy:
for each row its slot, its position, the page that the token lies in, its noise and temperature. Tokens stay on the
device for the next step; the host gets them through pinned memory and waits, if at all, a step later.

S slots, B rows of a graph, J pages of one sequence.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.model.cache import PAGE_LENGTH, SPARE_PAGE, DecodeCache, DecodeStep, Slots
from cispo.model.decoder import Decoder
from cispo.model.routing import RoutingControl
from cispo.rollout.decode_step import DecodeStepper, Ids, Logprobs, Sampled, Uniforms, sample_step
from cispo.rollout.filters import Filters

_BUFFERS = 3
"""Copies of what goes to and from the device: a step under way, one waiting for it, one that the host reads."""

_SLOT, _POSITION, _PAGE, _UNIFORM, _TEMPERATURE = range(5)


def is_capturable(decoder: Decoder) -> bool:
    """Whether a decode step of this decoder is made of kernels that need nothing of the host."""
    return all(layer.mixer.is_capturable for layer in decoder.whole_layers)


def batch_ladder(capacity: int) -> list[int]:
    """Batch sizes that graphs are captured for, up to the capacity."""
    sizes = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 256, 32), *range(256, capacity, 64)]
    return [*(size for size in sizes if size < capacity), capacity]


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """A captured step: what it reads, int64 words [5, B], and what it leaves, ids and logprobs as words [2, B]."""

    graph: torch.cuda.CUDAGraph
    inputs_5B: Tensor
    outputs_2B: Tensor


@dataclass(slots=True, eq=False)
class _Arriving:
    """Tokens on their way into pinned memory, which is used again a few launches later."""

    words_2B: Tensor
    active: int
    arrived: torch.cuda.Event

    def wait(self) -> tuple[Ids, Logprobs]:
        self.arrived.synchronize()
        words = self.words_2B.numpy()
        return words[0, : self.active].copy(), words[1, : self.active].view(np.float64).astype(np.float32)


class GraphStepper(DecodeStepper):
    """A stepper whose plain steps are CUDA graphs. At most two launches may be waited for at a time."""

    def __init__(self, decoder: Decoder, cache: DecodeCache) -> None:
        super().__init__(decoder, cache)
        self._ladder = batch_ladder(cache.capacity)
        self._graphs: dict[int, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs = [torch.zeros(5, cache.capacity, dtype=torch.int64, pin_memory=True) for _ in range(_BUFFERS)]
        self._outputs = [torch.zeros(2, cache.capacity, dtype=torch.int64, pin_memory=True) for _ in range(_BUFFERS)]
        self._events = [torch.cuda.Event() for _ in range(_BUFFERS)]
        self._launches = 0

    def launch(
        self,
        slots: Slots,
        uniform_B: Uniforms,
        temperature_B: npt.NDArray[np.float32],
        filters: Filters | None = None,
        routing: RoutingControl | None = None,
    ) -> Sampled:
        """As DecodeStepper's; does not wait for the device."""
        if filters is not None or routing is not None:
            return self._run(slots, uniform_B, temperature_B, filters, routing)
        active = len(slots)
        rows = next(size for size in self._ladder if size >= active)
        captured = self._graph(rows)
        turn = self._launches % _BUFFERS
        self._launches += 1
        arrived = self._events[turn]
        # The copy out of this buffer, three launches ago, was before the event that the last wait was for.
        arrived.synchronize()
        words = self._inputs[turn].numpy()[:, :rows]
        position_B, page_B = self._cache.advance(slots)
        for row, values in ((_SLOT, slots), (_POSITION, position_B), (_PAGE, page_B)):
            words[row, :active] = values
        words[_UNIFORM, :active] = uniform_B.view(np.int64)
        words[_TEMPERATURE, :active] = temperature_B.astype(np.float64).view(np.int64)
        idle = (self._cache.spare_slot, 0, SPARE_PAGE, 0, int(np.float64(1.0).view(np.int64)))
        words[:, active:] = np.array(idle)[:, None]
        captured.inputs_5B.copy_(self._inputs[turn][:, :rows], non_blocking=True)
        captured.graph.replay()
        out = self._outputs[turn][:, :rows]
        out.copy_(captured.outputs_2B, non_blocking=True)
        arrived.record()
        return _Arriving(out, active, arrived)

    def _graph(self, rows: int) -> _Graph:
        parameters = [p for group in self._parameters_by_module for p in group.values() if p is not None]
        places = [self._decoder.trained_ids, *[p.data_ptr() for p in parameters]]
        if places != self._places:
            self._graphs.clear()
            self._places = places
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows)
        return self._graphs[rows]

    def _capture(self, rows: int) -> _Graph:
        inputs_5B = torch.zeros(5, rows, dtype=torch.int64, device=self._device)
        inputs_5B[_SLOT] = self._cache.spare_slot
        inputs_5B[_TEMPERATURE].view(torch.float64).fill_(1.0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Idle rows alone, before anything is captured: kernels compile, and products are probed, at their first run.
        with torch.cuda.stream(stream):
            self._step(inputs_5B)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs_2B = self._step(inputs_5B)
        return _Graph(graph, inputs_5B, outputs_2B)

    def _step(self, inputs_5B: Tensor) -> Tensor:
        slot_B, position_B, page_B = inputs_5B[_SLOT], inputs_5B[_POSITION], inputs_5B[_PAGE]
        uniform_B, temperature_B = (inputs_5B[row].view(torch.float64) for row in (_UNIFORM, _TEMPERATURE))
        table_SJ = self._cache.page_table
        places_B = slot_B * table_SJ.shape[1] + position_B // PAGE_LENGTH
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        # Only idle rows share a place, and they all write the same: nothing here depends on an order.
        torch.use_deterministic_algorithms(False)
        try:
            table_SJ.view(-1).index_copy_(0, places_B, page_B)
            step = DecodeStep(
                slot_B=slot_B,
                position_B=position_B,
                row_B=position_B % PAGE_LENGTH,
                full_rows=None,
                page_BJ=table_SJ.index_select(0, slot_B),
                active=slot_B.numel(),
                positions=self._cache.pages_per_sequence * PAGE_LENGTH,
            )
            ids_B = self.last_id_S.index_select(0, slot_B)
            sampled = sample_step(self._decoder, self._cache, step, ids_B, uniform_B, temperature_B.float())
            self.last_id_S.index_copy_(0, slot_B, sampled[0])
        finally:
            torch.use_deterministic_algorithms(is_deterministic)
        return torch.stack((sampled[0], sampled[1].double().view(torch.int64)))
