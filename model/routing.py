"""What a caller may ask of a decoder's routers in one pass, and what it reads back: one object, `RoutingControl`.

Without one the routers do as they are trained to, and nothing is recorded.

N packed tokens, B sequences, L layers that have a router (in order), E experts, K experts a token, M rows asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cispo.kernels.routing import Observer
from cispo.model.config import ModelConfig


class RoutingLog:
    """Tokens that went to each expert and the entropy of the routers, by sequence and layer, added up over calls.

    tokens_BLE: int64, the tokens of each sequence that a layer sent to an expert. routed_BL: int64, the tokens that the
    layer routed; the last layer routes only rows that are asked for.
    """

    def __init__(self, config: ModelConfig, sequences: int, device: torch.device | str = "cpu") -> None:
        shape = len(config.routed_layers), sequences
        # The first bin of each layer and sequence takes the choices that a threshold dropped.
        self._choices_LBE = torch.zeros(*shape, config.experts + 1, dtype=torch.int64, device=device)
        self._routed_LB = torch.zeros(shape, dtype=torch.int64, device=device)
        self._entropy_LB = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, layer: int, sequence_N: Tensor, expert_ids_NK: Tensor, entropy_N: Tensor) -> None:
        """Add one layer's decisions on the tokens of these sequences (int64 numbers); an id of -1 was dropped."""
        choices_BE = self._choices_LBE[layer]
        bin_NK = sequence_N.unsqueeze(1) * choices_BE.shape[1] + (expert_ids_NK + 1)
        choices_BE.view(-1).index_add_(0, bin_NK.view(-1), torch.ones_like(bin_NK).view(-1))
        self._routed_LB[layer].index_add_(0, sequence_N, torch.ones_like(sequence_N))
        self._entropy_LB[layer].index_add_(0, sequence_N, entropy_N.double())

    @property
    def tokens_BLE(self) -> Tensor:
        return self._choices_LBE[..., 1:].transpose(0, 1)

    @property
    def routed_BL(self) -> Tensor:
        return self._routed_LB.transpose(0, 1)

    @property
    def mean_entropy_BL(self) -> Tensor:
        """Mean entropy of a router's softmax over all experts, in nats, float64; NaN where no token was routed."""
        return (self._entropy_LB / self._routed_LB).transpose(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class RoutingControl:
    """What one `Decoder.forward` or `decode` does with its routers; an absent part costs nothing.

    expert_thresholds: of each sequence, in [0, 1). A token's expert whose share of the gate weight is below it is
    dropped, except for the heaviest; the others are renormalised. log: filled with what the routers decide.
    log_sequences: the numbers in the log of this call's sequences; 0 .. B - 1 if None. ValueError for a threshold
    outside its range.
    """

    expert_thresholds: Sequence[float] | None = None
    log: RoutingLog | None = None
    log_sequences: Sequence[int] | None = None

    def __post_init__(self) -> None:
        wrong = [value for value in self.expert_thresholds or () if not 0 <= value < 1]
        if wrong:
            raise ValueError(f"expert_threshold must be in [0, 1), got {wrong[0]:g}; 0 drops nothing")

    def of_packed(self, config: ModelConfig, cu_seqlens: Tensor, device: torch.device) -> "RowRouting":
        """The control of packed tokens; cu_seqlens: [B + 1]."""
        lengths_B = cu_seqlens.diff().long()
        sequence_N = torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B)
        return self._of_rows(config, sequence_N.to(device))

    def of_step(self, config: ModelConfig, rows: int, active: int, device: torch.device) -> "RowRouting":
        """The control of a decode step with so many rows, one for each of the first `active` sequences; idle rows after
        those.
        """
        return self._of_rows(config, torch.arange(active, device=device), idle=rows - active)

    def _of_rows(self, config: ModelConfig, sequence_N: Tensor, idle: int = 0) -> "RowRouting":
        threshold_N, log_sequence_N = None, sequence_N
        if self.expert_thresholds is not None:
            threshold_B = torch.tensor(self.expert_thresholds, dtype=torch.float32, device=sequence_N.device)
            threshold_N = torch.nn.functional.pad(threshold_B.index_select(0, sequence_N), (0, idle))
        if self.log_sequences is not None:
            number_B = torch.tensor(self.log_sequences, dtype=torch.int64, device=sequence_N.device)
            log_sequence_N = number_B.index_select(0, sequence_N)
        return RowRouting(self, config.routed_layers, log_sequence_N, threshold_N)


@dataclass(frozen=True, slots=True, eq=False)
class RowRouting:
    """A control with everything in it spread over the rows of one call.

    layers: indices of the layers that have a router. log_sequence_N: numbers in the log of the rows' sequences; idle
    rows have none.
    """

    control: RoutingControl
    layers: tuple[int, ...]
    log_sequence_N: Tensor
    threshold_N: Tensor | None

    def select(self, rows_M: Tensor) -> "RowRouting":
        """The control of some of the rows, by index."""
        threshold_M = None if self.threshold_N is None else self.threshold_N.index_select(0, rows_M)
        return RowRouting(self.control, self.layers, self.log_sequence_N.index_select(0, rows_M), threshold_M)

    def of_layer(self, index: int) -> "LayerRouting | None":
        """The control of the layer at this index of the decoder; None if it has no router."""
        return LayerRouting(self, self.layers.index(index)) if index in self.layers else None


@dataclass(frozen=True, slots=True, eq=False)
class LayerRouting:
    """A control as one layer's router sees it; `layer` counts the layers that have one."""

    rows: RowRouting
    layer: int

    @property
    def threshold_N(self) -> Tensor | None:
        return self.rows.threshold_N

    @property
    def observe(self) -> Observer | None:
        """What wants to know the router's decisions, or None."""
        return None if self.rows.control.log is None else self._log

    def _log(self, expert_ids_NK: Tensor, entropy_N: Tensor) -> None:
        log, sequence_N = self.rows.control.log, self.rows.log_sequence_N
        assert log is not None
        log.add(self.layer, sequence_N, expert_ids_NK[: len(sequence_N)], entropy_N[: len(sequence_N)])
