"""One token for every sequence of a step: decode, head, sample.

Where the CPU kernels serve all of it, in float32, that is a plan (cispo.kernels.cpu_plan), recorded at the first step;
on CUDA, where Triton serves all of it, a CUDA graph (cispo.rollout.decode_graph). Everywhere else, and in a step that
cuts distributions or tells the routers something, the same code runs as it stands.

S slots, B sequences of a step, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.cpu_plan import Plan, record
from cispo.kernels.head_loss import head_logits
from cispo.model.cache import DecodeCache, DecodeStep, Slots
from cispo.model.decoder import Decoder
from cispo.model.routing import RoutingControl
from cispo.rollout.filters import Filters
from cispo.rollout.sampling import sample_tokens

Ids = npt.NDArray[np.int64]
Logprobs = npt.NDArray[np.float32]
Uniforms = npt.NDArray[np.float64]


class Sampled(Protocol):
    """Tokens on their way to the host."""

    def wait(self) -> tuple[Ids, Logprobs]:
        """Token and logprob of each sequence, in order of the slots that were asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class AtHand:
    """Tokens that are on the host already."""

    ids_B: Tensor
    logprob_B: Tensor

    def wait(self) -> tuple[Ids, Logprobs]:
        return self.ids_B.numpy(), self.logprob_B.numpy()


@dataclass(frozen=True, slots=True, eq=False)
class _Arriving:
    """Tokens on their way to pinned memory of their own."""

    at_hand: AtHand
    arrived: torch.cuda.Event

    def wait(self) -> tuple[Ids, Logprobs]:
        self.arrived.synchronize()
        return self.at_hand.wait()


def fetch(ids_B: Tensor, logprob_B: Tensor) -> Sampled:
    """Send tokens to the host without waiting for them."""
    if not ids_B.is_cuda:
        return AtHand(ids_B, logprob_B)
    hosted = [
        torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in (ids_B, logprob_B)
    ]
    arrived = torch.cuda.Event()
    arrived.record()
    return _Arriving(AtHand(*hosted), arrived)


def sample_step(
    decoder: Decoder,
    cache: DecodeCache,
    step: DecodeStep,
    ids_B: Tensor,
    uniform_B: Tensor,
    temperature_B: Tensor,
    filters: Filters | None = None,
    routing: RoutingControl | None = None,
) -> tuple[Tensor, Tensor]:
    """Take in one token of each sequence and sample the next: ids (int64) and logprobs (float32), [B]."""
    hidden_BD = decoder.decode(ids_B, step, cache, routing)
    return sample_tokens(head_logits(hidden_BD, decoder.head_weight), uniform_B, temperature_B, filters)


class DecodeStepper:
    """Runs the decode steps of the sequences in a cache. Not safe to use from two threads at once.

    last_id_S: the last token of the sequence in each slot, which a step takes in and replaces; int64, on the device.
    """

    def __init__(self, decoder: Decoder, cache: DecodeCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._device = decoder.head_weight.device
        self.last_id_S = torch.zeros(cache.capacity + 1, dtype=torch.int64, device=self._device)
        rows = cache.capacity
        self._ids_B, self._uniform_B = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.float64)
        self._temperature_B = torch.ones(rows)
        self._parameters_by_module = [module._parameters for module in decoder.modules()]
        self._parameters: list[Tensor] = []
        self._places: list[int] = []
        self._versions: list[int] = []
        self._plan: Plan | None = None

    def launch(
        self,
        slots: Slots,
        uniform_B: Uniforms,
        temperature_B: npt.NDArray[np.float32],
        filters: Filters | None = None,
        routing: RoutingControl | None = None,
    ) -> Sampled:
        """Take in the last token of the sequences in these slots and sample the next.

        uniform_B: in [0, 1). temperature_B: at least 0. filters: of the step's rows. routing: as in `Decoder.decode`.
        """
        is_plain = filters is None and routing is None
        if is_plain and self._device.type == "cpu" and self._current_plan() is not None:
            return self._run_plan(slots, uniform_B, temperature_B)
        return self._run(slots, uniform_B, temperature_B, filters, routing)

    def _run(
        self,
        slots: Slots,
        uniform_B: Uniforms,
        temperature_B: npt.NDArray[np.float32],
        filters: Filters | None,
        routing: RoutingControl | None,
    ) -> Sampled:
        step, active = self._cache.begin_step(slots), len(slots)
        ids_B = self.last_id_S.index_select(0, step.slot_B)
        hidden_BD = self._decoder.decode(ids_B, step, self._cache, routing)
        logits_BV = head_logits(hidden_BD, self._decoder.head_weight)[:active]
        noise = torch.from_numpy(uniform_B).to(self._device), torch.from_numpy(temperature_B).to(self._device)
        sampled_B, logprob_B = sample_tokens(logits_BV, *noise, filters)
        self.last_id_S.index_copy_(0, step.slot_B[:active], sampled_B)
        return fetch(sampled_B, logprob_B)

    def _run_plan(self, slots: Slots, uniform_B: Uniforms, temperature_B: npt.NDArray[np.float32]) -> Sampled:
        assert self._plan is not None
        active = len(slots)
        last = self.last_id_S.numpy()
        self._ids_B.numpy()[:active] = last[slots]
        self._uniform_B.numpy()[:active], self._temperature_B.numpy()[:active] = uniform_B, temperature_B
        self._cache.fill_plan_step(slots)
        self._plan.run(active)
        ids_B, logprob_B = self._plan.outputs[0][:active], self._plan.outputs[1][:active]
        last[slots] = ids_B.numpy()
        return AtHand(ids_B, logprob_B)

    def _current_plan(self) -> Plan | None:
        """The plan: recorded anew for other weights or weights elsewhere, brought up to date where values changed."""
        parameters: list[Tensor] = [p for group in self._parameters_by_module for p in group.values() if p is not None]
        places = [self._decoder.trained_ids, *map(id, parameters), *[p.data_ptr() for p in parameters]]
        versions = [0 if p.is_inference() else p._version for p in parameters]
        if places != self._places:
            is_served = cpu_library.serves(*parameters)
            self._plan = record(self._plan_step) if is_served else None
        elif self._plan is not None and versions != self._versions:
            self._plan.refresh()
        # Parameters are kept: none that is made later can have the id of one of them.
        self._parameters, self._places, self._versions = parameters, places, versions
        return self._plan

    def _plan_step(self) -> tuple[Tensor, Tensor]:
        step = self._cache.plan_step()
        return sample_step(self._decoder, self._cache, step, self._ids_B, self._uniform_B, self._temperature_B)


def open_stepper(decoder: Decoder, cache: DecodeCache) -> DecodeStepper:
    """The stepper for where the decoder is: with CUDA graphs wherever a whole step is made of Triton's kernels."""
    if decoder.head_weight.is_cuda:
        from cispo.rollout.decode_graph import GraphStepper, is_capturable

        if is_capturable(decoder):
            return GraphStepper(decoder, cache)
    return DecodeStepper(decoder, cache)
