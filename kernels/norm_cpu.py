"""The norms on CPU in float32: one call forward, one backward; any width.

The backward passes read the inputs again: nothing is saved but them. A weight's gradient is the sum of the shares of
blocks of 64 rows, in order, so threads change no bit of it.

N rows, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cispo.kernels.cpu_library import CpuFunction

_residual_norm = CpuFunction("residual_norm", "ppffpfppnit")
_residual_norm_gradient = CpuFunction("residual_norm_gradient", "pppffpfpppiii")
_gated_norm = CpuFunction("gated_norm", "ppipfpnit")
_gated_norm_gradient = CpuFunction("gated_norm_gradient", "pppipfppipiii")


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _normed(
    x_ND: Tensor, mixed_ND: Tensor | None, alpha: float, beta: float, weight_D: Tensor, epsilon: float
) -> Tensor:
    rows, width = x_ND.shape
    out_ND, threads = torch.empty_like(x_ND), torch.get_num_threads()
    _residual_norm(x_ND, mixed_ND, alpha, beta, weight_D, epsilon, None, out_ND, rows, width, threads)
    return out_ND


def sum_and_norm(x_ND: Tensor, mixed_ND: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + mixed and its RMSNorm, float32 [N, D] each. Not differentiable."""
    x_ND, mixed_ND, weight_D = _contiguous(x_ND), _contiguous(mixed_ND), _contiguous(weight_D)
    total_ND, out_ND = torch.empty_like(x_ND), torch.empty_like(x_ND)
    inputs, sizes = (x_ND, mixed_ND, 1.0, 1.0, weight_D, epsilon), x_ND.shape
    _residual_norm(*inputs, total_ND, out_ND, *sizes, torch.get_num_threads())
    return total_ND, out_ND


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, mixed_ND: Tensor | None, alpha: float, beta: float, weight_D: Tensor, epsilon: float
    ) -> Tensor:
        ctx.save_for_backward(x_ND, mixed_ND, weight_D)
        ctx.constants = (alpha, beta, epsilon)
        return _normed(x_ND, mixed_ND, alpha, beta, weight_D, epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, mixed_ND, weight_D = ctx.saved_tensors
        alpha, beta, epsilon = ctx.constants
        dout_ND = _contiguous(gradients[0])
        dx_ND, dweight_D = torch.empty_like(x_ND), torch.empty_like(weight_D)
        dmixed_ND = None if mixed_ND is None else torch.empty_like(x_ND)
        inputs = (x_ND, mixed_ND, alpha, beta, weight_D, epsilon)
        outputs = (dx_ND, dmixed_ND, dweight_D)
        _residual_norm_gradient(dout_ND, *inputs, *outputs, *x_ND.shape, torch.get_num_threads())
        return dx_ND, dmixed_ND, None, None, dweight_D, None


_differentiable_norm: Callable[[Tensor, Tensor | None, float, float, Tensor, float], Tensor] = _ResidualNorm.apply


def residual_norm(
    x_ND: Tensor, mixed_ND: Tensor | None, alpha: float, beta: float, weight_D: Tensor, epsilon: float
) -> Tensor:
    """RMSNorm of alpha x + beta mixed, or of x where there is no mixed; float32 [N, D]."""
    x_ND, weight_D = _contiguous(x_ND), _contiguous(weight_D)
    mixed_ND = None if mixed_ND is None else _contiguous(mixed_ND)
    compute = _differentiable_norm if torch.is_grad_enabled() else _normed
    return compute(x_ND, mixed_ND, alpha, beta, weight_D, epsilon)


def _gated(x_ND: Tensor, gate_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    rows, width = x_ND.shape
    out_ND = torch.empty_like(x_ND)
    _gated_norm(x_ND, gate_ND, gate_ND.stride(0), weight_D, epsilon, out_ND, rows, width, torch.get_num_threads())
    return out_ND


def gated_norm_gradient(
    dout_ND: Tensor, x_ND: Tensor, gate_ND: Tensor, weight_D: Tensor, epsilon: float, dgate_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to x [N, D] and weight [D]; the one to the gate goes to dgate_ND.

    gate_ND and dgate_ND: only their columns need to be contiguous. The rest: contiguous.
    """
    dx_ND, dweight_D = torch.empty_like(x_ND), torch.empty_like(weight_D)
    inputs = (dout_ND, x_ND, gate_ND, gate_ND.stride(0), weight_D, epsilon)
    outputs = (dx_ND, dgate_ND, dgate_ND.stride(0), dweight_D)
    _gated_norm_gradient(*inputs, *outputs, *x_ND.shape, torch.get_num_threads())
    return dx_ND, dweight_D


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x_ND, gate_ND, weight_D)
        ctx.epsilon = epsilon
        return _gated(x_ND, gate_ND, weight_D, epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_ND, weight_D = ctx.saved_tensors
        dgate_ND = torch.empty_like(x_ND)
        dout_ND = _contiguous(gradients[0])
        dx_ND, dweight_D = gated_norm_gradient(dout_ND, x_ND, gate_ND, weight_D, ctx.epsilon, dgate_ND)
        return dx_ND, dgate_ND, dweight_D, None


_differentiable_gated_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = _GatedNorm.apply


def gated_norm(x_ND: Tensor, gate_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """sigmoid(gate) times the RMSNorm of x; float32 [N, D]. The gate may be some columns of a wider matrix."""
    x_ND, weight_D = _contiguous(x_ND), _contiguous(weight_D)
    gate_ND = gate_ND if gate_ND.stride(1) == 1 else gate_ND.contiguous()
    compute = _differentiable_gated_norm if torch.is_grad_enabled() else _gated
    return compute(x_ND, gate_ND, weight_D, epsilon)
