"""Products of few rows with the weights of their experts, for decode: bound by the bytes of the weights, read once.

The library's grouped product is made for many rows an expert; for a handful it takes about half again the time that
its weights need. Here each program streams a tile of one expert's outputs past the rows of that expert, K in order in
one accumulator: the bits of the library's product and of ours in `product`, which a probe checks once a shape. The
rows are the columns of the matrix units' tile, so few of them waste little.

R rows in the order of their experts, E experts, K inner dimension, M outputs, F expert width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import grouped_mm

from cispo.kernels.gpu.build import Build
from cispo.kernels.gpu.swiglu import swiglu


@triton.jit
def _few_rows_kernel(
    rows_RK, w_EMK, out_RM, row_ends_E, M, K,
    HAS_SWIGLU: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = rows W^T; with HAS_SWIGLU W has 2 M outputs, gate before up, and out is silu(gate) up, rounded as apart."""
    expert = tl.program_id(1)
    begin = tl.load(row_ends_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(row_ends_E + expert)
    at_m = tl.program_id(0) * BM + tl.arange(0, BM)
    at_k = tl.arange(0, BK)
    outputs = M
    if HAS_SWIGLU:
        outputs = 2 * M
    w_at = w_EMK + expert.to(tl.int64) * outputs * K
    w_tile = w_at + (at_m % M)[:, None] * K + at_k[None, :]
    for first in range(begin, end, BR):
        at_r = first + tl.arange(0, BR)
        x_tile = rows_RK + at_r[None, :] * K + at_k[:, None]
        total = tl.zeros((BM, BR), dtype=tl.float32)
        if HAS_SWIGLU:
            up_total = tl.zeros((BM, BR), dtype=tl.float32)
        for start in range(0, K, BK):
            is_inside = at_k < K - start
            x = tl.load(x_tile + start, mask=(at_r[None, :] < end) & is_inside[:, None], other=0.0)
            total = tl.dot(tl.load(w_tile + start, mask=is_inside[None, :], other=0.0), x, total)
            if HAS_SWIGLU:
                up = tl.load(w_tile + M * K + start, mask=is_inside[None, :], other=0.0)
                up_total = tl.dot(up, x, up_total)
        if HAS_SWIGLU:
            gate = total.to(out_RM.dtype.element_ty).to(tl.float32)
            up = up_total.to(out_RM.dtype.element_ty).to(tl.float32)
            total = gate / (1.0 + tl.exp(-gate)) * up
        out_tile = out_RM + at_r[None, :] * M + at_m[:, None]
        inside = (at_r[None, :] < end) & (at_m[:, None] < M)
        tl.store(out_tile, total.to(out_RM.dtype.element_ty), mask=inside)


_TYPES = {"rows_RK": "*bf16", "w_EMK": "*bf16", "out_RM": "*bf16", "row_ends_E": "*i32", "M": "i32", "K": "i32"}
_TILES = ((24, 32, 128, 4), (96, 64, 128, 4))
"""Most rows an expert, of all experts on average; then rows and K of a tile, and stages."""


def _build(rows: int, depth: int, stages: int, has_swiglu: bool) -> Build:
    constants = {"HAS_SWIGLU": has_swiglu, "BR": rows, "BM": 64, "BK": depth}
    name = f"few_rows_{rows}{'_swiglu' if has_swiglu else ''}"
    return Build(name, _few_rows_kernel, _TYPES, constants, 4, stages, True, ("M", "K"))


_BUILDS = {
    (most, has_swiglu): _build(rows, depth, stages, has_swiglu)
    for most, rows, depth, stages in _TILES
    for has_swiglu in (False, True)
}
BUILDS: list[Build] = list(_BUILDS.values())

_PROBE_ROWS = (17, 0, 1, 64, 129, 5, 33, 80)
_PROBE_BYTES = 1 << 29
"""A probe draws as many experts as it has row counts for, and as fit."""

_serves: dict[tuple[object, ...], bool] = {}


def _products(rows_RK: Tensor, w_EMK: Tensor, row_ends_E: Tensor, build: Build) -> Tensor:
    rows, inner = rows_RK.shape
    outputs = w_EMK.shape[1] // 2 if build.constants["HAS_SWIGLU"] else w_EMK.shape[1]
    out_RM = rows_RK.new_empty(rows, outputs)
    grid = (triton.cdiv(outputs, build.constants["BM"]), w_EMK.shape[0])
    build.launch(grid, rows_RK, w_EMK, out_RM, row_ends_E, outputs, inner)
    return out_RM


def _build_for(rows: int, experts: int, has_swiglu: bool) -> Build:
    most = next((most for most, *_ in _TILES if rows <= most * experts), _TILES[-1][0])
    return _BUILDS[most, has_swiglu]


def few_rows_swiglu(rows_RD: Tensor, gate_up_EFD: Tensor, row_ends_E: Tensor) -> Tensor:
    """silu(gate) up of each row's expert, [R, F]; gate_up_EFD: [E, 2 F, D], gate first; row_ends_E: int32."""
    return _products(rows_RD, gate_up_EFD, row_ends_E, _build_for(rows_RD.shape[0], gate_up_EFD.shape[0], True))


def few_rows_product(rows_RK: Tensor, w_EMK: Tensor, row_ends_E: Tensor) -> Tensor:
    """Each row's product with its expert's weight, rows W^T, [R, M]; row_ends_E: int32."""
    return _products(rows_RK, w_EMK, row_ends_E, _build_for(rows_RK.shape[0], w_EMK.shape[0], False))


def are_few(rows: int, gate_up_EFD: Tensor, down_EDF: Tensor) -> bool:
    """Whether so many rows are few enough for the products here, and these have the library's bits for the shapes.

    Probes a shape when it is first seen, which waits for the device; False while a graph is being captured before that.
    """
    if rows > _TILES[-1][0] * down_EDF.shape[0]:
        return False
    key = (*gate_up_EFD.shape, *down_EDF.shape, down_EDF.device)
    if key not in _serves:
        if torch.cuda.is_current_stream_capturing():
            return False
        _serves[key] = _probe(gate_up_EFD, down_EDF)
    return _serves[key]


@torch.no_grad()
def _probe(gate_up_EFD: Tensor, down_EDF: Tensor) -> bool:
    """Whether both products have the library's bits, for experts that get no row, one, a tile and more."""
    generator = torch.Generator(down_EDF.device).manual_seed(0)
    counts = _PROBE_ROWS[: max(1, min(len(_PROBE_ROWS), down_EDF.shape[0], _PROBE_BYTES // gate_up_EFD[0].nbytes))]
    row_ends_E = torch.tensor(counts, device=down_EDF.device).cumsum(0).to(torch.int32)
    device, dtype = down_EDF.device, down_EDF.dtype

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    gate_up_EFD, down_EDF = (drawn(len(counts), *weight.shape[1:]) for weight in (gate_up_EFD, down_EDF))
    rows_RD = drawn(sum(counts), down_EDF.shape[1]) / down_EDF.shape[1] ** 0.5
    hidden_RF = swiglu(grouped_mm(rows_RD, gate_up_EFD.transpose(1, 2), offs=row_ends_E))
    out_RD = grouped_mm(hidden_RF, down_EDF.transpose(1, 2), offs=row_ends_E)
    return all(
        torch.equal(_products(rows_RD, gate_up_EFD, row_ends_E, _BUILDS[most, True]), hidden_RF)
        and torch.equal(_products(hidden_RF, down_EDF, row_ends_E, _BUILDS[most, False]), out_RD)
        for most, *_ in _TILES
    )
