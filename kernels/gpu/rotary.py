"""Rotary embedding of packed projections, and the append of keys and values to pages, in one pass over the rows.

The twin is `rotate` in `cispo.kernels.softmax_attention`: float32 arithmetic, rotated rows rounded to the dtype of the
projection. The scale of the scores is not in the queries: the attention kernels apply it to float32 scores. Training,
prefill and decode rotate with this kernel, and each of its roundings is written out, so they rotate alike.

N packed tokens, B sequences, X = (H + 2 K) * D columns of a projection, H query heads, K key heads, D head dim, R / 2
pairs of rotated dims, M rows of a tile, C = 64 rows of a page, P pages of a cache, J pages of a sequence.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH
from cispo.kernels.gpu.attention import QueryTiles
from cispo.kernels.gpu.build import Build
from cispo.kernels.softmax_cpu import Pages

PAGE_ROWS = tl.constexpr(CHUNK_LENGTH)


@triton.jit
def _rotated(x, x_row, rotary, rows, exists, head, HALF: tl.constexpr, DIM: tl.constexpr, IS_INVERSE: tl.constexpr):
    """One head of some rows [M, D], float32, each of its first 2 * HALF dims turned with its partner."""
    dim = tl.arange(0, DIM)
    is_first, is_turned = dim < HALF, dim < 2 * HALF
    at = x + rows[:, None] * x_row + head * DIM
    own = tl.load(at + dim[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
    if HALF > 0:
        turned = exists[:, None] & is_turned[None, :]
        partner_dim = tl.where(is_first, dim + HALF, dim - HALF)
        partner = tl.load(at + partner_dim[None, :], mask=turned, other=0.0).to(tl.float32)
        angle = rotary + rows[:, None] * (2 * HALF) + tl.where(is_first, dim, dim - HALF)[None, :]
        cos = tl.load(angle, mask=turned, other=1.0)
        sin = tl.load(angle + HALF, mask=turned, other=0.0)
        is_minus = is_first != IS_INVERSE
        own = tl.fma(own, cos, tl.where(is_minus[None, :], -partner, partner) * sin)
    return own


@triton.jit(do_not_specialize=["table_row", "tokens"])
def _rotate(
    x, x_row, rotary, tile_T4, position_B, k_pages, v_pages, table, table_row, out, out_row, tokens,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    IS_PAGED: tl.constexpr, IS_DECODE: tl.constexpr, IS_INVERSE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    row = tl.arange(0, ROWS)
    if IS_PAGED and not IS_DECODE:
        tile = tile_T4 + tl.program_id(1) * 4
        first, end = tl.load(tile), tl.load(tile + 1)
        exists = first + row < end
        positions = (tl.load(tile + 2) + row).to(tl.int64)
        sequences = tl.zeros([ROWS], tl.int64) + tl.load(tile + 3)
    else:
        first = tl.program_id(1) * ROWS
        exists = first + row < tokens
        sequences = (first + row).to(tl.int64)
        positions = tl.load(position_B + first + row, mask=exists, other=0).to(tl.int64) if IS_DECODE else sequences
    rows = (first + row).to(tl.int64)
    dim = tl.arange(0, DIM)
    if IS_PAGED and head >= HEADS:
        page = tl.load(table + sequences * table_row + positions // PAGE_ROWS, mask=exists, other=0)
        in_page = positions % PAGE_ROWS
        if head < HEADS + KEY_HEADS:
            keys = _rotated(x, x_row, rotary, rows, exists, head, HALF, DIM, IS_INVERSE)
            block = (page * KEY_HEADS + head - HEADS) * (DIM * PAGE_ROWS) + in_page
            to = k_pages + block[:, None] + dim[None, :] * PAGE_ROWS
            tl.store(to, keys.to(k_pages.dtype.element_ty), mask=exists[:, None])
        else:
            values = tl.load(x + rows[:, None] * x_row + head * DIM + dim[None, :], mask=exists[:, None], other=0.0)
            block = (page * KEY_HEADS + head - HEADS - KEY_HEADS) * (DIM * PAGE_ROWS) + in_page * DIM
            tl.store(v_pages + block[:, None] + dim[None, :], values, mask=exists[:, None])
    else:
        rotated = _rotated(x, x_row, rotary, rows, exists, head, HALF, DIM, IS_INVERSE)
        to = out + rows[:, None] * out_row + head * DIM + dim[None, :]
        tl.store(to, rotated.to(out.dtype.element_ty), mask=exists[:, None])


def _build(name: str, dim: int, *, is_paged: bool, is_decode: bool, is_inverse: bool) -> Build:
    source = "*fp32" if is_inverse else "*bf16"
    types = {
        "x": source, "x_row": "i32", "rotary": "*fp32", "tile_T4": "*i32", "position_B": "*i64", "k_pages": "*bf16",
        "v_pages": "*bf16", "table": "*i64", "table_row": "i32", "out": "*bf16", "out_row": "i32", "tokens": "i32",
    }  # fmt: skip
    constants = {
        "HEADS": 16, "KEY_HEADS": 4, "DIM": dim, "HALF": dim // 4, "ROWS": 16 if is_decode else CHUNK_LENGTH,
        "IS_PAGED": is_paged, "IS_DECODE": is_decode, "IS_INVERSE": is_inverse,
    }  # fmt: skip
    num_warps, aligned = 8 if is_paged else 4, ("x_row", "out_row")
    return Build(f"rotary, {name}, D {dim}", _rotate, types, constants, num_warps, 1, False, aligned)


_PACKED = {dim: _build("packed", dim, is_paged=False, is_decode=False, is_inverse=False) for dim in (64, 128)}
_PAGED = {dim: _build("pages", dim, is_paged=True, is_decode=False, is_inverse=False) for dim in (64, 128)}
_DECODE = {dim: _build("decode", dim, is_paged=True, is_decode=True, is_inverse=False) for dim in (64, 128)}
_INVERSE = {dim: _build("inverse", dim, is_paged=False, is_decode=False, is_inverse=True) for dim in (64, 128)}

BUILDS: list[Build] = [*_PACKED.values(), *_PAGED.values(), *_DECODE.values(), *_INVERSE.values()]

APPEND_ROWS = CHUNK_LENGTH
"""Rows of the `QueryTiles` that `rotate_and_append` takes."""


def _launch(
    builds: Mapping[int, Build],
    x_NX: Tensor,
    rotary_N2R: Tensor,
    heads: int,
    key_heads: int,
    out: Tensor,
    pages: Pages | None = None,
    tile_T4: Tensor | None = None,
    position_B: Tensor | None = None,
) -> None:
    tokens, half = x_NX.shape[0], rotary_N2R.shape[2]
    dim = out.shape[1] // heads if pages is not None else x_NX.shape[1] // (heads + key_heads)
    build = builds[dim]
    constants = {**build.constants, "HEADS": heads, "KEY_HEADS": key_heads, "HALF": half}
    tiles = triton.cdiv(tokens, build.constants["ROWS"]) if tile_T4 is None else len(tile_T4)
    k_pages, v_pages, table = pages or (None, None, None)
    _rotate[heads + key_heads * (2 if pages else 1), tiles](
        x_NX, x_NX.stride(0), rotary_N2R, tile_T4, position_B, k_pages, v_pages, table,
        0 if table is None else table.stride(0), out, out.stride(0), tokens,
        **constants, num_warps=build.num_warps, num_stages=build.num_stages,
    )  # fmt: skip


def rotate(qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int) -> Tensor:
    """Rotated queries and keys of packed rows, [N, (H + K) * D] in the dtype of qkv_NX, whose rows may be strided.

    rotary_N2R: cosines and sines of each row's position, float32, contiguous.
    """
    inner = qkv_NX.shape[1] // (heads + 2 * key_heads) * (heads + key_heads)
    out = torch.empty(qkv_NX.shape[0], inner, device=qkv_NX.device, dtype=qkv_NX.dtype)
    _launch(_PACKED, qkv_NX[:, :inner], rotary_N2R, heads, key_heads, out)
    return out


def rotate_back(dqk_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, dqkv_NX: Tensor) -> None:
    """Gradients of rotated queries and keys, float32 [N, (H + K) * D], into the first columns of the projection's."""
    _launch(_INVERSE, dqk_NX, rotary_N2R, heads, key_heads, dqkv_NX)


def rotate_and_append(
    qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, pages: Pages, tiles: QueryTiles
) -> Tensor:
    """Rotated queries [N, H * D]; rotated keys, and values, go to their rows in the pages of their sequences.

    tiles: of `query_tiles` with APPEND_ROWS rows and the position at which each sequence's piece starts.
    """
    out = _queries(qkv_NX, heads, key_heads)
    _launch(_PAGED, qkv_NX, rotary_N2R, heads, key_heads, out, pages, tiles.tile_T4)
    return out


def rotate_and_append_decode(
    qkv_BX: Tensor, rotary_B2R: Tensor, heads: int, key_heads: int, pages: Pages, position_B: Tensor
) -> Tensor:
    """As `rotate_and_append` for one token of each sequence, at position_B (int64)."""
    out = _queries(qkv_BX, heads, key_heads)
    _launch(_DECODE, qkv_BX, rotary_B2R, heads, key_heads, out, pages, position_B=position_B)
    return out


def _queries(qkv_NX: Tensor, heads: int, key_heads: int) -> Tensor:
    columns = qkv_NX.shape[1] // (heads + 2 * key_heads) * heads
    return torch.empty(qkv_NX.shape[0], columns, device=qkv_NX.device, dtype=qkv_NX.dtype)
