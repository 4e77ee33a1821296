"""The mixture of experts on CUDA in bfloat16: grouped products of the library around our copies, sums and SwiGLU.

    y_n = sum_k weight_nk down_e(silu(gate_e x_n) up_e x_n),  e = ids_nk

Roundings to bfloat16: gate and up; the hidden row, once, after float32 SwiGLU; the expert's output; y, once, after the
float32 sum over choices. The weight multiplies output rows, in float32, in every phase.

Kept for the backward are x, and gate and up of every row; rows are copied again and SwiGLU computed again. The gradient
of the weight is taken from the hidden rows, <down^T dy, hidden>, so no output row is kept for it.

The library's grouped product gives a row the bits of the product of its expert alone, and every other step works row by
row: training, prefill and decode are this code. No shape depends on data and nothing waits for the device, so a CUDA
graph can hold it. A dense layer's rows have the bits that `kernels.product` gives them. The twin is `kernels.experts`.

N packed tokens, D model width, E experts, K experts a token, F expert width, R = N K rows.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import grouped_mm

from cispo.kernels.gpu.build import Build
from cispo.kernels.gpu.expert_rows import gather_sum, sort_rows, spread
from cispo.kernels.gpu.route import route
from cispo.kernels.gpu.router import router_logits
from cispo.kernels.product import product
from cispo.kernels.routing import Observer, Routing, router_entropy

_ALIGNMENT = 8
"""The grouped product takes rows whose bytes are a multiple of 16."""


@triton.jit
def _swiglu_kernel(gate_up, hidden, R, F, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """silu(gate) up in float32, rounded once."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (row < R)[:, None] & (column < F)[None, :]
    gate_tile = gate_up + row[:, None] * (2 * F) + column[None, :]
    gate_RF = tl.load(gate_tile, mask=mask, other=0.0).to(tl.float32)
    up_RF = tl.load(gate_tile + F, mask=mask, other=0.0).to(tl.float32)
    hidden_RF = gate_RF / (1.0 + tl.exp(-gate_RF)) * up_RF
    tl.store(hidden + row[:, None] * F + column[None, :], hidden_RF.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_gradient_kernel(
    gate_up,
    dhidden,
    weight,
    dgate_up,
    hidden,
    dweight,
    R,
    F,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """From the gradient of unweighted hidden rows: that of gate and up, hidden rows times weight, and the weight's."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    is_row = row < R
    dweight_R = tl.zeros([BLOCK_R], tl.float32)
    if HAS_WEIGHT:
        weight_R = tl.load(weight + row, mask=is_row, other=0.0)
    for start in range(0, F, BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        mask = is_row[:, None] & (column < F)[None, :]
        wide, narrow = row[:, None] * (2 * F) + column[None, :], row[:, None] * F + column[None, :]
        gate_RF = tl.load(gate_up + wide, mask=mask, other=0.0).to(tl.float32)
        up_RF = tl.load(gate_up + wide + F, mask=mask, other=0.0).to(tl.float32)
        dhidden_RF = tl.load(dhidden + narrow, mask=mask, other=0.0).to(tl.float32)
        sigmoid_RF = 1.0 / (1.0 + tl.exp(-gate_RF))
        silu_RF = gate_RF * sigmoid_RF
        hidden_RF = silu_RF * up_RF
        if HAS_WEIGHT:
            dweight_R += tl.sum(dhidden_RF * hidden_RF, 1)
            hidden_RF *= weight_R[:, None]
            dhidden_RF *= weight_R[:, None]
        dgate_RF = dhidden_RF * up_RF * (sigmoid_RF + silu_RF * (1.0 - sigmoid_RF))
        dtype = hidden.dtype.element_ty
        tl.store(dgate_up + wide, dgate_RF.to(dtype), mask=mask)
        tl.store(dgate_up + wide + F, (dhidden_RF * silu_RF).to(dtype), mask=mask)
        tl.store(hidden + narrow, hidden_RF.to(dtype), mask=mask)
    if HAS_WEIGHT:
        tl.store(dweight + row, dweight_R, mask=is_row)


_BF16 = dict.fromkeys(("gate_up", "dhidden", "dgate_up", "hidden"), "*bf16")
_TYPES = _BF16 | {"weight": "*fp32", "dweight": "*fp32", "R": "i32", "F": "i32"}
_TILE = {"BLOCK_R": 4, "BLOCK_F": 512}
_SWIGLU = Build("expert_swiglu", _swiglu_kernel, _TYPES, _TILE, 4, 1, False, ("F",))


@cache
def _gradient_build(has_weight: bool) -> Build:
    constants = _TILE | {"HAS_WEIGHT": has_weight}
    name = f"expert_swiglu_gradient_{has_weight:d}"
    return Build(name, _swiglu_gradient_kernel, _TYPES, constants, 4, 1, False, ("F",))


BUILDS: list[Build] = [_SWIGLU, _gradient_build(False), _gradient_build(True)]


def swiglu(gate_up_RF: Tensor) -> Tensor:
    """silu(gate) up of [R, 2F], gate columns first; [R, F]."""
    rows, width = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    hidden_RF = gate_up_RF.new_empty(rows, width)
    grid = (triton.cdiv(rows, _TILE["BLOCK_R"]), triton.cdiv(width, _TILE["BLOCK_F"]))
    _SWIGLU.launch(grid, gate_up_RF, hidden_RF, rows, width)
    return hidden_RF


def swiglu_gradient(gate_up_RF: Tensor, dhidden_RF: Tensor, weight_R: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of gate_up [R, 2F], the hidden rows times weight [R, F], and the gradient of weight [R].

    dhidden_RF: the gradient of the hidden rows as if no weight followed. weight_R: None where there is none; its
    gradient is empty then.
    """
    rows, width = dhidden_RF.shape
    dgate_up_RF, hidden_RF = torch.empty_like(gate_up_RF), torch.empty_like(dhidden_RF)
    dweight_R = gate_up_RF.new_empty(0 if weight_R is None else rows, dtype=torch.float32)
    build, grid = _gradient_build(weight_R is not None), (triton.cdiv(rows, _TILE["BLOCK_R"]),)
    weight_R = dweight_R if weight_R is None else weight_R
    build.launch(grid, gate_up_RF, dhidden_RF, weight_R, dgate_up_RF, hidden_RF, dweight_R, rows, width)
    return dgate_up_RF, hidden_RF, dweight_R


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, ids_NK: Tensor, weight_NK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        row_NK, row_ends_E = sort_rows(ids_NK, gate_up_EFD.shape[0])
        rows_RD, _ = spread(x_ND, row_NK)
        gate_up_RF = grouped_mm(rows_RD, gate_up_EFD.transpose(1, 2), offs=row_ends_E)
        out_RD = grouped_mm(swiglu(gate_up_RF), down_EDF.transpose(1, 2), offs=row_ends_E)
        ctx.save_for_backward(x_ND, weight_NK, gate_up_EFD, down_EDF, row_NK, row_ends_E, gate_up_RF)
        return gather_sum(out_RD, row_NK, weight_NK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_NK, gate_up_EFD, down_EDF, row_NK, row_ends_E, gate_up_RF = ctx.saved_tensors
        dout_RD, weight_R = spread(gradients[0].contiguous(), row_NK, weight_NK)
        dhidden_RF = grouped_mm(dout_RD, down_EDF, offs=row_ends_E)
        dgate_up_RF, hidden_RF, dweight_R = swiglu_gradient(gate_up_RF, dhidden_RF, weight_R)
        ddown_EDF = grouped_mm(dout_RD.t(), hidden_RF, offs=row_ends_E)
        del dout_RD, hidden_RF, dhidden_RF
        dx_ND = gather_sum(grouped_mm(dgate_up_RF, gate_up_EFD, offs=row_ends_E), row_NK)
        dgate_up_EFD = grouped_mm(dgate_up_RF.t(), spread(x_ND, row_NK)[0], offs=row_ends_E)
        return dx_ND, None, dweight_R[row_NK], dgate_up_EFD, ddown_EDF


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_up_FD: Tensor, down_DF: Tensor) -> Tensor:
        gate_up_NF = product(x_ND, gate_up_FD)
        ctx.save_for_backward(x_ND, gate_up_FD, down_DF, gate_up_NF)
        return product(swiglu(gate_up_NF), down_DF)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_up_FD, down_DF, gate_up_NF = ctx.saved_tensors
        dout_ND = gradients[0].contiguous()
        dgate_up_NF, hidden_NF, _ = swiglu_gradient(gate_up_NF, dout_ND @ down_DF, None)
        return dgate_up_NF @ gate_up_FD, dgate_up_NF.t() @ x_ND, dout_ND.t() @ hidden_NF


_experts: Callable[..., Tensor] = _Experts.apply
_dense: Callable[[Tensor, Tensor, Tensor], Tensor] = _Dense.apply


def swiglu_experts(x_ND: Tensor, ids_NK: Tensor, weight_NK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """As `kernels.experts.swiglu_experts`, for given ids (int64) and weights (float32), [N, K] each; [N, D].

    ValueError where D or F is no multiple of 8.
    """
    _, width, inner = down_EDF.shape
    if width % _ALIGNMENT or inner % _ALIGNMENT:
        raise ValueError(
            f"experts on CUDA need a model width and an expert width that are multiples of {_ALIGNMENT}, "
            f"got {width} and {inner}; pad the weights with zeros"
        )
    return _experts(
        x_ND.contiguous(), ids_NK.contiguous(), weight_NK.contiguous(), gate_up_EFD.contiguous(), down_EDF.contiguous()
    )


def swiglu_dense(x_ND: Tensor, gate_up_FD: Tensor, down_DF: Tensor) -> Tensor:
    """One expert for every token: two products of the library and a SwiGLU between; [N, D]."""
    return _dense(x_ND.contiguous(), gate_up_FD, down_DF)


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
    """As `kernels.experts.expert_layer`, for x and experts in bfloat16; a given id that is no expert gives NaN.

    ValueError where D or F is no multiple of 8.
    """
    tokens = x_ND.shape[0]
    if router_ED is None:
        if observe is not None:
            observe(x_ND.new_zeros(tokens, 1, dtype=torch.int64), x_ND.new_zeros(tokens, dtype=torch.float32))
        return swiglu_dense(x_ND, gate_up_EFD[0], down_EDF[0])
    logits_NE = router_logits(x_ND, router_ED.float())
    routed = route(logits_NE, experts_per_token, is_renormalised, threshold_N, given_ids_NK)
    if observe is not None:
        observe(Routing(*routed).kept_ids_NK, router_entropy(logits_NE))
    return swiglu_experts(x_ND, *routed[:2], gate_up_EFD, down_EDF)
