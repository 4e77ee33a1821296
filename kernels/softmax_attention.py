"""Causal softmax attention with rotary embedding, in one order of key tiles in training, prefill and decode.

Keys are walked in tiles of 64 from the start of the sequence with the online softmax of FlashAttention (arXiv
2205.14135, algorithm 1): running row maximum m, running sum l, running output. A query meets the same tiles in the same
order whether it is one of many in training or alone in decode, so it gets the same bits. Arithmetic is float32.

Float32 on CPU goes to the kernels in kernels/cpu (`softmax_cpu`) for head dims that are multiples of 16 up to 128, and
bfloat16 on CUDA to Triton (kernels/gpu/softmax.py) for head dims 64 and 128; here is their plain-PyTorch twin, for
everything else. All keep keys across, [D, C], in pages and tiles. On CUDA operands and outputs are bfloat16 there.

N packed tokens, X = (H + 2 K) * D columns of their projection (queries, keys, values), M chunks (query and key tiles
alike), B sequences, H query heads, K key heads, G = H / K query heads a key head, C = 64 rows of a tile, D head dim,
R / 2 pairs of rotated dims, P pages of a cache, J pages of a sequence.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels import softmax_cpu
from cispo.kernels.chunks import CHUNK_LENGTH, ChunkGrid
from cispo.kernels.softmax_cpu import Pages

_QUERY_ROWS = 4
"""Rows that one decoded query is padded to: a single row takes another path through the library's product."""

_TRITON_DIMS = (64, 128)
_TRITON_ROWS = 64
"""Query heads of a key head that fit the tile of the decode kernel."""

_Running = tuple[Tensor, Tensor, Tensor]


def rotate(x_NHD: Tensor, rotary_N2R: Tensor) -> Tensor:
    """Rotate the first dims of each head by cosines and sines, dim i with i + R / 2; the rest passes through."""
    half = rotary_N2R.shape[2]
    cos, sin = rotary_N2R[:, 0].unsqueeze(1), rotary_N2R[:, 1].unsqueeze(1)
    first, second, rest = x_NHD.float().split([half, half, x_NHD.shape[2] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x_NHD.dtype)


def _rotated_heads(qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 queries (scaled), keys and values, [N, H or K, D]."""
    qkv = qkv_NX.view(qkv_NX.shape[0], heads + 2 * key_heads, -1)
    q, k, v = qkv.split([heads, key_heads, key_heads], dim=1)
    return rotate(q, rotary_N2R).float() * q.shape[2] ** -0.5, rotate(k, rotary_N2R).float(), v.float()


def _absorb_tile(running: _Running, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> _Running:
    """Take one key tile into (maximum, sum, output) of rows q [X, rows, D]; k [X, D, C], v [X, C, D]."""
    maximum, total, out = running
    scores = torch.bmm(q, k).masked_fill_(hidden, float("-inf"))
    new_maximum = torch.maximum(maximum, scores.amax(-1, keepdim=True))
    weights = torch.exp(scores.sub_(new_maximum))
    keep = torch.exp(maximum - new_maximum)
    return new_maximum, total * keep + weights.sum(-1, keepdim=True), out * keep + torch.bmm(weights, v)


def _empty(q: Tensor) -> _Running:
    rows = q.shape[:2]
    return q.new_full((*rows, 1), float("-inf")), q.new_zeros(*rows, 1), torch.zeros_like(q)


class _SoftmaxAttention(torch.autograd.Function):
    """On grids: q [M, K, G*C, D] (already scaled), k [M, K, D, C], v [M, K, C, D]; output as q."""

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
            scores = torch.bmm(qj, kj)
            hidden = _future_mask(grid, queries, j, key_heads, rows)
            weights = torch.exp(scores.masked_fill_(hidden, float("-inf")).sub_(lsej))
            dscores = torch.bmm(doutj, vj.transpose(1, 2)).sub_(deltaj).mul_(weights)
            dq.index_add_(0, queries, torch.bmm(dscores, kj.transpose(1, 2)).view(-1, *q.shape[1:]))
            dk.index_add_(0, keys, torch.bmm(qj.transpose(1, 2), dscores).view(-1, *k.shape[1:]))
            dv.index_add_(0, keys, torch.bmm(weights.transpose(1, 2), doutj).view(-1, *v.shape[1:]))
        return dq, dk, dv, None


def _future_mask(grid: ChunkGrid, queries: Tensor, j: int, key_heads: int, rows: int) -> Tensor:
    """True where a key of tile j lies after the query: inside the diagonal tile only; [X * K, rows, C]."""
    row_C = torch.arange(CHUNK_LENGTH, device=queries.device)
    future_RC = (row_C[None, :] > row_C[:, None]).repeat(rows // CHUNK_LENGTH, 1)
    is_diagonal = (grid.chunk_index_M.index_select(0, queries) == j).repeat_interleave(key_heads)
    return is_diagonal[:, None, None] & future_RC


def _on_grid(
    qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, grid: ChunkGrid
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [M, K, G*C, D], keys [M, K, D, C] and values [M, K, C, D], rotated and scaled."""
    grid.refuse_branches()
    q, k, v = _rotated_heads(qkv_NX, rotary_N2R, heads, key_heads)
    q = grid.scatter(q).view(-1, key_heads, heads // key_heads * CHUNK_LENGTH, q.shape[2])
    return q, grid.scatter(k).transpose(2, 3).contiguous(), grid.scatter(v)


def _twin_attention(qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, grid: ChunkGrid) -> Tensor:
    q, k, v = _on_grid(qkv_NX, rotary_N2R, heads, key_heads, grid)
    apply: Callable[..., Tensor] = _SoftmaxAttention.apply
    return grid.gather(apply(q, k, v, grid).view(-1, heads, CHUNK_LENGTH, v.shape[3])).flatten(1)


def _twin_prefill(
    qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, grid: ChunkGrid, pages: Pages
) -> Tensor:
    q, k, v = _on_grid(qkv_NX, rotary_N2R, heads, key_heads, grid)
    _write_pages(k, v, grid, pages)
    rows = q.shape[2]
    state = [x.view(*q.shape[:3], -1) for x in _empty(q.flatten(0, 1))]
    for j in range(int(grid.chunk_index_M.max()) + 1):
        queries = torch.nonzero(grid.chunk_index_M >= j).squeeze(1)
        page = pages.table_BJ[grid.piece_M.index_select(0, queries), j]
        tiles = [x.index_select(0, queries).flatten(0, 1) for x in state]
        keys, values = (x.index_select(0, page).flatten(0, 1).float() for x in pages[:2])
        hidden = _future_mask(grid, queries, j, key_heads, rows)
        updated = _absorb_tile(
            (tiles[0], tiles[1], tiles[2]), q.index_select(0, queries).flatten(0, 1), keys, values, hidden
        )
        for x, new in zip(state, updated, strict=True):
            x.index_copy_(0, queries, new.view(-1, key_heads, rows, x.shape[3]))
    _, total, out = state
    return grid.gather((out / total).view(-1, heads, CHUNK_LENGTH, v.shape[3])).flatten(1)


def _write_pages(k: Tensor, v: Tensor, grid: ChunkGrid, pages: Pages) -> None:
    """Leave keys [M, K, D, C] and values [M, K, C, D] in their pages, but for the rows that were there before."""
    page_M = pages.table_BJ[grid.piece_M, grid.chunk_index_M]
    first = torch.tensor(grid.starts, device=k.device) % CHUNK_LENGTH
    row_M1C = torch.arange(CHUNK_LENGTH, device=k.device).expand(grid.chunks, 1, CHUNK_LENGTH)
    is_before = torch.zeros_like(row_M1C, dtype=torch.bool)
    is_before[grid.first_chunk_B] = row_M1C[: len(first)] < first.view(-1, 1, 1)
    for cache, new, there in ((pages.k_PKDC, k, is_before.unsqueeze(2)), (pages.v_PKCD, v, is_before.unsqueeze(3))):
        cache.index_copy_(0, page_M, torch.where(there, cache.index_select(0, page_M), new.to(cache.dtype)))


def _head_dim(qkv_NX: Tensor, heads: int, key_heads: int) -> int:
    return qkv_NX.shape[1] // (heads + 2 * key_heads)


def is_for_triton(like: Tensor, heads: int, key_heads: int, dim: int) -> bool:
    """Whether the CUDA kernels take rows of this dtype and device: the same in training, prefill and decode."""
    if not like.is_cuda or like.dtype is not torch.bfloat16:
        return False
    return dim in _TRITON_DIMS and heads <= key_heads * _TRITON_ROWS


def softmax_attention(qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, grid: ChunkGrid) -> Tensor:
    """Causal attention within each packed sequence, scaled by 1/sqrt(D); [N, H * D], differentiable in qkv.

    Float32, but in the dtype of qkv_NX where Triton serves it.

    The CPU kernels take branches too: their queries see the keys of their prompt and their own. The others refuse them.

    qkv_NX: projections, queries of H heads, then keys and values of K; query head h reads key head h // (H / K).
    rotary_N2R: cosines and sines of each token's position, float32 [N, 2, R / 2]; see `rotate`.
    """
    if softmax_cpu.serves(qkv_NX, rotary_N2R, _head_dim(qkv_NX, heads, key_heads)):
        return softmax_cpu.attention(qkv_NX, rotary_N2R, heads, key_heads, grid)
    grid.refuse_branches()
    if is_for_triton(qkv_NX, heads, key_heads, _head_dim(qkv_NX, heads, key_heads)):
        from cispo.kernels.gpu import softmax

        return softmax.attention(qkv_NX, rotary_N2R, heads, key_heads, grid)
    return _twin_attention(qkv_NX, rotary_N2R, heads, key_heads, grid)


def softmax_prefill(
    qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, grid: ChunkGrid, pages: Pages
) -> Tensor:
    """`softmax_attention` of pieces against all earlier keys of their sequences, which are in `pages`.

    The rotated keys and the values of every piece are left there too, for the next piece or `softmax_decode` to go on
    from. pages.table_BJ has a row a piece. Not differentiable.
    """
    if softmax_cpu.serves(qkv_NX, rotary_N2R, _head_dim(qkv_NX, heads, key_heads)):
        return softmax_cpu.prefill(qkv_NX, rotary_N2R, heads, key_heads, grid, pages)
    if is_for_triton(qkv_NX, heads, key_heads, _head_dim(qkv_NX, heads, key_heads)):
        from cispo.kernels.gpu import softmax

        return softmax.prefill(qkv_NX, rotary_N2R, heads, key_heads, grid, pages)
    return _twin_prefill(qkv_NX, rotary_N2R, heads, key_heads, grid, pages)


def softmax_decode(
    qkv_BX: Tensor, rotary_B2R: Tensor, heads: int, key_heads: int, pages: Pages, position_B: Tensor, active: int
) -> Tensor:
    """One more token of each sequence, appended to its pages, against all its keys; [B, H * D], as `softmax_attention`.

    position_B: position of the token, int64; pages.table_BJ reaches the longest sequence at least. Rows from `active`
    on are idle: their outputs are of no use, and their page (which may be shared by idle rows alone) too.
    """
    if softmax_cpu.serves(qkv_BX, rotary_B2R, _head_dim(qkv_BX, heads, key_heads)):
        return softmax_cpu.decode(qkv_BX, rotary_B2R, heads, key_heads, pages, position_B, active)
    if is_for_triton(qkv_BX, heads, key_heads, _head_dim(qkv_BX, heads, key_heads)):
        from cispo.kernels.gpu import softmax

        return softmax.decode(qkv_BX, rotary_B2R, heads, key_heads, pages, position_B)
    return _twin_decode(qkv_BX, rotary_B2R, heads, key_heads, pages, position_B)


def _twin_decode(
    qkv_BX: Tensor, rotary_B2R: Tensor, heads: int, key_heads: int, pages: Pages, position_B: Tensor
) -> Tensor:
    k_pages, v_pages, table_BJ = pages
    q, k, v = _rotated_heads(qkv_BX, rotary_B2R, heads, key_heads)
    batch, dim = q.shape[0], q.shape[2]
    page_B = table_BJ.gather(1, position_B.unsqueeze(1) // CHUNK_LENGTH).squeeze(1)
    row_B = position_B % CHUNK_LENGTH
    k_pages[page_B, :, :, row_B] = k.to(k_pages.dtype)
    v_pages[page_B, :, row_B] = v.to(v_pages.dtype)
    group = heads // key_heads
    q = F.pad(q.view(batch * key_heads, group, dim), (0, 0, 0, -group % _QUERY_ROWS))
    key_C = torch.arange(CHUNK_LENGTH, device=q.device)
    running = _empty(q)
    for j in range(table_BJ.shape[1]):
        k, v = (x.index_select(0, table_BJ[:, j]).flatten(0, 1).float() for x in (k_pages, v_pages))
        # A tile past the end of a sequence is hidden whole: weights of zero leave what is there as it is, whatever the
        # page held before (but a value times zero must be zero).
        hidden_BC = (key_C + j * CHUNK_LENGTH > position_B.unsqueeze(1)).repeat_interleave(key_heads, 0)
        v = v.masked_fill_(hidden_BC.unsqueeze(2), 0.0)
        running = _absorb_tile(running, q, k, v, hidden_BC.unsqueeze(1))
    _, total, out = running
    return (out / total)[:, :group].reshape(batch, heads * dim)
