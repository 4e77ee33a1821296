"""Softmax attention on CUDA: what `cispo.kernels.softmax_attention` calls for bfloat16 rows of head dim 64 or 128.

Training, prefill in pieces and decode rotate with one kernel and walk keys with one order of tiles and the same matrix
instructions, so a token's output has the same bits in all three.

N packed tokens, B sequences, X = (H + 2 K) * D columns of a projection, H query heads, K key heads, D head dim.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cispo.kernels.chunks import ChunkGrid
from cispo.kernels.gpu.attention import QUERY_ROWS, QueryTiles, forward, forward_pages, query_tiles
from cispo.kernels.gpu.attention_backward import KEY_TILE_ROWS, backward
from cispo.kernels.gpu.attention_decode import decode as decode_pages
from cispo.kernels.gpu.build import Build
from cispo.kernels.gpu.rotary import APPEND_ROWS, rotate, rotate_and_append, rotate_and_append_decode, rotate_back
from cispo.kernels.softmax_cpu import Pages

BUILDS: list[Build] = []
"""No kernel is here: each module that has some lists its own."""


class _Tiles(NamedTuple):
    queries: QueryTiles
    keys: QueryTiles
    append: QueryTiles


_TILES: WeakKeyDictionary[ChunkGrid, _Tiles] = WeakKeyDictionary()
"""Of every grid in use: the layers of a model share them."""


def _tiles(grid: ChunkGrid) -> _Tiles:
    if (known := _TILES.get(grid)) is not None:
        return known
    tokens = sum(grid.lengths)
    ends = torch.tensor([0, *accumulate(grid.lengths)], device=grid.device)
    starts = torch.tensor(grid.starts, device=grid.device)
    made = _Tiles(
        query_tiles(ends, tokens, QUERY_ROWS, starts),
        query_tiles(ends, tokens, KEY_TILE_ROWS, is_of_keys=True),
        query_tiles(ends, tokens, APPEND_ROWS, starts),
    )
    _TILES[grid] = made
    return made


def _forward(
    qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, tiles: QueryTiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, the output, and the log-sum-exp."""
    qk = rotate(qkv_NX, rotary_N2R, heads, key_heads)
    q, k = qk.split(_widths(qk, heads, key_heads), dim=1)
    out, logsumexp = forward(q, k, qkv_NX[:, qk.shape[1] :], heads, key_heads, tiles)
    return qk, out, logsumexp


def _widths(qk_NX: Tensor, heads: int, key_heads: int) -> list[int]:
    dim = qk_NX.shape[1] // (heads + key_heads)
    return [heads * dim, key_heads * dim]


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, tiles: _Tiles
    ) -> Tensor:
        qk, out, logsumexp = _forward(qkv_NX, rotary_N2R, heads, key_heads, tiles.queries)
        ctx.save_for_backward(qkv_NX, rotary_N2R, qk, out, logsumexp)
        ctx.heads, ctx.key_heads, ctx.tiles = heads, key_heads, tiles
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, rotary, qk, out, logsumexp = ctx.saved_tensors
        heads, key_heads, tiles = ctx.heads, ctx.key_heads, ctx.tiles
        q, k = qk.split(_widths(qk, heads, key_heads), dim=1)
        inner = qk.shape[1]
        dqkv, dqk = torch.empty_like(qkv), torch.empty_like(qk, dtype=torch.float32)
        dout = gradients[0].to(qkv.dtype).contiguous()
        backward(
            q, k, qkv[:, inner:], out, dout, logsumexp, heads, key_heads, tiles.queries, tiles.keys, dqk,
            dqkv[:, inner:],
        )  # fmt: skip
        rotate_back(dqk, rotary, heads, key_heads, dqkv)
        return dqkv, None, None, None, None


_differentiable: Callable[..., Tensor] = _SoftmaxAttention.apply


def attention(qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, grid: ChunkGrid) -> Tensor:
    """Causal attention of packed sequences, [N, H * D] in the dtype of qkv_NX, in which it is differentiable."""
    qkv_NX, rotary_N2R, tiles = qkv_NX.contiguous(), rotary_N2R.contiguous(), _tiles(grid)
    if torch.is_grad_enabled() and qkv_NX.requires_grad:
        return _differentiable(qkv_NX, rotary_N2R, heads, key_heads, tiles)
    return _forward(qkv_NX, rotary_N2R, heads, key_heads, tiles.queries)[1]


def prefill(
    qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, grid: ChunkGrid, pages: Pages
) -> Tensor:
    """Pieces against all keys of their sequences up to their own, which are left in `pages`; [N, H * D]."""
    qkv_NX, rotary_N2R, tiles = qkv_NX.contiguous(), rotary_N2R.contiguous(), _tiles(grid)
    q = rotate_and_append(qkv_NX, rotary_N2R, heads, key_heads, pages, tiles.append)
    return forward_pages(q, pages, heads, key_heads, tiles.queries)[0]


def decode(
    qkv_BX: Tensor, rotary_B2R: Tensor, heads: int, key_heads: int, pages: Pages, position_B: Tensor
) -> Tensor:
    """One token of each sequence, appended to its pages, against all its keys; [B, H * D]. Safe in a CUDA graph."""
    q = rotate_and_append_decode(qkv_BX.contiguous(), rotary_B2R.contiguous(), heads, key_heads, pages, position_B)
    return decode_pages(q, pages, heads, key_heads, position_B)
