"""Rows of experts in order, and copies into it and sums out of it, on CUDA.

A row is one (token, choice). Rows lie in the order of their experts and, within an expert, of their tokens: a counting
sort on the device, without atomics. Copies go token by token, so that each token is read once; sums gather the rows of
a token in the order of its choices. Nothing here reads back a count, and no shape depends on one.

The twin is `kernels.experts`. N packed tokens, D model width, E experts, K experts a token, R = N K rows.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build


@triton.jit
def _load_ids(ids, slot, slots, E):
    """Ids of experts, -1 past the last slot. What is no expert is taken for the nearest, so rows stay a permutation."""
    id_S = tl.load(ids + slot, mask=slot < slots, other=0).to(tl.int32)
    return tl.where(slot < slots, tl.minimum(tl.maximum(id_S, 0), E - 1), -1)


@triton.jit
def _count(ids, first, slots, E, expert, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """How many of BLOCK slots from `first` on went to each expert."""
    count_E = tl.zeros_like(expert)
    for start in range(0, tl.minimum(BLOCK, slots - first), TILE):
        slot = first + start + tl.arange(0, TILE)
        id_S = _load_ids(ids, slot, slots, E)
        count_E += tl.sum((id_S[:, None] == expert[None, :]).to(tl.int32), 0)
    return count_E


@triton.jit
def _count_kernel(ids, count, slots, E, BLOCK: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr):
    """count [blocks, BLOCK_E]: the slots of each block that went to each expert."""
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    tl.store(count + block * BLOCK_E + expert, _count(ids, block * BLOCK, slots, E, expert, BLOCK, TILE))


@triton.jit
def _place_kernel(
    ids,
    count,
    row,
    row_ends,
    slots,
    E,
    BLOCKS,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STEP: tl.constexpr,
):
    """The row of each slot: after all rows of lower experts, and after its own expert's rows of earlier slots."""
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    before_E = tl.zeros_like(expert)
    if IS_ONE_BLOCK:
        total_E = _count(ids, 0, slots, E, expert, BLOCK, TILE)
    else:
        total_E = tl.zeros_like(expert)
        for start in range(0, BLOCKS, STEP):
            other = start + tl.arange(0, STEP)
            count_SE = tl.load(
                count + other[:, None] * BLOCK_E + expert[None, :], mask=(other < BLOCKS)[:, None], other=0
            )
            total_E += tl.sum(count_SE, 0)
            before_E += tl.sum(tl.where((other < block)[:, None], count_SE, 0), 0)
    end_E = tl.cumsum(total_E, 0)
    if block == 0:
        tl.store(row_ends + expert, end_E, mask=expert < E)
    next_E = end_E - total_E + before_E
    for start in range(0, tl.minimum(BLOCK, slots - block * BLOCK), TILE):
        slot = block * BLOCK + start + tl.arange(0, TILE)
        id_S = _load_ids(ids, slot, slots, E)
        is_of_SE = (id_S[:, None] == expert[None, :]).to(tl.int32)
        row_SE = next_E[None, :] + tl.cumsum(is_of_SE, 0) - is_of_SE
        tl.store(row + slot, tl.sum(row_SE * is_of_SE, 1), mask=slot < slots)
        next_E += tl.sum(is_of_SE, 0)


@triton.jit
def _spread_kernel(
    x,
    row,
    rows,
    weight,
    row_weight,
    N,
    D,
    K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each token into its K rows, and its weights beside them."""
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_token = token < N
    mask = is_token[:, None] & (column < D)[None, :]
    x_ND = tl.load(x + token.to(tl.int64)[:, None] * D + column[None, :], mask=mask)
    for k in tl.static_range(K):
        row_N = tl.load(row + token * K + k, mask=is_token, other=0)
        tl.store(rows + row_N.to(tl.int64)[:, None] * D + column[None, :], x_ND, mask=mask)
        if HAS_WEIGHT:
            is_first = token < tl.where(tl.program_id(1) == 0, N, 0)
            tl.store(row_weight + row_N, tl.load(weight + token * K + k, mask=is_first), mask=is_first)


@triton.jit
def _gather_sum_kernel(
    rows,
    row,
    weight,
    out,
    N,
    D,
    K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of each token's K rows, weighted or not, in float32 and in the order of its choices."""
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_token = token < N
    mask = is_token[:, None] & (column < D)[None, :]
    total_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        row_N = tl.load(row + token * K + k, mask=is_token, other=0)
        row_ND = tl.load(rows + row_N.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            row_ND = row_ND * tl.load(weight + token * K + k, mask=is_token, other=0.0)[:, None]
        total_ND += row_ND
    out_tile = out + token.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out_tile, total_ND.to(out.dtype.element_ty), mask=mask)


_BLOCK_SLOTS = 1024
"""Slots that one program of the sort places."""

_COLUMNS = 2048
"""Elements that one program copies or sums of each row."""

_BF16, _INT32, _FP32 = ("x", "rows", "out"), ("count", "row", "row_ends"), ("weight", "row_weight")
_SIZES = ("slots", "E", "BLOCKS", "N", "D")
_TYPES = {
    "ids": "*i64",
    **dict.fromkeys(_BF16, "*bf16"),
    **dict.fromkeys(_INT32, "*i32"),
    **dict.fromkeys(_FP32, "*fp32"),
    **dict.fromkeys(_SIZES, "i32"),
}


@cache
def _sort_builds(experts: int, is_one_block: bool) -> tuple[Build, Build]:
    block_e = max(16, triton.next_power_of_2(experts))
    constants = {"BLOCK": _BLOCK_SLOTS, "TILE": max(16, min(256, 8192 // block_e)), "BLOCK_E": block_e}
    place = constants | {"IS_ONE_BLOCK": is_one_block, "STEP": 16}
    return (
        Build(f"count_{block_e}", _count_kernel, _TYPES, constants, 4, 1, False),
        Build(f"place_{block_e}_{is_one_block:d}", _place_kernel, _TYPES, place, 4, 1, False),
    )


@cache
def _copy_build(kernel_name: str, width: int, k: int, has_weight: bool) -> Build:
    kernel = {"spread": _spread_kernel, "gather_sum": _gather_sum_kernel}[kernel_name]
    block_d = min(_COLUMNS, triton.next_power_of_2(width))
    constants = {"K": k, "HAS_WEIGHT": has_weight, "BLOCK_N": _COLUMNS // block_d, "BLOCK_D": block_d}
    name = f"{kernel_name}_{block_d}_{k}_{has_weight:d}"
    return Build(name, kernel, _TYPES, constants, 4, 1, False, ("D",))


BUILDS: list[Build] = [
    *(_sort_builds(experts, False)[0] for experts in (32, 256)),
    *(_sort_builds(experts, is_one_block)[1] for experts in (32, 256) for is_one_block in (False, True)),
    *(
        _copy_build(name, 2048, k, has_weight)
        for name in ("spread", "gather_sum")
        for k in (2, 8)
        for has_weight in (False, True)
    ),
]


def sort_rows(ids_NK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Row of each slot, int32 [N, K], and where each expert's rows end, int32 [E]. ids_NK: int64, contiguous."""
    slots = ids_NK.numel()
    blocks = triton.cdiv(slots, _BLOCK_SLOTS)
    count_build, place_build = _sort_builds(experts, blocks == 1)
    row_NK = torch.empty_like(ids_NK, dtype=torch.int32)
    row_ends_E = ids_NK.new_empty(experts, dtype=torch.int32)
    count_SE = ids_NK.new_empty(blocks, count_build.constants["BLOCK_E"], dtype=torch.int32)
    if blocks > 1:
        count_build.launch((blocks,), ids_NK, count_SE, slots, experts)
    place_build.launch((blocks,), ids_NK, count_SE, row_NK, row_ends_E, slots, experts, blocks)
    return row_NK, row_ends_E


def _copy_grid(build: Build, tokens: int, width: int) -> tuple[int, int]:
    return triton.cdiv(tokens, build.constants["BLOCK_N"]), triton.cdiv(width, build.constants["BLOCK_D"])


def spread(x_ND: Tensor, row_NK: Tensor, weight_NK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows [R, D] of the tokens, and the weight of each row [R]: empty where there are none."""
    (tokens, width), k = x_ND.shape, row_NK.shape[1]
    build = _copy_build("spread", width, k, weight_NK is not None)
    rows_RD = x_ND.new_empty(tokens * k, width)
    weight_R = x_ND.new_empty(0 if weight_NK is None else tokens * k, dtype=torch.float32)
    weight_NK = weight_R if weight_NK is None else weight_NK
    build.launch(_copy_grid(build, tokens, width), x_ND, row_NK, rows_RD, weight_NK, weight_R, tokens, width)
    return rows_RD, weight_R


def gather_sum(rows_RD: Tensor, row_NK: Tensor, weight_NK: Tensor | None = None) -> Tensor:
    """The sum of each token's rows, times its weights if there are any; [N, D], in float32, rounded once."""
    (tokens, k), width = row_NK.shape, rows_RD.shape[1]
    build = _copy_build("gather_sum", width, k, weight_NK is not None)
    out_ND = rows_RD.new_empty(tokens, width)
    weight_NK = rows_RD if weight_NK is None else weight_NK
    build.launch(_copy_grid(build, tokens, width), rows_RD, row_NK, weight_NK, out_ND, tokens, width)
    return out_ND
