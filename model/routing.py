"""What a caller may ask of a decoder's routers in one pass, and what it reads back: one object, `RoutingControl`.

Without one the routers do as they are trained to, and nothing is recorded.

N packed tokens, B sequences, L layers that have a router (in order), E experts, K experts a token, M rows asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cispo.kernels.routing import Observer
from cispo.model.config import ModelConfig
from cispo.model.router_sums import RouterSums


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


def expert_id_dtype(experts: int) -> torch.dtype:
    """The smallest that holds the number of an expert: ids of every token, layer and choice are kept and sent."""
    return torch.uint8 if experts <= 256 else torch.int16


class ExpertRecord:
    """The experts that each row of one call went to, for a later call to take again (`replayed_ids_NLK`).

    ValueError for a policy without routers.
    """

    def __init__(self, config: ModelConfig) -> None:
        if not config.routed_layers:
            raise ValueError("the policy has no router, so there are no experts to record; switch recording off")
        self._dtype = expert_id_dtype(config.experts)
        self._experts_per_token = config.experts_per_token
        self._ids: list[Tensor | None] = [None] * len(config.routed_layers)

    def add(self, layer: int, expert_ids_NK: Tensor) -> None:
        self._ids[layer] = expert_ids_NK.to(self._dtype)

    @property
    def ids_NLK(self) -> Tensor:
        """Ids by row, layer and choice, of the last call; uint8, or int16 for more than 256 experts."""
        return torch.stack([ids_NK for ids_NK in self._ids if ids_NK is not None], dim=1)

    def room(self, sequences: int, tokens: int) -> Tensor:
        """Zeros [sequences, tokens, L, K] on the CPU, to keep the ids of so many tokens in."""
        return torch.zeros(sequences, tokens, len(self._ids), self._experts_per_token, dtype=self._dtype)


@dataclass(frozen=True, slots=True, eq=False)
class RoutingControl:
    """What one `Decoder.forward` or `decode` does with its routers; an absent part costs nothing.

    expert_thresholds: of each sequence, in [0, 1). A token's expert whose share of the gate weight is below it is
    dropped, except for the heaviest; the others are renormalised. replayed_ids_NLK: in a packed forward, the experts
    that an earlier call recorded for the same tokens, taken in place of the routers' choice; their gate weights are the
    routers' as they are now. log, record, sums: filled with what the routers decide. log_sequences: the numbers in the
    log of this call's sequences; 0 .. B - 1 if None. ValueError for a threshold outside its range, and for thresholds
    with a record or sums, since a token that was spared an expert has none to take again or to count.
    """

    expert_thresholds: Sequence[float] | None = None
    replayed_ids_NLK: Tensor | None = None
    log: RoutingLog | None = None
    log_sequences: Sequence[int] | None = None
    record: ExpertRecord | None = None
    sums: RouterSums | None = None

    def __post_init__(self) -> None:
        wrong = [value for value in self.expert_thresholds or () if not 0 <= value < 1]
        if wrong:
            raise ValueError(f"expert_threshold must be in [0, 1), got {wrong[0]:g}; 0 drops nothing")
        if self.expert_thresholds is not None and self.sums is not None:
            raise ValueError("no sums can be kept where an expert_threshold drops experts; leave out one of the two")
        if self.expert_thresholds is not None and self.record is not None:
            raise ValueError("no record can be kept where an expert_threshold drops experts; leave out one of the two")

    @property
    def needs_every_row(self) -> bool:
        """Whether the last layer must run on rows that nobody asks for, too."""
        return self.record is not None or (self.sums is not None and self.sums.for_loss)

    def of_packed(self, config: ModelConfig, cu_seqlens: Tensor, device: torch.device) -> "RowRouting":
        """The control of packed tokens; cu_seqlens: [B + 1]."""
        lengths_B = cu_seqlens.diff().long()
        sequence_N = torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B)
        expected = len(sequence_N), len(config.routed_layers), config.experts_per_token
        if self.replayed_ids_NLK is not None and self.replayed_ids_NLK.shape != expected:
            raise ValueError(
                f"replayed expert ids have the shape {tuple(self.replayed_ids_NLK.shape)}, but the tokens, routers and "
                f"choices here are {expected}; they were recorded for other tokens or with another policy"
            )
        return self._of_rows(config, sequence_N.to(device))

    def of_step(self, config: ModelConfig, rows: int, active: int, device: torch.device) -> "RowRouting":
        """The control of a decode step with so many rows, one for each of the first `active` sequences; idle rows after
        those.
        """
        if self.replayed_ids_NLK is not None:
            raise ValueError("expert ids are replayed in a packed forward only, not in a decode step")
        return self._of_rows(config, torch.arange(active, device=device), idle=rows - active)

    def _of_rows(self, config: ModelConfig, sequence_N: Tensor, idle: int = 0) -> "RowRouting":
        threshold_N, log_sequence_N = None, sequence_N
        if self.expert_thresholds is not None:
            threshold_B = torch.tensor(self.expert_thresholds, dtype=torch.float32, device=sequence_N.device)
            threshold_N = torch.nn.functional.pad(threshold_B.index_select(0, sequence_N), (0, idle))
        if self.log_sequences is not None:
            number_B = torch.tensor(self.log_sequences, dtype=torch.int64, device=sequence_N.device)
            log_sequence_N = number_B.index_select(0, sequence_N)
        return RowRouting(self, config.routed_layers, log_sequence_N, threshold_N, self.replayed_ids_NLK)


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
    given_ids_NLK: Tensor | None

    def select(self, rows_M: Tensor) -> "RowRouting":
        """The control of some of the rows, by index."""
        threshold_M = None if self.threshold_N is None else self.threshold_N.index_select(0, rows_M)
        given_ids_MLK = None if self.given_ids_NLK is None else self.given_ids_NLK.index_select(0, rows_M)
        sequence_M = self.log_sequence_N.index_select(0, rows_M)
        return RowRouting(self.control, self.layers, sequence_M, threshold_M, given_ids_MLK)

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
    def given_ids_NK(self) -> Tensor | None:
        return None if self.rows.given_ids_NLK is None else self.rows.given_ids_NLK[:, self.layer]

    def observer(self, x_ND: Tensor, router_ED: Tensor) -> Observer | None:
        """What wants to know the decisions of this router on these rows, or None."""
        control = self.rows.control
        if control.log is None and control.record is None and control.sums is None:
            return None
        return partial(self._observe, x_ND, router_ED)

    def _observe(self, x_ND: Tensor, router_ED: Tensor, expert_ids_NK: Tensor, entropy_N: Tensor) -> None:
        control, sequence_N = self.rows.control, self.rows.log_sequence_N
        if control.log is not None:
            control.log.add(self.layer, sequence_N, expert_ids_NK[: len(sequence_N)], entropy_N[: len(sequence_N)])
        if control.record is not None:
            control.record.add(self.layer, expert_ids_NK)
        if control.sums is not None:
            rows = slice(len(sequence_N))
            is_replayed = self.rows.given_ids_NLK is not None
            control.sums.add(self.layer, x_ND[rows], router_ED, expert_ids_NK[rows], is_replayed=is_replayed)
