"""x W^T on CUDA with a row's bits independent of the row count: the library's product where it gives that, else ours.

Ours walks K in order and never splits it, so neither the tile nor the rows beside a row matter to its bits. The library
(cuBLAS) gives the same bits for most shapes and splits K for few rows of others; which, depends on its heuristics for
the shape, so a probe compares both at many row counts, once a shape, and the library is used where they are equal.

N rows, K inner dimension, M outputs.
"""

from bisect import bisect_left
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build

_PROBE_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
_PROBE_BYTES = 1 << 29
"""No probe makes an output larger than this: an LM head is compared at fewer rows."""


@triton.jit
def _product_kernel(
    x_NK, w_MK, out_NM, rows, outputs, inner, x_stride, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    """One tile [BN rows, BM outputs]; K in order, in one accumulator. Programs that share a weight tile are neighbours."""
    at_n = tl.program_id(0) * BN + tl.arange(0, BN)
    at_m = tl.program_id(1) * BM + tl.arange(0, BM)
    at_k = tl.arange(0, BK)
    x_tile = x_NK + (at_n % rows).to(tl.int64)[:, None] * x_stride + at_k[None, :]
    w_tile = w_MK + (at_m % outputs).to(tl.int64)[None, :] * inner + at_k[:, None]
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for start in range(0, inner, BK):
        x = tl.load(x_tile, mask=at_k[None, :] < inner - start, other=0.0)
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


_TILES = {16: (16, 32, 128, 2, 6), 64: (64, 32, 128, 4, 5), 0: (128, 128, 64, 8, 4)}
"""Most rows, 0 for any number of them: rows, outputs and K of a tile, warps, stages."""

_BUILDS = {(most, out): _build(f"{most}_rows", *tile, out) for most, tile in _TILES.items() for out in ("bf16", "fp32")}
BUILDS = list(_BUILDS.values())

_library_rows: dict[tuple[Any, ...], tuple[list[int], list[bool]]] = {}


def kernel_product(x_NK: Tensor, weight_MK: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x W^T by our kernel; [N, M]. x: columns contiguous. weight: contiguous."""
    (rows, inner), outputs = x_NK.shape, weight_MK.shape[0]
    out_NM = x_NK.new_empty(rows, outputs, dtype=out_dtype)
    if rows:
        most = next((most for most in (16, 64) if rows <= most), 0)
        build = _BUILDS[most, "fp32" if out_dtype is torch.float32 else "bf16"]
        grid = (triton.cdiv(rows, build.constants["BN"]), triton.cdiv(outputs, build.constants["BM"]))
        _product_kernel[grid](
            x_NK, weight_MK, out_NM, rows, outputs, inner, x_NK.stride(0), **build.constants,
            num_warps=build.num_warps, num_stages=build.num_stages,
        )  # fmt: skip
    return out_NM


def library_product(x_NK: Tensor, weight_MK: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype is x_NK.dtype:
        return x_NK @ weight_MK.t()
    return torch.mm(x_NK, weight_MK.t(), out_dtype=out_dtype)


def library_serves(rows: int, weight_MK: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether the library's product of so many rows has our kernel's bits, as far as the row counts beside it show.

    Probes the shape when it is first seen, which waits for the device; False while a graph is being captured before that.
    """
    key = (*weight_MK.shape, weight_MK.dtype, out_dtype, weight_MK.device)
    found = _library_rows.get(key)
    if found is None:
        if not weight_MK.is_cuda or torch.cuda.is_current_stream_capturing():
            return False
        found = _library_rows[key] = _probe(weight_MK, out_dtype)
    probed, is_equal = found
    above = bisect_left(probed, rows)
    if above == len(probed):
        return is_equal[-1]
    return is_equal[above] and (probed[above] == rows or is_equal[max(above - 1, 0)])


@torch.no_grad()
def _probe(weight_MK: Tensor, out_dtype: torch.dtype) -> tuple[list[int], list[bool]]:
    outputs, inner = weight_MK.shape
    probed = [rows for rows in _PROBE_ROWS if rows == 1 or rows * outputs * out_dtype.itemsize <= _PROBE_BYTES]
    generator = torch.Generator(weight_MK.device).manual_seed(0)
    kinds: dict[str, Any] = {"device": weight_MK.device, "dtype": weight_MK.dtype, "generator": generator}
    x_NK, drawn_MK = torch.randn(probed[-1], inner, **kinds), torch.randn(outputs, inner, **kinds)
    ours_NM = kernel_product(x_NK, drawn_MK, out_dtype)
    is_equal = [torch.equal(library_product(x_NK[:rows], drawn_MK, out_dtype), ours_NM[:rows]) for rows in probed]
    return probed, is_equal


def product(x_NK: Tensor, weight_MK: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """x W^T for x [N, K] and W [M, K] of one dtype, accumulated in float32; [N, M] in out_dtype, or theirs. No gradients."""
    out_dtype = out_dtype or x_NK.dtype
    if library_serves(x_NK.shape[0], weight_MK, out_dtype):
        return library_product(x_NK, weight_MK, out_dtype)
    x_NK = x_NK if x_NK.stride(1) == 1 else x_NK.contiguous()
    return kernel_product(x_NK, weight_MK.contiguous(), out_dtype)
