"""Gradients of softmax attention of packed tokens, in two passes without atomics: queries, then keys and values.

Each pass makes the weights again from the log-sum-exp (arXiv 2205.14135, algorithm 4) and sums in one order: a query
tile walks its key tiles from position 0, a key tile the query tiles from its own on, head after head of its group. So
gradients are the same in every run, and those of a sequence do not depend on what is packed beside it.

N packed tokens, H query heads, K key heads, D head dim, M rows of a query tile, C keys of a key tile.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cispo.kernels.chunks import CHUNK_LENGTH
from cispo.kernels.gpu.attention import KEY_ROWS, LOG2_E, QueryTiles, key_tile
from cispo.kernels.gpu.build import Build

LOG2 = tl.constexpr(LOG2_E)


@triton.jit
def _absorb_keys(q, dout, k, v, hidden_rows, logsumexp, delta, dq, scale, IS_MASKED: tl.constexpr):
    """Add what keys k [D, C] and values v [C, D] give to dq [M, D]; logsumexp in units of log2."""
    scores = tl.dot(q, k)
    if IS_MASKED:
        scores = tl.where(tl.arange(0, KEY_ROWS)[None, :] <= hidden_rows[:, None], scores, float("-inf"))
    weights = tl.exp2(tl.fma(scores, scale, -logsumexp[:, None]))
    dscores = weights * (tl.dot(dout, v.T) - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k.T, dq)


@triton.jit(do_not_specialize=["tokens"])
def _query_gradients(
    q, q_row, k_tiles, v_tiles, out, dout, logsumexp, tile_T4, delta, dq, dq_row, tokens, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
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
    at = rows[:, None] * (HEADS * DIM) + columns[None, :]
    douts = tl.load(dout + at, mask=exists[:, None], other=0.0)
    outs = tl.load(out + at, mask=exists[:, None], other=0.0)
    deltas = tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1)
    of_head = head.to(tl.int64) * tokens + rows
    tl.store(delta + of_head, deltas, mask=exists)
    # Rows that do not exist have weights of zero.
    sums = tl.load(logsumexp + of_head, mask=exists, other=float("inf")) * LOG2

    begin = first - position
    visible_tiles = (position + 1) // KEY_ROWS
    tiles = (position + tl.minimum(ROWS, end - first) - 1) // KEY_ROWS + 1
    dqueries = tl.zeros([ROWS, DIM], tl.float32)
    for j in tl.range(0, visible_tiles, num_stages=STAGES):
        keys, values = key_tile(k_tiles, v_tiles, 0, begin, key_head, j, DIM, False)
        dqueries = _absorb_keys(queries, douts, keys, values, row, sums, deltas, dqueries, scale, False)
    for j in tl.range(visible_tiles, tiles, num_stages=STAGES):
        keys, values = key_tile(k_tiles, v_tiles, 0, begin, key_head, j, DIM, False)
        offset = position + row - j * KEY_ROWS
        dqueries = _absorb_keys(queries, douts, keys, values, offset, sums, deltas, dqueries, scale, True)
    to = dq + rows[:, None] * dq_row + columns[None, :]
    tl.store(to, dqueries * (scale / LOG2), mask=exists[:, None])


@triton.jit
def _absorb_queries(
    k, v, q_tiles, dout_tiles, logsumexp, delta, of_head, head, from_row, end, first_key, dk, dv, scale,
    DIM: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the tile of queries from packed row from_row on gives to dk and dv [C, D]."""
    rows = from_row + tl.arange(0, ROWS)
    queries, douts = q_tiles.load([from_row, head * DIM]), dout_tiles.load([from_row, head * DIM])
    # Rows past the end belong to another sequence: weights of zero.
    sums = tl.load(logsumexp + of_head + rows, mask=rows < end, other=float("inf")) * LOG2
    deltas = tl.load(delta + of_head + rows, mask=rows < end, other=0.0)
    scores = tl.dot(k, queries.T)
    if IS_MASKED:
        scores = tl.where(rows[None, :] >= (first_key + tl.arange(0, KEYS))[:, None], scores, float("-inf"))
    weights = tl.exp2(tl.fma(scores, scale, -sums[None, :]))
    dv = tl.dot(weights.to(douts.dtype), douts, dv)
    dscores = weights * (tl.dot(v, douts.T) - deltas[None, :])
    dk = tl.dot(dscores.to(queries.dtype), queries, dk)
    return dk, dv


@triton.jit(do_not_specialize=["tokens"])
def _key_gradients(
    q_tiles, dout_tiles, k_tiles, v_tiles, logsumexp, delta, tile_T4, dk, dk_row, dv, dv_row, tokens, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(0)
    tile = tile_T4 + tl.program_id(1) * 4
    first, end = tl.load(tile), tl.load(tile + 1)
    if first >= tokens:
        return
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    tl.static_assert(KEYS % ROWS == 0)  # the masked query tiles end where the others begin
    key = tl.arange(0, KEYS)
    exists = (first + key < end)[:, None]
    at = (first + key).to(tl.int64)[:, None]
    columns = (key_head * DIM + tl.arange(0, DIM))[None, :]
    keys, values = k_tiles.load([first, key_head * DIM]), v_tiles.load([first, key_head * DIM])
    dkeys = tl.zeros([KEYS, DIM], tl.float32)
    dvalues = tl.zeros([KEYS, DIM], tl.float32)
    after = tl.minimum(first + KEYS, end)
    for member in tl.range(0, GROUP, num_stages=1):
        head = key_head * GROUP + member
        of_head = head.to(tl.int64) * tokens
        for row in tl.range(first, after, ROWS, num_stages=STAGES):
            dkeys, dvalues = _absorb_queries(
                keys, values, q_tiles, dout_tiles, logsumexp, delta, of_head, head, row, end, first, dkeys, dvalues,
                scale, DIM, KEYS, ROWS, True,
            )  # fmt: skip
        for row in tl.range(first + KEYS, end, ROWS, num_stages=STAGES):
            dkeys, dvalues = _absorb_queries(
                keys, values, q_tiles, dout_tiles, logsumexp, delta, of_head, head, row, end, first, dkeys, dvalues,
                scale, DIM, KEYS, ROWS, False,
            )  # fmt: skip
    tl.store(dk + at * dk_row + columns, dkeys * (scale / LOG2), mask=exists)
    tl.store(dv + at * dv_row + columns, dvalues.to(dv.dtype.element_ty), mask=exists)


def _build_queries(dim: int, rows: int, num_warps: int, num_stages: int) -> Build:
    tiles = f"tensordesc<bf16[{CHUNK_LENGTH}, {dim}]>"
    types = {
        "q": "*bf16", "q_row": "i32", "k_tiles": tiles, "v_tiles": tiles, "out": "*bf16", "dout": "*bf16",
        "logsumexp": "*fp32", "tile_T4": "*i32", "delta": "*fp32", "dq": "*fp32", "dq_row": "i32", "tokens": "i32",
        "scale": "fp32",
    }  # fmt: skip
    constants = {"HEADS": 16, "KEY_HEADS": 4, "DIM": dim, "ROWS": rows, "STAGES": num_stages}
    name = f"attention backward, queries, D {dim}"
    return Build(name, _query_gradients, types, constants, num_warps, num_stages, True, ("q_row", "dq_row"))


def _build_keys(dim: int, keys: int, rows: int, num_warps: int, num_stages: int) -> Build:
    tiles, key_tiles = (f"tensordesc<bf16[{count}, {dim}]>" for count in (rows, keys))
    types = {
        "q_tiles": tiles, "dout_tiles": tiles, "k_tiles": key_tiles, "v_tiles": key_tiles,
        "logsumexp": "*fp32", "delta": "*fp32", "tile_T4": "*i32", "dk": "*fp32", "dk_row": "i32", "dv": "*bf16",
        "dv_row": "i32", "tokens": "i32", "scale": "fp32",
    }  # fmt: skip
    constants = {"HEADS": 16, "KEY_HEADS": 4, "DIM": dim, "KEYS": keys, "ROWS": rows, "STAGES": num_stages}
    name = f"attention backward, keys and values, D {dim}"
    aligned = ("dk_row", "dv_row")
    return Build(name, _key_gradients, types, constants, num_warps, num_stages, True, aligned)


_QUERIES: Mapping[int, Build] = {
    64: _build_queries(64, rows=128, num_warps=8, num_stages=3),
    128: _build_queries(128, rows=128, num_warps=8, num_stages=3),
}
_KEYS: Mapping[int, Build] = {
    64: _build_keys(64, keys=64, rows=64, num_warps=4, num_stages=2),
    128: _build_keys(128, keys=64, rows=32, num_warps=4, num_stages=2),
}

BUILDS: list[Build] = [*_QUERIES.values(), *_KEYS.values()]

KEY_TILE_ROWS = 64
"""Rows of the key tiles that `backward` takes; every entry of the table has it."""


def backward(
    q_NX: Tensor,
    k_NX: Tensor,
    v_NX: Tensor,
    out_NX: Tensor,
    dout_NX: Tensor,
    logsumexp_HN: Tensor,
    heads: int,
    key_heads: int,
    query_tiles: QueryTiles,
    key_tiles: QueryTiles,
    dqk_NX: Tensor,
    dv_NX: Tensor,
) -> None:
    """Gradients of `forward` into dqk_NX, float32 [N, (H + K) * D] of rotated queries and keys, and dv_NX, [N, K * D].

    Operands as `forward` took and gave them; dout_NX contiguous in their dtype. dv_NX may be columns of a wider tensor.
    key_tiles: of `query_tiles` with KEY_TILE_ROWS and is_of_keys.
    """
    tokens, columns = q_NX.shape
    dim = columns // heads
    dq_NX, dk_NX = dqk_NX.split([columns, key_heads * dim], dim=1)
    delta_HN = torch.empty_like(logsumexp_HN)
    scale = dim**-0.5 * LOG2_E
    build, shape = _QUERIES[dim], {"HEADS": heads, "KEY_HEADS": key_heads}
    _query_gradients[heads, len(query_tiles.tile_T4)](
        q_NX, q_NX.stride(0), _tiles(k_NX, CHUNK_LENGTH, dim), _tiles(v_NX, CHUNK_LENGTH, dim), out_NX, dout_NX,
        logsumexp_HN, query_tiles.tile_T4, delta_HN, dq_NX, dq_NX.stride(0), tokens, scale,
        **{**build.constants, **shape}, num_warps=build.num_warps, num_stages=build.num_stages,
    )  # fmt: skip
    build = _KEYS[dim]
    keys, rows = build.constants["KEYS"], build.constants["ROWS"]
    _key_gradients[key_heads, len(key_tiles.tile_T4)](
        _tiles(q_NX, rows, dim), _tiles(dout_NX, rows, dim), _tiles(k_NX, keys, dim), _tiles(v_NX, keys, dim),
        logsumexp_HN, delta_HN, key_tiles.tile_T4, dk_NX, dk_NX.stride(0), dv_NX, dv_NX.stride(0), tokens, scale,
        **{**build.constants, **shape}, num_warps=build.num_warps, num_stages=build.num_stages,
    )  # fmt: skip


def _tiles(x_NX: Tensor, rows: int, dim: int) -> TensorDescriptor:
    return TensorDescriptor(x_NX, [*x_NX.shape], [*x_NX.stride()], [rows, dim])
