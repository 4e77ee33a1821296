"""The mixture of experts on CUDA in bfloat16: grouped products of the library around our copies, sums and SwiGLU.

    y_n = sum_k weight_nk down_e(silu(gate_e x_n) up_e x_n),  e = ids_nk

Roundings to bfloat16: gate and up; the hidden row, once, after float32 SwiGLU; the expert's output; y, once, after the
float32 sum over choices. The weight multiplies output rows, in float32, in every phase.

Kept for the backward are x, and gate and up of every row; rows are copied again and SwiGLU computed again. The gradient
of the weight is taken from the hidden rows, <down^T dy, hidden>, so no output row is kept for it.

The library's grouped product gives a row the bits of the product of its expert alone, those of few rows
(`expert_products`) are the same, and every other step works row by row: training, prefill and decode are one
arithmetic. No shape depends on data and nothing waits for the device, so a CUDA graph can hold it. A dense layer's rows
have the bits that `kernels.product` gives them. The twin is `kernels.experts`.

N packed tokens, D model width, E experts, K experts a token, F expert width, R = N K rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from cispo.kernels.gpu.build import Build
from cispo.kernels.gpu.expert_products import are_few, few_rows_product, few_rows_swiglu
from cispo.kernels.gpu.expert_rows import gather_sum, sort_rows, spread
from cispo.kernels.gpu.route import route
from cispo.kernels.gpu.router import router_logits
from cispo.kernels.gpu.swiglu import swiglu, swiglu_gradient
from cispo.kernels.product import product
from cispo.kernels.routing import Observer, Routing, router_entropy

BUILDS: list[Build] = []
"""Its kernels are those of `expert_products`, `expert_rows`, `route`, `router` and `swiglu`."""

_ALIGNMENT = 8
"""The grouped product takes rows whose bytes are a multiple of 16."""


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


def _few_experts(x_ND: Tensor, ids_NK: Tensor, weight_NK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """`_Experts` without gradients, by the products for few rows."""
    row_NK, row_ends_E = sort_rows(ids_NK, gate_up_EFD.shape[0])
    hidden_RF = few_rows_swiglu(spread(x_ND, row_NK)[0], gate_up_EFD, row_ends_E)
    return gather_sum(few_rows_product(hidden_RF, down_EDF, row_ends_E), row_NK, weight_NK)


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
    weights = gate_up_EFD.contiguous(), down_EDF.contiguous()
    is_few = not torch.is_grad_enabled() and are_few(ids_NK.numel(), *weights)
    compute = _few_experts if is_few else _experts
    return compute(x_ND.contiguous(), ids_NK.contiguous(), weight_NK.contiguous(), *weights)


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
