"""The mixture of experts on CPU in float32: router, choice and experts in one call, and so their backward.

Experts of one token are added in order of their number, not of choice; otherwise this is `kernels.experts`. Sizes that
are not multiples of 16 lanes go to the plain form there.

N packed tokens, D model width, E experts, K experts a token, F expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.cpu_library import CpuFunction
from cispo.kernels.product import packed_weight

_LANES = 16
_PANEL = 32
_SPANS = 16

_experts = CpuFunction("experts", "ppppppppiiiiii")
_gradient = CpuFunction("experts_gradient", "pppppppppppppiiiiii")


def serves(x_ND: Tensor, router_ED: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> bool:
    """Whether the CPU kernel takes these operands; by dtype, device, D and F, never by the number of rows."""
    _, width, inner = down_EDF.shape
    return width % _LANES == 0 and inner % _LANES == 0 and cpu_library.serves(x_ND, router_ED, gate_up_EFD, down_EDF)


def _run(
    x_ND: Tensor,
    router_ED: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    experts_per_token: int,
    kept: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    experts, width, inner = down_EDF.shape
    y_ND = torch.empty_like(x_ND)
    _experts(
        x_ND,
        packed_weight(router_ED),
        packed_weight(gate_up_EFD, 2 * experts),
        packed_weight(down_EDF, experts),
        y_ND,
        *kept,
        x_ND.shape[0],
        width,
        inner,
        experts,
        experts_per_token,
        torch.get_num_threads(),
    )
    return y_ND


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, router_ED: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, experts_per_token: int
    ) -> Tensor:
        slots = (x_ND.shape[0], experts_per_token)
        ids_NK = torch.empty(slots, dtype=torch.int32)
        weight_NK = torch.empty(slots)
        gate_up_NKF = torch.empty(*slots, gate_up_EFD.shape[1])
        y_ND = _run(x_ND, router_ED, gate_up_EFD, down_EDF, experts_per_token, (ids_NK, weight_NK, gate_up_NKF))
        ctx.save_for_backward(x_ND, router_ED, gate_up_EFD, down_EDF, ids_NK, weight_NK, gate_up_NKF)
        return y_ND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, router_ED, gate_up_EFD, down_EDF, ids_NK, weight_NK, gate_up_NKF = ctx.saved_tensors
        experts, width, inner = down_EDF.shape
        inputs = (x_ND, router_ED, gate_up_EFD, down_EDF)
        outputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        sizes = (x_ND.shape[0], width, inner, experts, ids_NK.shape[1])
        scratch = torch.empty(_scratch_size(*sizes))
        dy_ND = gradients[0].contiguous()
        threads = torch.get_num_threads()
        _gradient(dy_ND, *inputs, ids_NK, weight_NK, gate_up_NKF, *outputs, scratch, *sizes, threads)
        return *outputs, None


def _scratch_size(tokens: int, width: int, inner: int, experts: int, experts_per_token: int) -> int:
    """Floats: packed weights, sums of weight gradients of every span, and a row and a value of every slot."""
    wide, long = -(-width // _PANEL) * _PANEL, -(-inner // _PANEL) * _PANEL
    packed = experts * 3 * wide * long
    sums = _SPANS * experts * width + (_SPANS + experts) * 3 * width * inner
    return packed + sums + tokens * experts_per_token * (width + 1)


_differentiable_experts: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] = _Experts.apply


def expert_layer(
    x_ND: Tensor, router_ED: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, experts_per_token: int
) -> Tensor:
    """As `kernels.experts.expert_layer`, for operands that this module serves."""
    x_ND, router_ED = x_ND.contiguous(), router_ED.contiguous()
    gate_up_EFD, down_EDF = gate_up_EFD.contiguous(), down_EDF.contiguous()
    if torch.is_grad_enabled():
        return _differentiable_experts(x_ND, router_ED, gate_up_EFD, down_EDF, experts_per_token)
    return _run(x_ND, router_ED, gate_up_EFD, down_EDF, experts_per_token, (None, None, None))
