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
def _angles(rotary, rows, exists, HALF: tl.constexpr, DIM: tl.constexpr):
    """Cosine and sine of each dim of a head in some rows [M, D], float32; 1 and 0 where it is not turned."""
    dim = tl.arange(0, DIM)
    turned = exists[:, None] & (dim < 2 * HALF)[None, :]
    angle = rotary + rows[:, None] * (2 * HALF) + tl.where(dim < HALF, dim, dim - HALF)[None, :]
    return tl.load(angle, mask=turned, other=1.0), tl.load(angle + HALF, mask=turned, other=0.0)


@triton.jit
def _rotated(at, cos, sin, exists, HALF: tl.constexpr, DIM: tl.constexpr, IS_INVERSE: tl.constexpr):
    """One head of some rows [M, D] that start `at` [M, 1], float32, each of its first 2 * HALF dims turned."""
    dim = tl.arange(0, DIM)
    is_first = dim < HALF
    own = tl.load(at + dim[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
    if HALF > 0:
        partner_dim = tl.where(is_first, dim + HALF, dim - HALF)
        turned = exists[:, None] & (dim < 2 * HALF)[None, :]
        partner = tl.load(at + partner_dim[None, :], mask=turned, other=0.0).to(tl.float32)
        is_minus = is_first != IS_INVERSE
        own = tl.fma(own, cos, tl.where(is_minus[None, :], -partner, partner) * sin)
    return own


@triton.jit(do_not_specialize=["tokens"])
def _rotate_rows(
    x, x_row, rotary, out, out_row, tokens,
    DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, SHARING: tl.constexpr, IS_INVERSE: tl.constexpr,
):  # fmt: skip
    """SHARING heads a program, for which it reads the angles once: they are more bytes than a head has."""
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = rows < tokens
    dim = tl.arange(0, DIM)
    cos, sin = _angles(rotary, rows, exists, HALF, DIM)
    for index in tl.static_range(SHARING):
        head = tl.program_id(0) * SHARING + index
        rotated = _rotated(x + rows[:, None] * x_row + head * DIM, cos, sin, exists, HALF, DIM, IS_INVERSE)
        to = out + rows[:, None] * out_row + head * DIM + dim[None, :]
        tl.store(to, rotated.to(out.dtype.element_ty), mask=exists[:, None])


@triton.jit(do_not_specialize=["table_row", "tokens"])
def _rotate_and_append(
    x, x_row, rotary, tile_T4, position_B, k_pages, v_pages, table, table_row, out, out_row, tokens,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    IS_DECODE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    row = tl.arange(0, ROWS)
    if IS_DECODE:
        first = tl.program_id(1) * ROWS
        exists = first + row < tokens
        sequences = (first + row).to(tl.int64)
        positions = tl.load(position_B + first + row, mask=exists, other=0).to(tl.int64)
    else:
        tile = tile_T4 + tl.program_id(1) * 4
        first, end = tl.load(tile), tl.load(tile + 1)
        exists = first + row < end
        positions = (tl.load(tile + 2) + row).to(tl.int64)
        sequences = tl.zeros([ROWS], tl.int64) + tl.load(tile + 3)
    rows = (first + row).to(tl.int64)
    dim = tl.arange(0, DIM)
    at = x + rows[:, None] * x_row + head * DIM
    if head >= HEADS + KEY_HEADS:
        values = tl.load(at + dim[None, :], mask=exists[:, None], other=0.0)
        page = tl.load(table + sequences * table_row + positions // PAGE_ROWS, mask=exists, other=0)
        block = (page * KEY_HEADS + head - HEADS - KEY_HEADS) * (DIM * PAGE_ROWS) + positions % PAGE_ROWS * DIM
        tl.store(v_pages + block[:, None] + dim[None, :], values, mask=exists[:, None])
    else:
        cos, sin = _angles(rotary, rows, exists, HALF, DIM)
        rotated = _rotated(at, cos, sin, exists, HALF, DIM, False)
        if head >= HEADS:
            page = tl.load(table + sequences * table_row + positions // PAGE_ROWS, mask=exists, other=0)
            block = (page * KEY_HEADS + head - HEADS) * (DIM * PAGE_ROWS) + positions % PAGE_ROWS
            to = k_pages + block[:, None] + dim[None, :] * PAGE_ROWS
            tl.store(to, rotated.to(k_pages.dtype.element_ty), mask=exists[:, None])
        else:
            to = out + rows[:, None] * out_row + head * DIM + dim[None, :]
            tl.store(to, rotated.to(out.dtype.element_ty), mask=exists[:, None])


_TYPES = {
    "x": "*bf16", "x_row": "i32", "rotary": "*fp32", "tile_T4": "*i32", "position_B": "*i64", "k_pages": "*bf16",
    "v_pages": "*bf16", "table": "*i64", "table_row": "i32", "out": "*bf16", "out_row": "i32", "tokens": "i32",
}  # fmt: skip
_ALIGNED = ("x_row", "out_row")


def _rows_build(name: str, dim: int, *, is_inverse: bool) -> Build:
    types = {name: type for name, type in _TYPES.items() if name in _rotate_rows.arg_names}
    types["x"] = "*fp32" if is_inverse else "*bf16"
    constants = {"DIM": dim, "HALF": dim // 4, "ROWS": 16, "SHARING": dim // 32, "IS_INVERSE": is_inverse}
    return Build(f"rotary, {name}, D {dim}", _rotate_rows, types, constants, 4, 1, False, _ALIGNED)


def _pages_build(name: str, dim: int, *, is_decode: bool) -> Build:
    constants = {
        "HEADS": 16, "KEY_HEADS": 4, "DIM": dim, "HALF": dim // 4, "ROWS": 16 if is_decode else CHUNK_LENGTH,
        "IS_DECODE": is_decode,
    }  # fmt: skip
    return Build(f"rotary, {name}, D {dim}", _rotate_and_append, _TYPES, constants, 8, 1, False, _ALIGNED)


_PACKED = {dim: _rows_build("packed", dim, is_inverse=False) for dim in (64, 128)}
_INVERSE = {dim: _rows_build("inverse", dim, is_inverse=True) for dim in (64, 128)}
_PAGED = {dim: _pages_build("pages", dim, is_decode=False) for dim in (64, 128)}
_DECODE = {dim: _pages_build("decode", dim, is_decode=True) for dim in (64, 128)}

BUILDS: list[Build] = [*_PACKED.values(), *_PAGED.values(), *_DECODE.values(), *_INVERSE.values()]

APPEND_ROWS = CHUNK_LENGTH
"""Rows of the `QueryTiles` that `rotate_and_append` takes."""


def _rotate_packed(build: Build, x_NX: Tensor, rotary_N2R: Tensor, heads: int, out: Tensor) -> None:
    most = build.constants["SHARING"]
    sharing = next(count for count in range(most, 0, -1) if heads % count == 0)
    constants = {**build.constants, "HALF": rotary_N2R.shape[2], "SHARING": sharing}
    grid = (heads // sharing, triton.cdiv(len(x_NX), build.constants["ROWS"]))
    places = (x_NX, x_NX.stride(0), rotary_N2R, out, out.stride(0), len(x_NX))
    _rotate_rows[grid](*places, **constants, **build.options)


def rotate(qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int) -> Tensor:
    """Rotated queries and keys of packed rows, [N, (H + K) * D] in the dtype of qkv_NX, whose rows may be strided.

    rotary_N2R: cosines and sines of each row's position, float32, contiguous.
    """
    dim = qkv_NX.shape[1] // (heads + 2 * key_heads)
    turned = heads + key_heads
    out = torch.empty(qkv_NX.shape[0], turned * dim, device=qkv_NX.device, dtype=qkv_NX.dtype)
    _rotate_packed(_PACKED[dim], qkv_NX, rotary_N2R, turned, out)
    return out


def rotate_back(dqk_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, dqkv_NX: Tensor) -> None:
    """Gradients of rotated queries and keys, float32 [N, (H + K) * D], into the first columns of the projection's."""
    turned = heads + key_heads
    _rotate_packed(_INVERSE[dqk_NX.shape[1] // turned], dqk_NX, rotary_N2R, turned, dqkv_NX)


def _append(
    builds: Mapping[int, Build],
    x_NX: Tensor,
    rotary_N2R: Tensor,
    heads: int,
    key_heads: int,
    pages: Pages,
    tile_T4: Tensor | None,
    position_B: Tensor | None,
) -> Tensor:
    dim = x_NX.shape[1] // (heads + 2 * key_heads)
    build, tokens = builds[dim], len(x_NX)
    out = torch.empty(tokens, heads * dim, device=x_NX.device, dtype=x_NX.dtype)
    constants = {**build.constants, "HEADS": heads, "KEY_HEADS": key_heads, "HALF": rotary_N2R.shape[2]}
    tiles = triton.cdiv(tokens, build.constants["ROWS"]) if tile_T4 is None else len(tile_T4)
    k_pages, v_pages, table = pages
    _rotate_and_append[heads + 2 * key_heads, tiles](
        x_NX, x_NX.stride(0), rotary_N2R, tile_T4, position_B, k_pages, v_pages, table, table.stride(0), out,
        out.stride(0), tokens, **constants, **build.options,
    )  # fmt: skip
    return out


def rotate_and_append(
    qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, pages: Pages, tiles: QueryTiles
) -> Tensor:
    """Rotated queries [N, H * D]; rotated keys, and values, go to their rows in the pages of their sequences.

    tiles: of `query_tiles` with APPEND_ROWS rows and the position at which each sequence's piece starts.
    """
    return _append(_PAGED, qkv_NX, rotary_N2R, heads, key_heads, pages, tiles.tile_T4, None)


def rotate_and_append_decode(
    qkv_BX: Tensor, rotary_B2R: Tensor, heads: int, key_heads: int, pages: Pages, position_B: Tensor
) -> Tensor:
    """As `rotate_and_append` for one token of each sequence, at position_B (int64)."""
    return _append(_DECODE, qkv_BX, rotary_B2R, heads, key_heads, pages, None, position_B)
