"""Causal softmax attention of packed tokens, from packed keys or from pages: training, and prefill in pieces.

Keys are walked in tiles of 64 from position 0 of the sequence with the online softmax (arXiv 2205.14135, algorithm 1),
whatever the rows of the query tile, so a row's bits depend neither on the tile it lies in nor on where its piece
starts. Operands as stored (bfloat16), scores, softmax and sums float32; the scale multiplies the float32 scores, in
units of log2. Every multiply-add that a compiler might fuse or not is written as the one or the other.

A key tile behind a row's position changes no bit of it: its weights are zero and the maximum stays. So tiles that some
rows see and others do not are taken by all of them, masked, after those that all rows see, which need no mask.

N packed tokens, B sequences, H query heads, K key heads, D head dim, M rows of a query tile, C = 64 keys of a tile or
page, T query tiles, P pages of a cache, J pages of a sequence.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cispo.kernels.chunks import CHUNK_LENGTH
from cispo.kernels.gpu.build import Build
from cispo.kernels.softmax_cpu import Pages

KEY_ROWS = tl.constexpr(CHUNK_LENGTH)
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


class QueryTiles(NamedTuple):
    """Tiles of `rows` queries: first packed row, end of its sequence in packed rows, position of the first, sequence.

    int32 [T, 4], the tiles with the most keys first, so that the last to run are short. T is an upper bound that the
    host knows, tokens // rows + B; tiles beyond those that exist have no rows.
    """

    tile_T4: Tensor
    rows: int


def query_tiles(
    cu_seqlens: Tensor, tokens: int, rows: int, start_B: Tensor | None = None, *, is_of_keys: bool = False
) -> QueryTiles:
    """Cut packed sequences into tiles, on the device and without a host sync; the layers of a model share them.

    cu_seqlens: where each sequence begins in the packed rows, and the last one ends, [B + 1]. start_B: position of each
    sequence's first packed token; None is 0. is_of_keys: order them for the backward, by the queries that follow.
    """
    begin_B, end_B = cu_seqlens[:-1], cu_seqlens[1:]
    tiles_B = (end_B - begin_B + rows - 1) // rows
    last_tile_B = tiles_B.cumsum(0)
    index_T = torch.arange(tokens // rows + len(begin_B), device=cu_seqlens.device)
    sequence_T = torch.searchsorted(last_tile_B, index_T, right=True)
    exists_T = sequence_T < len(begin_B)
    sequence_T = sequence_T.clamp_max(len(begin_B) - 1)
    offset_T = (index_T - (last_tile_B - tiles_B)[sequence_T]) * rows
    start_T = offset_T if start_B is None else offset_T + start_B[sequence_T]
    first_T = (begin_B[sequence_T] + offset_T).where(exists_T, tokens)
    tile_T4 = torch.stack((first_T, end_B[sequence_T], start_T, sequence_T), dim=1)
    weight_T = end_B[sequence_T] - first_T if is_of_keys else start_T
    heavy_first_T = torch.where(exists_T, weight_T, -1).argsort(descending=True, stable=True)
    return QueryTiles(tile_T4[heavy_first_T].to(torch.int32), rows)


@triton.jit
def absorb_tile(q, k, v, hidden_rows, maximum, total, out, scale, IS_MASKED: tl.constexpr):
    """Take one tile of keys k [D, C] and values v [C, D] into (maximum, sum, output) of query rows q [M, D].

    hidden_rows: offset of each row's position to the tile's first key; keys beyond it are hidden.
    """
    scores = tl.dot(q, k)
    if IS_MASKED:
        visible = tl.arange(0, KEY_ROWS)[None, :] <= hidden_rows[:, None]
        scores = tl.where(visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
    weights = tl.exp2(tl.fma(scores, scale, -new_maximum[:, None]))
    keep = tl.exp2(maximum - new_maximum)
    total = tl.fma(total, keep, tl.sum(weights, 1))
    out = tl.dot(weights.to(v.dtype), v, out * keep[:, None])
    return new_maximum, total, out


@triton.jit
def key_block(table, j, tiles, key_head, KEY_HEADS: tl.constexpr, IS_PAGED: tl.constexpr):
    """Which block of the pages, in key heads, is a sequence's tile j; 0 past the last, and none if packed."""
    return tl.load(table + j, mask=j < tiles, other=0).to(tl.int32) * KEY_HEADS + key_head if IS_PAGED else j


@triton.jit
def key_tile(k_tiles, v_tiles, block, keys_begin, key_head, j, DIM: tl.constexpr, IS_PAGED: tl.constexpr):
    """Keys [D, C] and values [C, D] of a sequence's tile j, which `key_block` found."""
    if IS_PAGED:
        keys, values = k_tiles.load([block * DIM, 0]), v_tiles.load([block * KEY_ROWS, 0])
    else:
        at = [keys_begin + j * KEY_ROWS, key_head * DIM]
        keys, values = k_tiles.load(at).T, v_tiles.load(at)
    return keys, values


@triton.jit(do_not_specialize=["table_row", "tokens"])
def _forward(
    q, q_row, k_tiles, v_tiles, table, table_row, tile_T4, out, logsumexp, tokens, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, IS_PAGED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    key_head = head // (HEADS // KEY_HEADS)
    tile = tile_T4 + tl.program_id(1) * 4
    first, end, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= tokens:
        return
    row = tl.arange(0, ROWS)
    exists = first + row < end
    rows = (first + row).to(tl.int64)
    columns = head * DIM + tl.arange(0, DIM)
    queries = tl.load(q + rows[:, None] * q_row + columns[None, :], mask=exists[:, None], other=0.0)
    own_table = table + tl.load(tile + 3).to(tl.int64) * table_row if IS_PAGED else table
    keys_begin = first - position
    last_position = position + tl.minimum(ROWS, end - first) - 1
    visible_tiles = (position + 1) // KEY_ROWS
    tiles = last_position // KEY_ROWS + 1

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIM], tl.float32)
    block = key_block(own_table, 0, tiles, key_head, KEY_HEADS, IS_PAGED)
    for j in tl.range(0, visible_tiles, num_stages=STAGES):
        keys, values = key_tile(k_tiles, v_tiles, block, keys_begin, key_head, j, DIM, IS_PAGED)
        block = key_block(own_table, j + 1, tiles, key_head, KEY_HEADS, IS_PAGED)  # a tile ahead: no load waits for it
        maximum, total, attended = absorb_tile(queries, keys, values, row, maximum, total, attended, scale, False)
    for j in tl.range(visible_tiles, tiles, num_stages=STAGES):
        keys, values = key_tile(k_tiles, v_tiles, block, keys_begin, key_head, j, DIM, IS_PAGED)
        block = key_block(own_table, j + 1, tiles, key_head, KEY_HEADS, IS_PAGED)
        # Rows past the last position belong to another sequence or were never written, and zero times NaN is NaN.
        written = tl.arange(0, KEY_ROWS) + j * KEY_ROWS <= last_position
        values = tl.where(written[:, None], values, 0.0)
        offset = position + row - j * KEY_ROWS
        maximum, total, attended = absorb_tile(queries, keys, values, offset, maximum, total, attended, scale, True)

    attended = attended / total[:, None]
    to = out + rows[:, None] * (HEADS * DIM) + columns[None, :]
    tl.store(to, attended.to(out.dtype.element_ty), mask=exists[:, None])
    tl.store(logsumexp + head.to(tl.int64) * tokens + rows, (maximum + tl.log2(total)) * LN_2, mask=exists)


def _build(dim: int, is_paged: bool, rows: int, num_warps: int, num_stages: int) -> Build:
    rows_by_dim = f"tensordesc<bf16[{CHUNK_LENGTH}, {dim}]>"
    types = {
        "q": "*bf16", "q_row": "i32",
        "k_tiles": f"tensordesc<bf16[{dim}, {CHUNK_LENGTH}]>" if is_paged else rows_by_dim,
        "v_tiles": rows_by_dim,
        "table": "*i64", "table_row": "i32", "tile_T4": "*i32", "out": "*bf16", "logsumexp": "*fp32",
        "tokens": "i32", "scale": "fp32",
    }  # fmt: skip
    constants = {
        "HEADS": 16, "KEY_HEADS": 4, "DIM": dim, "ROWS": rows, "IS_PAGED": is_paged, "STAGES": num_stages
    }  # fmt: skip
    name = f"attention forward, {'pages' if is_paged else 'packed'}, D {dim}"
    return Build(name, _forward, types, constants, num_warps, num_stages, has_products=True, aligned=("q_row",))


_FORWARD: Mapping[tuple[int, bool], Build] = {
    (64, False): _build(64, False, rows=128, num_warps=4, num_stages=3),
    (64, True): _build(64, True, rows=128, num_warps=4, num_stages=3),
    (128, False): _build(128, False, rows=128, num_warps=8, num_stages=3),
    (128, True): _build(128, True, rows=128, num_warps=8, num_stages=3),
}

BUILDS: list[Build] = list(_FORWARD.values())

QUERY_ROWS = 128
"""Rows of a query tile in training and prefill; every entry of the table has it, so one `QueryTiles` serves all."""


def forward(
    q_NX: Tensor,
    k_NX: Tensor,
    v_NX: Tensor,
    heads: int,
    key_heads: int,
    tiles: QueryTiles,
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries to the packed keys and values of their own sequence, up to their own position.

    q_NX [N, H * D], k_NX and v_NX [N, K * D]: rotated, of one dtype; rows may be strided (columns of a wider tensor),
    addresses and row strides multiples of 16 bytes. tiles: of `query_tiles`, all starts 0. Returns the output in their
    dtype, [N, H * D], and the log-sum-exp of each query's scaled scores, float32 [H, N].
    """
    dim = q_NX.shape[1] // heads
    block = [CHUNK_LENGTH, dim]
    k_tiles, v_tiles = (TensorDescriptor(x, [*x.shape], [*x.stride()], block) for x in (k_NX, v_NX))
    return _launch(q_NX, k_tiles, v_tiles, None, heads, key_heads, tiles)


def forward_pages(
    q_NX: Tensor, pages: Pages, heads: int, key_heads: int, tiles: QueryTiles
) -> tuple[Tensor, Tensor]:
    """As `forward`, for pieces of sequences whose keys and values, the pieces' own among them, lie in pages.

    tiles: of `query_tiles` with the position at which each piece starts. The same bits as the whole sequence at once.
    """
    return _launch(q_NX, *page_tiles(pages), pages.table_BJ, heads, key_heads, tiles)


def page_tiles(pages: Pages) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Keys [D, C] and values [C, D] of a page and key head, as the kernels load them."""
    dim = pages.k_PKDC.shape[2]
    return (
        TensorDescriptor.from_tensor(pages.k_PKDC.view(-1, CHUNK_LENGTH), [dim, CHUNK_LENGTH]),
        TensorDescriptor.from_tensor(pages.v_PKCD.view(-1, dim), [CHUNK_LENGTH, dim]),
    )


def _launch(
    q_NX: Tensor,
    k_tiles: TensorDescriptor,
    v_tiles: TensorDescriptor,
    table_BJ: Tensor | None,
    heads: int,
    key_heads: int,
    tiles: QueryTiles,
) -> tuple[Tensor, Tensor]:
    tokens, columns = q_NX.shape
    dim = columns // heads
    build = _FORWARD[dim, table_BJ is not None]
    out = torch.empty(tokens, columns, device=q_NX.device, dtype=q_NX.dtype)
    logsumexp_HN = torch.empty(heads, tokens, device=q_NX.device, dtype=torch.float32)
    constants = {**build.constants, "HEADS": heads, "KEY_HEADS": key_heads}
    _forward[heads, len(tiles.tile_T4)](
        q_NX, q_NX.stride(0), k_tiles, v_tiles, table_BJ, 0 if table_BJ is None else table_BJ.stride(0),
        tiles.tile_T4, out, logsumexp_HN, tokens, dim**-0.5 * LOG2_E,
        **constants, num_warps=build.num_warps, num_stages=build.num_stages,
    )  # fmt: skip
    return out, logsumexp_HN
