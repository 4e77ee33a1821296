"""The matrix product of every linear layer: a row's bits do not depend on how many rows come with it.

The CPU kernel gives that by construction: every element is one chain of multiply-adds in order of K. Libraries pick
another kernel for one to three rows; rows padded to a multiple of 4 avoid that on every processor measured, together
with the settings of cispo.model.arithmetic. On CUDA, bfloat16 products are those of cispo.kernels.gpu.product.

N rows, K inner dimension, M outputs.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.cpu_library import CpuFunction

ROW_MULTIPLE = 4
_PANEL = 32
_LANES = 16

_pack_weight = CpuFunction("pack_weight", "ppiiit")
_product = CpuFunction("product", "pippniit")
_input_gradient = CpuFunction("product_input_gradient", "pppiiii")
_weight_gradient = CpuFunction("product_weight_gradient", "ppipiiii")

_packed_weights: dict[tuple[int, int], tuple["weakref.ref[Tensor]", int, Tensor]] = {}


def packed_weight(weight: Tensor, matrices: int = 1) -> Tensor:
    """A contiguous weight in the CPU kernels' layout of panels, kept until the weight changes or goes.

    weight: [M, K], or of any shape [.., K] whose rows are `matrices` matrices one after the other, each packed by
    itself. A change is what PyTorch counts as one (`Tensor._version`). Fused optimisers do not count theirs: after one,
    call `torch.autograd.graph.increment_version`.
    """
    if weight.is_inference():
        return _pack(weight, matrices)
    key = (id(weight), matrices)
    if cpu_library.recording.recorder is not None:
        cpu_library.recording.recorder.add_weight(weight, matrices)
    kept, room = _packed_weights.get(key), None
    if kept is not None and kept[0]() is weight:
        if kept[1] == weight._version:
            return kept[2]
        # Into the same memory, which a recorded plan (cispo.kernels.cpu_plan) goes on reading.
        room = kept[2]
    with cpu_library.unrecorded():
        packed = _pack(weight, matrices, room)
    # Every object of its own identity: the entry goes with the weight, before another can have its id.
    reference = weakref.ref(weight, lambda _: _packed_weights.pop(key, None))
    _packed_weights[key] = (reference, weight._version, packed)
    return packed


def _pack(weight: Tensor, matrices: int, room: Tensor | None = None) -> Tensor:
    k = weight.shape[-1]
    m = weight.numel() // (matrices * k)
    packed = torch.empty(matrices * -(-m // _PANEL) * _PANEL * k) if room is None else room
    _pack_weight(weight, packed, matrices, m, k, torch.get_num_threads())
    return packed


def _cpu_product(x_NK: Tensor, weight_MK: Tensor) -> Tensor:
    rows, (outputs, inner) = x_NK.shape[0], weight_MK.shape
    out_NM = torch.empty(rows, outputs)
    _product(x_NK, x_NK.stride(0), packed_weight(weight_MK), out_NM, rows, inner, outputs, torch.get_num_threads())
    return out_NM


class _CpuProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor) -> Tensor:
        ctx.save_for_backward(x_NK, weight_MK)
        return _cpu_product(x_NK, weight_MK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NK, weight_MK = ctx.saved_tensors
        dout_NM = gradients[0].contiguous()
        rows, (outputs, inner) = x_NK.shape[0], weight_MK.shape
        dx_NK = dweight_MK = None
        threads = torch.get_num_threads()
        if ctx.needs_input_grad[0]:
            dx_NK = torch.empty(rows, inner)
            _input_gradient(dout_NM, weight_MK, dx_NK, rows, inner, outputs, threads)
        if ctx.needs_input_grad[1]:
            dweight_MK = torch.empty(outputs, inner)
            _weight_gradient(dout_NM, x_NK, x_NK.stride(0), dweight_MK, rows, inner, outputs, threads)
        return dx_NK, dweight_MK


_differentiable_product: Callable[[Tensor, Tensor], Tensor] = _CpuProduct.apply


def product(x_NK: Tensor, weight_MK: Tensor) -> Tensor:
    """x W^T for x [N, K] and W [M, K], both of one dtype; [N, M]. Differentiable in both."""
    if cpu_library.serves(x_NK, weight_MK) and x_NK.shape[1] % _LANES == 0:
        x_NK = x_NK if x_NK.stride(1) == 1 else x_NK.contiguous()
        weight_MK = weight_MK if weight_MK.is_contiguous() else weight_MK.contiguous()
        return _differentiable_product(x_NK, weight_MK) if torch.is_grad_enabled() else _cpu_product(x_NK, weight_MK)
    if x_NK.is_cuda:
        from cispo.kernels.gpu import product as gpu

        if gpu.serves(x_NK, weight_MK):
            return gpu.product(x_NK, weight_MK)
    rows = x_NK.shape[0]
    spare = -rows % ROW_MULTIPLE
    if spare:
        return (torch.nn.functional.pad(x_NK, (0, 0, 0, spare)) @ weight_MK.t())[:rows]
    return x_NK @ weight_MK.t()
