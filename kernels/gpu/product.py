"""x W^T on CUDA with a row's bits independent of the row count: the library's product where it gives that, else ours.

Ours walks K in order and never splits it, so neither the tile nor the rows beside a row matter to its bits. The library
(cuBLAS) gives the same bits for most shapes, and splits K for few rows of others; which, depends on its heuristics for
the shape. So a probe compares both at many row counts, once a shape, and the library is used from the least count on
from which all are equal. Few rows are bound by the weight's bytes, where ours takes about the library's time.

N rows, K inner dimension, M outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build

_PROBE_ROWS = tuple(sorted({*range(1, 257), *range(272, 1025, 16), *range(261, 1025, 29), *range(1088, 4097, 64)}))
"""The library splits at counts that nothing lies in wait for (at 100 rows of 6144 x 2048 and not at 64), so all small
ones are tried, and of the larger ones odd and even."""

_PROBE_BYTES = 1 << 29
"""No probe makes an output larger than this: an LM head is compared at fewer rows."""


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    x_NK, w_MK, out_NM, rows, outputs, inner, x_stride, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    """One tile [BN rows, BM outputs], K in order in one accumulator; programs that share weights are neighbours."""
    at_n = tl.program_id(0) * BN + tl.arange(0, BN)
    at_m = tl.program_id(1) * BM + tl.arange(0, BM)
    at_k = tl.arange(0, BK)
    # Rows beyond the last are not read: copies of another in their place would all come from the same few lines of L2.
    x_tile = x_NK + at_n.to(tl.int64)[:, None] * x_stride + at_k[None, :]
    w_tile = w_MK + (at_m % outputs).to(tl.int64)[None, :] * inner + at_k[:, None]
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for start in range(0, inner, BK):
        x = tl.load(x_tile, mask=(at_n[:, None] < rows) & (at_k[None, :] < inner - start), other=0.0)
        w = tl.load(w_tile, mask=at_k[:, None] < inner - start, other=0.0)
        total = tl.dot(x, w, total)
        x_tile += BK
        w_tile += BK
    inside = (at_n[:, None] < rows) & (at_m[None, :] < outputs)
    out = out_NM + at_n.to(tl.int64)[:, None] * outputs + at_m[None, :]
    tl.store(out, total.to(out_NM.dtype.element_ty), mask=inside)


def _build(name: str, bn: int, bm: int, bk: int, warps: int, stages: int, out: str) -> Build:
    return Build(
        name=f"product_{name}_{out}",
        kernel=_product_kernel,
        types={
            "x_NK": "*bf16", "w_MK": "*bf16", "out_NM": f"*{out}",
            "rows": "i32", "outputs": "i32", "inner": "i32", "x_stride": "i32",
        },
        constants={"BN": bn, "BM": bm, "BK": bk},
        num_warps=warps,
        num_stages=stages,
        has_products=bn >= 64,
        aligned=("outputs", "inner", "x_stride"),
    )  # fmt: skip


_TILES = {
    (16, 0): (16, 16, 256, 2, 3),
    (64, 0): (64, 16, 128, 4, 5),
    (64, 4096): (64, 64, 128, 4, 5),
    (128, 0): (128, 64, 64, 4, 6),
    (1 << 31, 0): (128, 128, 64, 8, 4),
}
"""Most rows and least outputs: rows, outputs and K of a tile, warps, stages. The last that fits of the fewest rows."""

_FLOAT32_TILES = {**_TILES, (1 << 31, 0): (128, 256, 64, 8, 3)}
"""For float32 results: Triton 3.6's assembler serialises the other large tile with them, and this one with bfloat16."""

_BUILDS = {
    (fits, out): _build("x".join(map(str, tile[:3])), *tile, out)
    for out, tiles in (("bf16", _TILES), ("fp32", _FLOAT32_TILES))
    for fits, tile in tiles.items()
}
BUILDS = list(_BUILDS.values())

_library_least_rows: dict[tuple[Any, ...], int | None] = {}


def kernel_product(x_NK: Tensor, weight_MK: Tensor, out_NM: Tensor) -> None:
    """x W^T by our kernel. x: columns contiguous. weight, out: contiguous."""
    (rows, inner), outputs = x_NK.shape, weight_MK.shape[0]
    if rows:
        most = next(most for most, _ in _TILES if rows <= most)
        least = max(least for row_limit, least in _TILES if row_limit == most and outputs >= least)
        build = _BUILDS[(most, least), "fp32" if out_NM.dtype is torch.float32 else "bf16"]
        grid = (triton.cdiv(rows, build.constants["BN"]), triton.cdiv(outputs, build.constants["BM"]))
        _product_kernel[grid](
            x_NK, weight_MK, out_NM, rows, outputs, inner, x_NK.stride(0), **build.constants,
            num_warps=build.num_warps, num_stages=build.num_stages,
        )  # fmt: skip


def library_product(x_NK: Tensor, weight_MK: Tensor, out_NM: Tensor) -> None:
    if out_NM.dtype is x_NK.dtype:
        torch.mm(x_NK, weight_MK.t(), out=out_NM)
    else:
        torch.mm(x_NK, weight_MK.t(), out_dtype=out_NM.dtype, out=out_NM)


def library_serves(rows: int, weight_MK: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether the library's product has our kernel's bits at so many rows and, as far as was probed, at all above.

    Probes a shape when it is first seen, which waits for the device; False while a graph is being captured before that.
    """
    if not weight_MK.is_cuda:
        return False
    key = (*weight_MK.shape, weight_MK.dtype, out_dtype, weight_MK.device)
    if key not in _library_least_rows:
        if torch.cuda.is_current_stream_capturing():
            return False
        _library_least_rows[key] = _probe(weight_MK, out_dtype)
    least_rows = _library_least_rows[key]
    return least_rows is not None and rows >= least_rows


@torch.no_grad()
def _probe(weight_MK: Tensor, out_dtype: torch.dtype) -> int | None:
    """The least row count from which on the library has our bits at all counts probed; None where the last differs."""
    outputs, inner = weight_MK.shape
    probed = [rows for rows in _PROBE_ROWS if rows == 1 or rows * outputs * out_dtype.itemsize <= _PROBE_BYTES]
    generator = torch.Generator(weight_MK.device).manual_seed(0)
    kinds: dict[str, Any] = {"device": weight_MK.device, "dtype": weight_MK.dtype, "generator": generator}
    x_NK, drawn_MK = torch.randn(probed[-1], inner, **kinds), torch.randn(outputs, inner, **kinds)
    ours_NM, librarys_NM = x_NK.new_empty(2, probed[-1], outputs, dtype=out_dtype).unbind(0)
    kernel_product(x_NK, drawn_MK, ours_NM)
    least_rows = None
    for rows in reversed(probed):
        library_product(x_NK[:rows], drawn_MK, librarys_NM[:rows])
        if not torch.equal(librarys_NM[:rows], ours_NM[:rows]):
            break
        least_rows = rows
    return least_rows


def product_into(out_NM: Tensor, x_NK: Tensor, weight_MK: Tensor) -> None:
    """x W^T for x [N, K] and W [M, K] of one dtype, accumulated in float32 and rounded to out's dtype; no gradients.

    out_NM: contiguous.
    """
    x_NK = x_NK if x_NK.stride(1) == 1 else x_NK.contiguous()
    compute = library_product if library_serves(x_NK.shape[0], weight_MK, out_NM.dtype) else kernel_product
    compute(x_NK, weight_MK.contiguous(), out_NM)


def _product(x_NK: Tensor, weight_MK: Tensor, out_dtype: torch.dtype) -> Tensor:
    out_NM = x_NK.new_empty(x_NK.shape[0], weight_MK.shape[0], dtype=out_dtype)
    product_into(out_NM, x_NK, weight_MK)
    return out_NM


class _Product(torch.autograd.Function):
    """Gradients are the library's: nothing compares their bits at other row counts."""

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_MK: Tensor, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_NK, weight_MK)
        return _product(x_NK, weight_MK, out_dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NK, weight_MK = ctx.saved_tensors
        dout_NM = gradients[0].to(x_NK.dtype)
        dx_NK = dout_NM @ weight_MK if ctx.needs_input_grad[0] else None
        dweight_MK = dout_NM.t() @ x_NK if ctx.needs_input_grad[1] else None
        return dx_NK, dweight_MK, None


_differentiable_product: Callable[[Tensor, Tensor, torch.dtype], Tensor] = _Product.apply


def serves(x_NK: Tensor, weight_MK: Tensor) -> bool:
    """Whether these products take the operands: bfloat16 on CUDA."""
    return x_NK.is_cuda and x_NK.dtype is torch.bfloat16 and weight_MK.dtype is torch.bfloat16


def product(x_NK: Tensor, weight_MK: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x W^T for x [N, K] and W [M, K] of one dtype, accumulated in float32; [N, M] in out_dtype, or theirs.

    Differentiable in both.
    """
    compute = _differentiable_product if torch.is_grad_enabled() else _product
    return compute(x_NK, weight_MK, out_dtype or x_NK.dtype)
