"""Causal softmax attention in plain PyTorch, in one order of key tiles in training, prefill and decode.

Keys are walked in tiles of 64 from the start of the sequence with the online softmax of FlashAttention (arXiv
2205.14135, algorithm 1): running row maximum m, running sum l, running output. A query meets the same tiles in the same
order whether it is one of many in training or alone in decode, so it gets the same bits. Arithmetic is float32.

N packed tokens, M chunks (query and key tiles alike), B sequences, H query heads, K key heads, G = H / K query heads a
key head, C = 64 rows of a tile, D head dim, P pages of a cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH, ChunkGrid
from cispo.kernels.lightning_attention import QUERY_ROWS

_Running = tuple[Tensor, Tensor, Tensor]


def _absorb_tile(running: _Running, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> _Running:
    """Take one key tile into (maximum, sum, output) of rows q [X, R, D]; keys [X, C, D]; hidden marks masked scores."""
    maximum, total, out = running
    scores = torch.bmm(q, k.transpose(1, 2))
    if hidden is not None:
        scores = scores.masked_fill_(hidden, float("-inf"))
    new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
    weights = torch.exp(scores.sub_(new_maximum))
    keep = torch.exp(maximum - new_maximum)
    return new_maximum, total * keep + weights.sum(-1, keepdim=True), out * keep + torch.bmm(weights, v)


def _empty(q: Tensor) -> _Running:
    rows = q.shape[:2]
    return q.new_full((*rows, 1), float("-inf")), q.new_zeros(*rows, 1), torch.zeros_like(q)


class _SoftmaxAttention(torch.autograd.Function):
    """On grids: q [M, K, G*C, D] (already scaled), k and v [M, K, C, D]; output as q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, grid: ChunkGrid) -> Tensor:
        chunks, key_heads, rows, _ = q.shape
        state = _empty(q.flatten(0, 1))
        per_chunk = [x.view(chunks, key_heads, rows, -1) for x in state]
        for j, (queries, keys) in enumerate(grid.steps):
            tiles = [x.index_select(0, queries).flatten(0, 1) for x in per_chunk]
            updated = _absorb_tile(
                (tiles[0], tiles[1], tiles[2]),
                q.index_select(0, queries).flatten(0, 1),
                k.index_select(0, keys).flatten(0, 1),
                v.index_select(0, keys).flatten(0, 1),
                _future_mask(grid, queries, j, key_heads, rows),
            )
            for x, new in zip(per_chunk, updated, strict=True):
                x.index_copy_(0, queries, new.view(-1, key_heads, rows, x.shape[3]))
        maximum, total, out = per_chunk
        out = out / total
        ctx.save_for_backward(q, k, v, out, maximum + total.log())
        ctx.grid = grid
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        grid: ChunkGrid = ctx.grid
        dout = gradients[0].contiguous()
        _, key_heads, rows, _ = q.shape
        delta = (dout * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for j, (queries, keys) in enumerate(grid.steps):
            qj, doutj, lsej, deltaj = (x.index_select(0, queries).flatten(0, 1) for x in (q, dout, logsumexp, delta))
            kj, vj = (x.index_select(0, keys).flatten(0, 1) for x in (k, v))
            scores = torch.bmm(qj, kj.transpose(1, 2))
            hidden = _future_mask(grid, queries, j, key_heads, rows)
            weights = torch.exp(scores.masked_fill_(hidden, float("-inf")).sub_(lsej))
            dscores = torch.bmm(doutj, vj.transpose(1, 2)).sub_(deltaj).mul_(weights)
            dq.index_add_(0, queries, torch.bmm(dscores, kj).view(-1, *q.shape[1:]))
            dk.index_add_(0, keys, torch.bmm(dscores.transpose(1, 2), qj).view(-1, *k.shape[1:]))
            dv.index_add_(0, keys, torch.bmm(weights.transpose(1, 2), doutj).view(-1, *v.shape[1:]))
        return dq, dk, dv, None


def _future_mask(grid: ChunkGrid, queries: Tensor, j: int, key_heads: int, rows: int) -> Tensor:
    """True where a key of tile j lies after the query: inside the diagonal tile only; [X * K, rows, C]."""
    row_C = torch.arange(CHUNK_LENGTH, device=queries.device)
    future_RC = (row_C[None, :] > row_C[:, None]).repeat(rows // CHUNK_LENGTH, 1)
    is_diagonal = (grid.chunk_index_M.index_select(0, queries) == j).repeat_interleave(key_heads)
    return is_diagonal[:, None, None] & future_RC


def softmax_attention(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, grid: ChunkGrid) -> Tensor:
    """Causal attention within each packed sequence, scaled by 1/sqrt(D); float32 [N, H, D].

    q_NHD: queries; k_NKD, v_NKD: keys and values of K heads, query head h reads key head h // (H / K).
    """
    heads, dim = q_NHD.shape[1:]
    key_heads = k_NKD.shape[1]
    q = grid.scatter(q_NHD.float() * dim**-0.5)
    q = q.view(-1, key_heads, heads // key_heads * CHUNK_LENGTH, dim)
    apply: Callable[..., Tensor] = _SoftmaxAttention.apply
    out = apply(q, grid.scatter(k_NKD.float()), grid.scatter(v_NKD.float()), grid)
    return grid.gather(out.view(-1, heads, CHUNK_LENGTH, dim))


@dataclass(frozen=True, slots=True, eq=False)
class DecodeTile:
    """One key tile of a decode step: its page for each sequence, and what the masks of all softmax layers are.

    hidden_B11C: True where a key is not before the query, or None if no key is. reached_B1: False for the sequences
    that end before this tile, or None if none does.
    """

    page_B: Tensor
    hidden_B11C: Tensor | None
    reached_B1: Tensor | None


def softmax_decode(q_BHD: Tensor, k_pages_PKCD: Tensor, v_pages_PKCD: Tensor, tiles: Sequence[DecodeTile]) -> Tensor:
    """One query for each of B sequences against the pages of its tiles, in order; float32 [B, H, D].

    The query's own key is in its page already.
    """
    batch, heads, dim = q_BHD.shape
    key_heads = k_pages_PKCD.shape[1]
    group = heads // key_heads
    spare = -group % QUERY_ROWS
    q = F.pad((q_BHD.float() * dim**-0.5).view(batch * key_heads, group, dim), (0, 0, 0, spare))
    running = _empty(q)
    for tile in tiles:
        k, v = (pages.index_select(0, tile.page_B).flatten(0, 1) for pages in (k_pages_PKCD, v_pages_PKCD))
        hidden = tile.hidden_B11C
        if hidden is not None:
            hidden = hidden.expand(-1, key_heads, 1, -1).reshape(-1, 1, CHUNK_LENGTH)
        updated = _absorb_tile(running, q, k, v, hidden)
        if tile.reached_B1 is not None:
            reached = tile.reached_B1.expand(-1, key_heads).reshape(-1, 1, 1)
            updated = (
                torch.where(reached, updated[0], running[0]),
                torch.where(reached, updated[1], running[1]),
                torch.where(reached, updated[2], running[2]),
            )
        running = updated
    _, total, out = running
    return (out / total)[:, :group].reshape(batch, heads, dim)
