"""Rows of experts in order, and copies into it and sums out of it, on CUDA.

A row is one (token, choice). Rows lie in the order of their experts and, within an expert, of their tokens: a counting
sort on the device, without atomics. Copies go token by token, so that each token is read once; sums gather the rows of
a token in the order of its choices. Nothing here reads back a count, and no shape depends on one.

The twin is `kernels.experts`. N packed tokens, D model width, E experts, K experts a token, R = N K rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build


@triton.jit
def _count(ids, first, slots, expert, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """How many of BLOCK slots from `first` on went to each expert."""
    count_E = tl.zeros_like(expert)
    for start in range(0, BLOCK, TILE):
        slot = first + start + tl.arange(0, TILE)
        id_S = tl.load(ids + slot, mask=slot < slots, other=-1).to(tl.int32)
        count_E += tl.sum((id_S[:, None] == expert[None, :]).to(tl.int32), 0)
    return count_E


@triton.jit
def _count_kernel(ids, count, slots, BLOCK: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr):
    """count [blocks, BLOCK_E]: the slots of each block that went to each expert."""
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    tl.store(count + block * BLOCK_E + expert, _count(ids, block * BLOCK, slots, expert, BLOCK, TILE))


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
        total_E = _count(ids, 0, slots, expert, BLOCK, TILE)
    else:
        total_E = tl.zeros_like(expert)
        for start in range(0, BLOCKS, STEP):
            other = start + tl.arange(0, STEP)
            count_SE = tl.load(count + other[:, None] * BLOCK_E + expert[None, :], mask=(other < BLOCKS)[:, None], other=0)
            total_E += tl.sum(count_SE, 0)
            before_E += tl.sum(tl.where((other < block)[:, None], count_SE, 0), 0)
    end_E = tl.cumsum(total_E, 0)
    if block == 0:
        tl.store(row_ends + expert, end_E, mask=expert < E)
    next_E = end_E - total_E + before_E
    for start in range(0, BLOCK, TILE):
        slot = block * BLOCK + start + tl.arange(0, TILE)
        id_S = tl.load(ids + slot, mask=slot < slots, other=-1).to(tl.int32)
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
            if tl.program_id(1) == 0:
                tl.store(row_weight + row_N, tl.load(weight + token * K + k, mask=is_token), mask=is_token)


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

_BLOCK_N, _BLOCK_D = 1, 2048

_ORDER_TYPES = {"ids": "*i64"} | dict.fromkeys(("count", "row", "row_ends"), "*i32") | dict.fromkeys(
    ("slots", "E", "BLOCKS"), "i32"
)
_COPY_TYPES = {name: "*bf16" for name in ("x", "rows", "out")} | {
    "row": "*i32", "weight": "*fp32", "row_weight": "*fp32", "N": "i32", "D": "i32"
}


def _order_constants(experts: int) -> dict[str, Any]:
    block_e = max(16, triton.next_power_of_2(experts))
    return {"BLOCK": _BLOCK_SLOTS, "TILE": max(16, min(256, 8192 // block_e)), "BLOCK_E": block_e}


def sort_rows(ids_NK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Row of each slot, int32 [N, K], and where each expert's rows end, int32 [E]. ids_NK: int64, 0 to E - 1."""
    slots = ids_NK.numel()
    row_NK = torch.empty_like(ids_NK, dtype=torch.int32)
    row_ends_E = ids_NK.new_empty(experts, dtype=torch.int32)
    constants = _order_constants(experts)
    blocks = triton.cdiv(slots, _BLOCK_SLOTS)
    count = row_NK
    if blocks > 1:
        count = ids_NK.new_empty(blocks, constants["BLOCK_E"], dtype=torch.int32)
        _count_kernel[(blocks,)](ids_NK, count, slots, **constants, num_warps=4)
    _place_kernel[(blocks,)](
        ids_NK, count, row_NK, row_ends_E, slots, experts, blocks,
        IS_ONE_BLOCK=blocks == 1, STEP=16, **constants, num_warps=4,
    )
    return row_NK, row_ends_E


def _copy_tile(width: int) -> tuple[int, int]:
    block_d = min(_BLOCK_D, triton.next_power_of_2(width))
    return _BLOCK_N * (_BLOCK_D // block_d), block_d


def spread(x_ND: Tensor, row_NK: Tensor) -> Tensor:
    """Rows [R, D] of the tokens [N, D]."""
    (tokens, width), k = x_ND.shape, row_NK.shape[1]
    rows_RD = x_ND.new_empty(tokens * k, width)
    block_n, block_d = _copy_tile(width)
    grid = (triton.cdiv(tokens, block_n), triton.cdiv(width, block_d))
    _spread_kernel[grid](
        x_ND, row_NK, rows_RD, rows_RD, rows_RD, tokens, width,
        K=k, HAS_WEIGHT=False, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )
    return rows_RD


def spread_weighted(x_ND: Tensor, row_NK: Tensor, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, D] of the tokens [N, D], and the weight of each row, [R]."""
    (tokens, width), k = x_ND.shape, row_NK.shape[1]
    rows_RD = x_ND.new_empty(tokens * k, width)
    weight_R = weight_NK.new_empty(tokens * k)
    block_n, block_d = _copy_tile(width)
    grid = (triton.cdiv(tokens, block_n), triton.cdiv(width, block_d))
    _spread_kernel[grid](
        x_ND, row_NK, rows_RD, weight_NK, weight_R, tokens, width,
        K=k, HAS_WEIGHT=True, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )
    return rows_RD, weight_R


def gather_sum(rows_RD: Tensor, row_NK: Tensor, weight_NK: Tensor | None) -> Tensor:
    """The sum of each token's rows, times its weights if there are any; [N, D], added in float32, rounded once."""
    (tokens, k), width = row_NK.shape, rows_RD.shape[1]
    out_ND = rows_RD.new_empty(tokens, width)
    block_n, block_d = _copy_tile(width)
    grid = (triton.cdiv(tokens, block_n), triton.cdiv(width, block_d))
    _gather_sum_kernel[grid](
        rows_RD, row_NK, rows_RD if weight_NK is None else weight_NK, out_ND, tokens, width,
        K=k, HAS_WEIGHT=weight_NK is not None, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )
    return out_ND
