"""The mixture of experts on CUDA in bfloat16: grouped products of the library around our copies, sums and SwiGLU.

    logits = x router^T;  ids, weight = route(logits);  rows = x in the order of their experts
    y_n = sum_k weight_nk down_e(silu(gate_e x_n) up_e x_n),  e = ids_nk

Roundings to bfloat16: gate and up; the hidden row, once, after float32 SwiGLU; the expert's output; y, once, after the
float32 sum over choices. The weight multiplies output rows, in float32, in every phase.

Kept for the backward are x, and gate and up of every row; rows are copied again and SwiGLU computed again. The gradient
of the weight is taken from the hidden rows, <down^T dy, hidden>, so no output row is kept for it.

The grouped product gives a row the bits of the product of its expert alone, and every other step works row by row:
training, prefill and decode are this code. No shape depends on data and nothing waits for the device, so a CUDA graph
can hold it. The twin is `kernels.experts`.

N packed tokens, D model width, E experts, K experts a token, F expert width, R = N K rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from cispo.kernels.gpu.expert_rows import gather_sum, sort_rows, spread, spread_weighted
from cispo.kernels.gpu.route import route
from cispo.kernels.gpu.router import router_logits
from cispo.kernels.gpu.swiglu import swiglu, swiglu_gradient
from cispo.kernels.product import product


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_NK: Tensor, ids_NK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        row_NK, row_ends_E = sort_rows(ids_NK, gate_up_EFD.shape[0])
        gate_up_RF = grouped_mm(spread(x_ND, row_NK), gate_up_EFD.transpose(1, 2), offs=row_ends_E)
        out_RD = grouped_mm(swiglu(gate_up_RF), down_EDF.transpose(1, 2), offs=row_ends_E)
        ctx.save_for_backward(x_ND, weight_NK, gate_up_EFD, down_EDF, row_NK, row_ends_E, gate_up_RF)
        return gather_sum(out_RD, row_NK, weight_NK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_NK, gate_up_EFD, down_EDF, row_NK, row_ends_E, gate_up_RF = ctx.saved_tensors
        dout_RD, weight_R = spread_weighted(gradients[0].contiguous(), row_NK, weight_NK)
        dhidden_RF = grouped_mm(dout_RD, down_EDF, offs=row_ends_E)
        dgate_up_RF, hidden_RF, dweight_R = swiglu_gradient(gate_up_RF, dhidden_RF, weight_R)
        ddown_EDF = grouped_mm(dout_RD.t(), hidden_RF, offs=row_ends_E)
        del dout_RD, hidden_RF, dhidden_RF
        dx_ND = gather_sum(grouped_mm(dgate_up_RF, gate_up_EFD, offs=row_ends_E), row_NK, None)
        dgate_up_EFD = grouped_mm(dgate_up_RF.t(), spread(x_ND, row_NK), offs=row_ends_E)
        dweight_NK = dweight_R[row_NK]
        return dx_ND, dweight_NK, None, dgate_up_EFD, ddown_EDF


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


def swiglu_experts(
    x_ND: Tensor, ids_NK: Tensor, weight_NK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    return _experts(x_ND.contiguous(), weight_NK.contiguous(), ids_NK.contiguous(), gate_up_EFD, down_EDF)


def expert_layer(
    x_ND: Tensor,
    router_ED: Tensor | None,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    experts_per_token: int,
    *,
    is_renormalised: bool = True,
) -> Tensor:
    if router_ED is None:
        return _dense(x_ND, gate_up_EFD[0], down_EDF[0])
    ids_NK, weight_NK = route(router_logits(x_ND, router_ED), experts_per_token, is_renormalised=is_renormalised)
    return swiglu_experts(x_ND, ids_NK, weight_NK, gate_up_EFD, down_EDF)
