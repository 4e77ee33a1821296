"""SiLU and sigmoid that give an element the same bits wherever it lies and however many threads there are.

On CPU the library works through a range in vectors and finishes what is left over, at the end of every thread's share,
with a scalar exponential that rounds otherwise. Its `exp` has one way for all elements, and the rest of the formulas is
exact to the last bit in either way. CUDA has one way for everything.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _one_plus_exp(minus_x: Tensor) -> Tensor:
    """1 + exp(-x), of a negated copy that it may overwrite."""
    return minus_x.exp_().add_(1.0)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        x_float = x.float()
        return torch.div(x_float, _one_plus_exp(-x_float)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = torch.ops.aten.silu_backward(gradients[0], x)
        return out


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = _one_plus_exp(-x.float()).reciprocal_().to(x.dtype)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        gradient: Tensor = torch.ops.aten.sigmoid_backward(gradients[0], out)
        return gradient


_silu: Callable[[Tensor], Tensor] = _Silu.apply
_sigmoid: Callable[[Tensor], Tensor] = _Sigmoid.apply


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), computed in float32, in x's shape and dtype."""
    return F.silu(x) if x.is_cuda else _silu(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), computed in float32, in x's shape and dtype."""
    return torch.sigmoid(x) if x.is_cuda else _sigmoid(x)
