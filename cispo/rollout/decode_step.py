"""One token for every active completion: decode, head, sample.

Where the CPU kernels serve all of it, in float32, that is a plan (cispo.kernels.cpu_plan), recorded at the first step;
everywhere else, and in a step that tells the routers something, the same code runs as it stands.

S slots, B active sequences, D model width, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.cpu_plan import Plan, record
from cispo.kernels.head_loss import head_logits
from cispo.model.cache import DecodeCache, DecodeStep
from cispo.model.decoder import Decoder
from cispo.model.routing import RoutingControl
from cispo.rollout.sampling import sample_tokens

Ids = npt.NDArray[np.int64]
Logprobs = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """ids: int64, the last token of each sequence. uniform: float64. temperature: float32."""

    ids_B: Tensor
    uniform_B: Tensor
    temperature_B: Tensor


class DecodeStepper:
    """Runs the decode steps of the sequences in a cache. Not safe to use from two threads at once."""

    def __init__(self, decoder: Decoder, cache: DecodeCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._device = decoder.head_weight.device
        self._ids_S = np.zeros(cache.capacity, np.int64)
        self._uniform_S = np.zeros(cache.capacity, np.float64)
        self._temperature_S = np.ones(cache.capacity, np.float32)
        self._parameters_by_module = [module._parameters for module in decoder.modules()]
        self._parameters: list[Tensor] = []
        self._places: list[int] = []
        self._versions: list[int] = []
        self._plan: Plan | None = None

    def run(
        self,
        ids_B: Ids,
        uniform_B: npt.NDArray[np.float64],
        temperature_B: npt.NDArray[np.float32],
        routing: RoutingControl | None = None,
    ) -> tuple[Ids, Logprobs]:
        """Take in the last token of the sequences in slots 0 .. B - 1 and sample the next; good until the next call.

        uniform_B: in [0, 1). temperature_B: > 0. routing: as in `Decoder.decode`.
        """
        active = len(ids_B)
        self._ids_S[:active], self._uniform_S[:active], self._temperature_S[:active] = ids_B, uniform_B, temperature_B
        plan = self._current_plan() if routing is None else None
        if plan is None:
            step = self._cache.begin_step(active)
            outputs = self._sample(step, self._inputs(step.every_B.numel()), routing)
        else:
            self._cache.advance(active)
            plan.run(active)
            outputs = plan.outputs[0], plan.outputs[1]
        ids_S, logprob_S = (output.to("cpu").numpy() for output in outputs)
        return ids_S[:active], logprob_S[:active]

    def _inputs(self, rows: int) -> _Inputs:
        """The first rows of the inputs, on CPU the very memory that `run` fills."""
        arrays = (self._ids_S, self._uniform_S, self._temperature_S)
        return _Inputs(*(torch.from_numpy(array)[:rows].to(self._device) for array in arrays))

    def _sample(self, step: DecodeStep, inputs: _Inputs, routing: RoutingControl | None) -> tuple[Tensor, Tensor]:
        hidden_BD = self._decoder.decode(inputs.ids_B, step, self._cache, routing)
        logits_BV = head_logits(hidden_BD, self._decoder.head_weight)
        return sample_tokens(logits_BV, inputs.uniform_B, inputs.temperature_B)

    def _current_plan(self) -> Plan | None:
        """The plan: recorded anew for other weights or weights elsewhere, brought up to date where values changed."""
        parameters: list[Tensor] = [p for group in self._parameters_by_module for p in group.values() if p is not None]
        places = [self._decoder.trained_ids, *map(id, parameters), *[p.data_ptr() for p in parameters]]
        versions = [0 if p.is_inference() else p._version for p in parameters]
        if places != self._places:
            is_served = cpu_library.serves(*parameters)
            self._plan = record(self._sample_every_slot) if is_served else None
        elif self._plan is not None and versions != self._versions:
            self._plan.refresh()
        # Parameters are kept: none that is made later can have the id of one of them.
        self._parameters, self._places, self._versions = parameters, places, versions
        return self._plan

    def _sample_every_slot(self) -> tuple[Tensor, Tensor]:
        return self._sample(self._cache.every_slot(), self._inputs(self._cache.capacity), None)
