"""Top-k mixture of SwiGLU experts over packed tokens, dropless.

float32 on CPU and bfloat16 on CUDA have kernels of their own (`kernels.experts_cpu`, `kernels.gpu.experts`); this is
the plain-PyTorch form, around `grouped_mm`.
Tokens are copied into one buffer in the order of their experts, each expert's rows padded to a multiple of 4 so that
the product gives a row the same bits whatever rows lie beside it; padded rows repeat a real token and are never read.
Both copies are gathers in the backward too, so gradients add up in one order.

N packed tokens, D model width, E experts, K experts a token, F expert width, R rows of the padded buffer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cispo.kernels import experts_cpu
from cispo.kernels.pointwise import silu
from cispo.kernels.routing import Observer, Routing, route, router_entropy, router_logits

ROW_MULTIPLE = 4

_DENSE_MAX_ROWS = 64
"""Up to here running every expert on every row is faster than sorting rows by expert."""


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """row_NK: buffer row of each (token, choice). token_R: token of each row; slot_R: its (token, choice), or -1."""

    row_NK: Tensor
    token_R: Tensor
    slot_R: Tensor


def _dispatch(expert_ids_NK: Tensor, experts: int) -> tuple[Dispatch, Tensor]:
    """Rows by expert, padded, and the int32 ends of each expert's rows in the buffer."""
    tokens, k = expert_ids_NK.shape
    flat = expert_ids_NK.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    count_E = torch.bincount(flat, minlength=experts)
    padded_E = (count_E + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    row_ends_E = torch.cumsum(padded_E, 0)
    shift_E = (row_ends_E - padded_E) - (torch.cumsum(count_E, 0) - count_E)
    sorted_experts = flat.index_select(0, order)
    rows_sorted = torch.arange(tokens * k, device=flat.device) + shift_E.index_select(0, sorted_experts)
    capacity = _buffer_rows(tokens * k, experts)
    slot_R = flat.new_full((capacity,), -1).index_copy_(0, rows_sorted, order)
    row_NK = torch.empty_like(flat).index_copy_(0, order, rows_sorted)
    token_R = torch.div(slot_R, k, rounding_mode="floor").clamp_(min=0)
    row_ends_E[-1] = capacity
    return Dispatch(row_NK.view(tokens, k), token_R, slot_R), row_ends_E.to(torch.int32)


def _buffer_rows(choices: int, experts: int) -> int:
    """Rows that always suffice, known without reading the counts back; the last expert takes the spare ones."""
    return -(-(choices + experts * (ROW_MULTIPLE - 1)) // ROW_MULTIPLE) * ROW_MULTIPLE


class _Permute(torch.autograd.Function):
    """x [N, D] into the buffer [R, D]."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x_ND.index_select(0, dispatch.token_R)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        row_NK = ctx.dispatch.row_NK
        return gradients[0].index_select(0, row_NK.reshape(-1)).view(*row_NK.shape, -1).sum(1), None


class _Combine(torch.autograd.Function):
    """Weighted sum of each token's K rows, in float32: buffer [R, D], weights [N, K] to [N, D]."""

    @staticmethod
    def forward(ctx: Any, out_RD: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
        rows_NKD = out_RD.index_select(0, dispatch.row_NK.reshape(-1)).view(*dispatch.row_NK.shape, -1)
        ctx.dispatch = dispatch
        ctx.save_for_backward(rows_NKD, weight_NK)
        return _weighted_sum(rows_NKD, weight_NK).to(out_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows_NKD, weight_NK = ctx.saved_tensors
        dispatch: Dispatch = ctx.dispatch
        dout_ND = gradients[0]
        weight_R = weight_NK.reshape(-1).index_select(0, dispatch.slot_R.clamp(min=0)) * (dispatch.slot_R >= 0)
        drows_RD = dout_ND.index_select(0, dispatch.token_R) * weight_R.unsqueeze(1).to(dout_ND.dtype)
        dweight_NK = (rows_NKD.float() * dout_ND.float().unsqueeze(1)).sum(-1)
        return drows_RD, dweight_NK, None


permute: Callable[[Tensor, Dispatch], Tensor] = _Permute.apply
"""x [N, D] into the buffer [R, D]; differentiable, with sums in one order."""

combine: Callable[[Tensor, Tensor, Dispatch], Tensor] = _Combine.apply
"""Weighted sum of each token's K rows, in float32: buffer [R, D], weights [N, K] to [N, D]; differentiable."""


def _weighted_sum(rows_NKD: Tensor, weight_NK: Tensor) -> Tensor:
    total_ND = rows_NKD[:, 0].float() * weight_NK[:, 0, None]
    for choice in range(1, rows_NKD.shape[1]):
        total_ND = total_ND + rows_NKD[:, choice].float() * weight_NK[:, choice, None]
    return total_ND


def grouped_product(x_RK: Tensor, weight_ENK: Tensor, row_ends_E: Tensor) -> Tensor:
    """Rows of expert e times weight_ENK[e]^T; [R, N]. row_ends_E: int32 ends of each expert's rows, the last one R."""
    if x_RK.is_cuda and x_RK.dtype is not torch.bfloat16:
        ends = row_ends_E.tolist()
        starts = [0, *ends[:-1]]
        parts = [x_RK[a:b] @ w.t() for a, b, w in zip(starts, ends, weight_ENK.unbind(0), strict=True)]
        return torch.cat(parts)
    return torch.nn.functional.grouped_mm(x_RK, weight_ENK.transpose(1, 2), offs=row_ends_E)


def swiglu_experts(x_ND: Tensor, routing: Routing, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """y = sum_k w_k down_e(silu(gate_e x) * up_e x) over the chosen experts e; [N, D] in x's dtype.

    gate_up_EFD: [E, 2F, D], gate rows first, then up rows. down_EDF: [E, D, F].
    """
    dispatch, row_ends_E = _dispatch(routing.expert_ids_NK, gate_up_EFD.shape[0])
    buffer_RD = permute(x_ND, dispatch)
    gate_RF, up_RF = grouped_product(buffer_RD, gate_up_EFD, row_ends_E).chunk(2, dim=-1)
    hidden_RF = silu(gate_RF) * up_RF
    out_RD = grouped_product(hidden_RF, down_EDF, row_ends_E)
    return combine(out_RD, routing.weight_NK, dispatch)


def swiglu_experts_dense(x_ND: Tensor, routing: Routing, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """The same sum with every expert run on every token: less bookkeeping, so faster for the few rows of a decode step.

    Inference only. A row's products are those of `swiglu_experts`, so the result has the same bits.
    """
    experts = gate_up_EFD.shape[0]
    x_END = x_ND.unsqueeze(0).expand(experts, *x_ND.shape)
    gate_ENF, up_ENF = torch.bmm(x_END, gate_up_EFD.transpose(1, 2)).chunk(2, dim=-1)
    out_END = torch.bmm(silu(gate_ENF) * up_ENF, down_EDF.transpose(1, 2))
    token_N1 = torch.arange(x_ND.shape[0], device=x_ND.device).unsqueeze(1)
    rows_NKD = out_END[routing.expert_ids_NK, token_N1]
    return _weighted_sum(rows_NKD, routing.weight_NK).to(x_ND.dtype)


def _is_bfloat16_on_cuda(*tensors: Tensor) -> bool:
    return all(tensor.is_cuda and tensor.dtype is torch.bfloat16 for tensor in tensors)


def expert_layer(
    x_ND: Tensor,
    router_ED: Tensor | None,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    experts_per_token: int,
    *,
    is_renormalised: bool = True,
    threshold_N: Tensor | None = None,
    given_ids_NK: Tensor | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Route each token by x router^T in float32 (`route`), and run its experts (`swiglu_experts`); [N, D] in x's dtype.

    router_ED: None where there is one expert, which takes every token with weight 1. threshold_N (float32, [0, 1)) and
    given_ids_NK (integers below E): as in `route`; ValueError for ids that are no experts. observe: called once with
    what was decided. Differentiable in all weights and x. The number of rows never changes a row's bits on CPU.
    """
    if _is_bfloat16_on_cuda(x_ND, gate_up_EFD, down_EDF):
        from cispo.kernels.gpu import experts as experts_gpu  # Triton is not for those who need none

        return experts_gpu.expert_layer(
            x_ND,
            router_ED,
            gate_up_EFD,
            down_EDF,
            experts_per_token,
            is_renormalised=is_renormalised,
            threshold_N=threshold_N,
            given_ids_NK=given_ids_NK,
            observe=observe,
        )
    if router_ED is None:
        router_ED = experts_cpu.lone_router(x_ND.shape[1], x_ND.device)
    if is_renormalised and experts_cpu.serves(x_ND, router_ED, gate_up_EFD, down_EDF):
        operands = x_ND, router_ED, gate_up_EFD, down_EDF
        return experts_cpu.expert_layer(*operands, experts_per_token, threshold_N, given_ids_NK, observe)
    logits_NE, routing = route_rows(
        x_ND,
        router_ED,
        experts_per_token,
        is_renormalised=is_renormalised,
        threshold_N=threshold_N,
        given_ids_NK=given_ids_NK,
    )
    if observe is not None:
        observe(routing.kept_ids_NK, router_entropy(logits_NE))
    if x_ND.is_cuda and x_ND.shape[0] <= _DENSE_MAX_ROWS and not torch.is_grad_enabled():
        return swiglu_experts_dense(x_ND, routing, gate_up_EFD, down_EDF)
    return swiglu_experts(x_ND, routing, gate_up_EFD, down_EDF)


def route_rows(
    x_ND: Tensor,
    router_ED: Tensor,
    experts_per_token: int,
    *,
    is_renormalised: bool,
    threshold_N: Tensor | None = None,
    given_ids_NK: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """The first half of `expert_layer`, for experts that are elsewhere: float32 logits [N, E] and what they decide."""
    if x_ND.is_cuda and x_ND.dtype is torch.bfloat16:
        from cispo.kernels.gpu import route as gpu_route  # Triton is not for those who need none
        from cispo.kernels.gpu import router as gpu_router

        logits_NE = gpu_router.router_logits(x_ND, router_ED.float())
        return logits_NE, Routing(
            *gpu_route.route(logits_NE, experts_per_token, is_renormalised, threshold_N, given_ids_NK)
        )
    logits_NE = router_logits(x_ND, router_ED)
    return logits_NE, route(
        logits_NE,
        experts_per_token,
        is_renormalised=is_renormalised,
        threshold_N=threshold_N,
        given_ids_NK=given_ids_NK,
    )


def run_assigned(x_RD: Tensor, expert_R: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """The second half: each row through one expert, whose number (int64, below E) it came with; [R, D]."""
    ids_R1 = expert_R.unsqueeze(1)
    if _is_bfloat16_on_cuda(x_RD, gate_up_EFD, down_EDF):
        from cispo.kernels.gpu import experts as experts_gpu

        return experts_gpu.swiglu_experts(x_RD, ids_R1, _ones(ids_R1), gate_up_EFD, down_EDF)
    router_ED = x_RD.new_zeros(gate_up_EFD.shape[0], x_RD.shape[1])
    if experts_cpu.serves(x_RD, router_ED, gate_up_EFD, down_EDF):
        return experts_cpu.expert_layer(x_RD, router_ED, gate_up_EFD, down_EDF, 1, given_ids_NK=ids_R1)
    return swiglu_experts(x_RD, Routing(ids_R1, _ones(ids_R1)), gate_up_EFD, down_EDF)


def _ones(ids_NK: Tensor) -> Tensor:
    return torch.ones_like(ids_NK, dtype=torch.float32)
