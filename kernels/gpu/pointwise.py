"""SwiGLU on CUDA: silu(gate) * up of the two halves of one buffer, one pass over memory each way.

float32 between load and store, rounded once. The backward pass reads the buffer again and saves nothing else.

R rows, F width of each half.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build


@triton.jit
def _swiglu_kernel(gate_up_R2F, out_RF, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_up = gate_up_R2F + row * width * 2 + at
    gate = tl.load(gate_up, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + width, mask=at < width, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_RF + row * width + at, out.to(out_RF.dtype.element_ty), mask=at < width)


@triton.jit
def _swiglu_gradient_kernel(dout_RF, gate_up_R2F, dgate_up_R2F, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_up = gate_up_R2F + row * width * 2 + at
    dgate_up = dgate_up_R2F + row * width * 2 + at
    gate = tl.load(gate_up, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + width, mask=at < width, other=0.0).to(tl.float32)
    dout = tl.load(dout_RF + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * share
    dgate = dout * up * (share + silu * (1.0 - share))
    tl.store(dgate_up, dgate.to(dgate_up_R2F.dtype.element_ty), mask=at < width)
    tl.store(dgate_up + width, (dout * silu).to(dgate_up_R2F.dtype.element_ty), mask=at < width)


def _build(name: str, kernel: Any, pointers: tuple[str, ...]) -> Build:
    return Build(
        name=name,
        kernel=kernel,
        types={**{pointer: "*bf16" for pointer in pointers}, "width": "i32"},
        constants={"BLOCK": 1024},
        num_warps=4,
        num_stages=1,
        has_products=False,
        aligned=("width",),
    )


_FORWARD = _build("swiglu", _swiglu_kernel, ("gate_up_R2F", "out_RF"))
_BACKWARD = _build("swiglu_gradient", _swiglu_gradient_kernel, ("dout_RF", "gate_up_R2F", "dgate_up_R2F"))
BUILDS = [_FORWARD, _BACKWARD]


def serves(gate_up_R2F: Tensor) -> bool:
    """Whether these kernels take the buffer: bfloat16 on CUDA."""
    return gate_up_R2F.is_cuda and gate_up_R2F.dtype is torch.bfloat16


def _launch(build: Build, *tensors: Tensor, rows: int, width: int) -> None:
    if rows and width:
        grid = (rows, triton.cdiv(width, build.constants["BLOCK"]))
        build.kernel[grid](*tensors, width, **build.constants, num_warps=build.num_warps, num_stages=build.num_stages)


def _swiglu(gate_up_R2F: Tensor) -> Tensor:
    rows, width = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    out_RF = gate_up_R2F.new_empty(rows, width)
    _launch(_FORWARD, gate_up_R2F, out_RF, rows=rows, width=width)
    return out_RF


def swiglu_gradient(dout_RF: Tensor, gate_up_R2F: Tensor) -> Tensor:
    """Gradient to the buffer [R, 2F]; both contiguous."""
    dgate_up_R2F = torch.empty_like(gate_up_R2F)
    rows, width = dout_RF.shape
    _launch(_BACKWARD, dout_RF, gate_up_R2F, dgate_up_R2F, rows=rows, width=width)
    return dgate_up_R2F


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_R2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_R2F)
        return _swiglu(gate_up_R2F)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up_R2F,) = ctx.saved_tensors
        return swiglu_gradient(gradients[0].contiguous(), gate_up_R2F)


_differentiable: Callable[[Tensor], Tensor] = _Swiglu.apply


def swiglu(gate_up_R2F: Tensor) -> Tensor:
    """silu(gate) * up of a buffer [R, 2F] whose rows are gate, then up; [R, F] in its dtype. Differentiable."""
    gate_up_R2F = gate_up_R2F.contiguous()
    return _differentiable(gate_up_R2F) if torch.is_grad_enabled() else _swiglu(gate_up_R2F)
