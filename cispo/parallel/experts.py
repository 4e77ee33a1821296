"""Expert parallelism: each rank of a group holds some experts of a layer, and rows travel to their experts and back.

A rank routes its own tokens. One all-to-all takes a row of each choice to the rank of its expert, in order of experts;
another brings the outputs back, and the weighted sum is made at home in the order of choices. A row's products are
those of one process, and every sum has one order, so nothing depends on who is faster.

N packed tokens, D model width, E experts, K experts a token, S = N K choices in order of expert, R rows received.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cispo.errors import CispoError
from cispo.kernels.experts import Dispatch, combine, permute, route_rows, run_assigned
from cispo.kernels.routing import router_entropy
from cispo.model.decoder import Experts
from cispo.model.routing import LayerRouting
from cispo.parallel.ranks import Ranks


class _Exchange(torch.autograd.Function):
    """Rows to other ranks of the group, `sent` of them to each, and `received` from each; backward the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows_SD: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows_SD, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


_exchange: Callable[[Tensor, Sequence[int], Sequence[int], dist.ProcessGroup], Tensor] = _Exchange.apply


def _all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


class SharedExperts(Experts):
    """A layer's channel mixer of which this rank holds an equal share of the experts, and its group the others.

    CispoError unless the number of experts is a multiple of `expert_parallel`.
    """

    def __init__(self, whole: Experts, ranks: Ranks) -> None:
        # Not that of Experts, which would make all experts anew.
        nn.Module.__init__(self)
        count = whole.gate_up.shape[0]
        if count % ranks.expert_parallel:
            raise CispoError(f"{count} experts cannot be shared among {ranks.expert_parallel} ranks; choose a divisor")
        held = count // ranks.expert_parallel
        first = ranks.rank % ranks.expert_parallel * held
        self.experts_per_token, self.is_renormalised = whole.experts_per_token, whole.is_renormalised
        self.router = whole.router
        self.gate_up = _own(whole.gate_up, first, held)
        self.down = _own(whole.down, first, held)
        self._group = ranks.expert_group

    def forward(self, x_ND: Tensor, routing: LayerRouting | None = None) -> Tensor:
        group = self._group
        assert self.router is not None
        logits_NE, routed = route_rows(
            x_ND,
            self.router,
            self.experts_per_token,
            is_renormalised=self.is_renormalised,
            threshold_N=routing.threshold_N if routing else None,
            given_ids_NK=routing.given_ids_NK if routing else None,
        )
        observe = routing.observer(x_ND, self.router) if routing else None
        if observe is not None:
            observe(routed.kept_ids_NK, router_entropy(logits_NE))
        held = self.gate_up.shape[0]
        dispatch, expert_S = _by_expert(routed.expert_ids_NK)
        sent, received = _counts(expert_S, held, group)
        ids_R = _all_to_all(expert_S % held, sent, received, group)
        rows_RD = _exchange(permute(x_ND, dispatch), sent, received, group)
        out_RD = _run(rows_RD, ids_R, self)
        return combine(_exchange(out_RD, received, sent, group), routed.weight_NK, dispatch)


def _counts(expert_S: Tensor, held: int, group: dist.ProcessGroup) -> tuple[list[int], list[int]]:
    """Rows that go to each rank of the group, and that come from each; the device is waited for once."""
    bounds = torch.searchsorted(expert_S, torch.arange(group.size() + 1, device=expert_S.device) * held)
    counts_2G = torch.empty(2, group.size(), dtype=torch.int64, device=expert_S.device)
    counts_2G[0] = bounds.diff()
    dist.all_to_all_single(counts_2G[1], counts_2G[0].clone(), group=group)
    sent, received = counts_2G.tolist()
    return sent, received


def _own(whole: nn.Parameter, first: int, count: int) -> nn.Parameter:
    return nn.Parameter(whole.detach()[first : first + count].clone(), requires_grad=whole.requires_grad)


def _by_expert(expert_ids_NK: Tensor) -> tuple[Dispatch, Tensor]:
    """Choices in order of expert, and the expert of each; those of one expert in order of token."""
    flat = expert_ids_NK.reshape(-1).long()
    expert_S, order_S = torch.sort(flat, stable=True)
    row_NK = torch.empty_like(order_S).index_copy_(0, order_S, torch.arange(len(flat), device=flat.device))
    token_S = torch.div(order_S, expert_ids_NK.shape[1], rounding_mode="floor")
    return Dispatch(row_NK.view(expert_ids_NK.shape), token_S, order_S), expert_S


def _run(rows_RD: Tensor, ids_R: Tensor, experts: Experts) -> Tensor:
    """The rows through the experts here. A row of zeros goes with them, so that a rank that nobody sent a row to has
    gradients too: all ranks must reduce the same ones.
    """
    rows_RD = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])])
    ids_R = torch.cat([ids_R, ids_R.new_zeros(1)])
    return run_assigned(rows_RD, ids_R, experts.gate_up, experts.down)[:-1]
