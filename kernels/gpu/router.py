"""The router on CUDA: logits of a float32 matrix on bfloat16 matrix units.

A float32 number is the sum of three bfloat16 numbers to its last bit, and a product of two bfloat16 numbers is exact in
float32. So x in bfloat16 times the router's three parts is the float32 product at three times the cost of a bfloat16
one, but for the low bits that the units cut in their sums: 7e-6 of the logits at D = 2048. Every row is summed in one
order whatever rows come with it: the inner dimension in tiles from first to last, in each the smallest part first.

The twin is the product in `kernels.experts`. N packed tokens, D model width, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build

SPAN_ROWS = 1024
"""The router's gradient is summed over spans of so many rows, and then over the spans, in order."""


@triton.jit
def _parts(value, dtype: tl.constexpr):
    """float32 as three numbers of a 16-bit dtype, largest first; their sum is the value."""
    first = value.to(dtype)
    rest = value - first.to(tl.float32)
    second = rest.to(dtype)
    return first, second, (rest - second.to(tl.float32)).to(dtype)


@triton.jit
def _add_product(a, b, total):
    """total + a b for a of 16 bits (or float32, in tests) and b float32, exact in every product."""
    if a.dtype == tl.float32:
        total = tl.dot(a, b, total, input_precision="ieee")
    else:
        first, second, third = _parts(b, a.dtype)
        total = tl.dot(a, third, total)
        total = tl.dot(a, second, total)
        total = tl.dot(a, first, total)
    return total


@triton.jit
def _logits_kernel(x, router, logits, N, D, E, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    column = tl.arange(0, BLOCK_D)
    x_tile = x + row.to(tl.int64)[:, None] * D + column[None, :]
    router_tile = router + expert[None, :] * D + column[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for start in range(0, D, BLOCK_D):
        is_inside = column < D - start
        x_ND = tl.load(x_tile + start, mask=(row < N)[:, None] & is_inside[None, :], other=0.0)
        router_DE = tl.load(router_tile + start, mask=(expert < E)[None, :] & is_inside[:, None], other=0.0)
        total = _add_product(x_ND, router_DE, total)
    out = logits + row.to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(out, total, mask=(row < N)[:, None] & (expert < E)[None, :])


@triton.jit
def _input_gradient_kernel(
    dlogits, router, dx, N, D, E, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """dx = dlogits router. Both are split; what the third parts would add is below half a bit of a bfloat16 dx."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, E, BLOCK_E):
        expert = start + tl.arange(0, BLOCK_E)
        is_expert = expert < E
        gradient = dlogits + row.to(tl.int64)[:, None] * E + expert[None, :]
        gradient_NE = tl.load(gradient, mask=(row < N)[:, None] & is_expert[None, :], other=0.0)
        router_tile = router + expert[:, None] * D + column[None, :]
        router_ED = tl.load(router_tile, mask=is_expert[:, None] & (column < D)[None, :], other=0.0)
        if dx.dtype.element_ty == tl.float32:
            total = tl.dot(gradient_NE, router_ED, total, input_precision="ieee")
        else:
            gradient_1, gradient_2, _ = _parts(gradient_NE, dx.dtype.element_ty)
            router_1, router_2, _ = _parts(router_ED, dx.dtype.element_ty)
            total = tl.dot(gradient_2, router_1, total)
            total = tl.dot(gradient_1, router_2, total)
            total = tl.dot(gradient_1, router_1, total)
    out = dx + row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out, total.to(dx.dtype.element_ty), mask=(row < N)[:, None] & (column < D)[None, :])


@triton.jit
def _weight_gradient_kernel(
    x,
    dlogits,
    drouter,
    N,
    D,
    E,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """drouter [spans, E, D]: x^T dlogits over the rows of each span."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    span = tl.program_id(2)
    total = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    for start in range(0, SPAN, BLOCK_N):
        row = span * SPAN + start + tl.arange(0, BLOCK_N)
        is_row = row < N
        x_tile = x + row.to(tl.int64)[:, None] * D + column[None, :]
        x_ND = tl.load(x_tile, mask=is_row[:, None] & (column < D)[None, :], other=0.0)
        gradient = dlogits + row.to(tl.int64)[:, None] * E + expert[None, :]
        gradient_NE = tl.load(gradient, mask=is_row[:, None] & (expert < E)[None, :], other=0.0)
        total = _add_product(tl.trans(x_ND), gradient_NE, total)
    out = drouter + span.to(tl.int64) * E * D + expert[None, :] * D + column[:, None]
    tl.store(out, total, mask=(column < D)[:, None] & (expert < E)[None, :])


_POINTERS = {"x": "*bf16", "dx": "*bf16"} | dict.fromkeys(("router", "logits", "dlogits", "drouter"), "*fp32")
_TYPES = _POINTERS | dict.fromkeys(("N", "D", "E"), "i32")
_EXPERT_BLOCKS = (16, 32, 64, 128)


def _builds(block_e: int) -> dict[str, Build]:
    """The three products, over block_e experts at a time."""
    # Few tokens are a walk over D by one program: long steps, many of them on the way.
    depth, stages = (128, 4) if block_e <= 16 else (64, 3)
    narrow, span = {"BLOCK_N": 64, "BLOCK_E": min(block_e, 32), "BLOCK_D": 128}, {"SPAN": SPAN_ROWS, "BLOCK_N": 64}
    settings = {
        "logits": (_logits_kernel, {"BLOCK_N": 64, "BLOCK_E": block_e, "BLOCK_D": depth}, stages),
        "input_gradient": (_input_gradient_kernel, narrow, 2),
        "weight_gradient": (_weight_gradient_kernel, span | {"BLOCK_E": block_e, "BLOCK_D": 64}, 3),
    }
    warps = 8 if block_e == 128 else 4
    return {
        name: Build(f"router_{name}_{block_e}", kernel, _TYPES, constants, warps, stages, True, ("D",))
        for name, (kernel, constants, stages) in settings.items()
    }


_BUILDS = {block_e: _builds(block_e) for block_e in _EXPERT_BLOCKS}
BUILDS: list[Build] = [build for builds in _BUILDS.values() for build in builds.values()]


def _launch(name: str, tensors: tuple[Tensor, Tensor, Tensor], tokens: int, width: int, experts: int) -> None:
    block_e = next((block for block in _EXPERT_BLOCKS if block >= experts), _EXPERT_BLOCKS[-1])
    build = _BUILDS[block_e][name]
    blocks_n = triton.cdiv(tokens, build.constants["BLOCK_N"])
    blocks_d = triton.cdiv(width, build.constants["BLOCK_D"])
    blocks_e = triton.cdiv(experts, build.constants["BLOCK_E"])
    grids = {
        "logits": (blocks_n, blocks_e),
        "input_gradient": (blocks_n, blocks_d),
        "weight_gradient": (blocks_d, blocks_e, triton.cdiv(tokens, SPAN_ROWS)),
    }
    build.launch(grids[name], *tensors, tokens, width, experts)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, router_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, router_ED)
        sizes = (*x_ND.shape, router_ED.shape[0])
        logits_NE = router_ED.new_empty(x_ND.shape[0], router_ED.shape[0])
        _launch("logits", (x_ND, router_ED, logits_NE), *sizes)
        return logits_NE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, router_ED = ctx.saved_tensors
        dlogits_NE = gradients[0].contiguous()
        sizes = (*x_ND.shape, router_ED.shape[0])
        dx_ND = drouter_ED = None
        if ctx.needs_input_grad[0]:
            dx_ND = torch.empty_like(x_ND)
            _launch("input_gradient", (dlogits_NE, router_ED, dx_ND), *sizes)
        if ctx.needs_input_grad[1]:
            spans_SED = router_ED.new_empty(triton.cdiv(x_ND.shape[0], SPAN_ROWS), *router_ED.shape)
            _launch("weight_gradient", (x_ND, dlogits_NE, spans_SED), *sizes)
            drouter_ED = spans_SED.sum(0)
        return dx_ND, drouter_ED


_router_logits: Callable[[Tensor, Tensor], Tensor] = _RouterLogits.apply


def router_logits(x_ND: Tensor, router_ED: Tensor) -> Tensor:
    """x router^T in float32 [N, E], for x in bfloat16 and a float32 router; differentiable in both."""
    return _router_logits(x_ND.contiguous(), router_ED.contiguous())
