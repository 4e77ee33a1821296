"""Calls of the CPU kernels of causal softmax attention, kernels/cpu/softmax*.cpp.

`cispo.kernels.softmax_attention` chooses between them and the plain-PyTorch twin.

N packed tokens, B sequences, X = (H + 2 K) * D columns of the projection, H query heads, K key heads, D head dim,
R / 2 pairs of rotated dims, C = 64 rows of a page, P pages of a cache, J pages of a sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.chunks import ChunkGrid
from cispo.kernels.cpu_library import CpuFunction

_LANES = 16
_LARGEST_DIM = 128

_forward = CpuFunction("softmax_forward", "pppppiiiiipppppii")
_backward = CpuFunction("softmax_backward", "pppppiiiiippppi")
_decode = CpuFunction("softmax_decode", "ppniiiipppippt")


class Pages(NamedTuple):
    """Pages of keys and values (contiguous, one dtype), and which of them each sequence has (int64, in order)."""

    k_PKDC: Tensor
    v_PKCD: Tensor
    table_BJ: Tensor


def serves(qkv_NX: Tensor, rotary_N2R: Tensor, dim: int) -> bool:
    """Whether the kernels take these operands; it depends on dtype, device and head dim, never on how many rows."""
    return dim % _LANES == 0 and dim <= _LARGEST_DIM and cpu_library.serves(qkv_NX, rotary_N2R)


def _packing(grid: ChunkGrid) -> tuple[Tensor, Tensor, Tensor, int]:
    return grid.ends_B, grid.starts_B, grid.families_F, len(grid.families) - 1


def _attend(
    qkv_NX: Tensor,
    rotary_N2R: Tensor,
    heads: int,
    key_heads: int,
    grid: ChunkGrid,
    pages: Pages | None = None,
    logsumexp_NH: Tensor | None = None,
) -> Tensor:
    tokens, columns = qkv_NX.shape
    dim = columns // (heads + 2 * key_heads)
    out = torch.empty(tokens, heads * dim)
    _forward(
        qkv_NX, rotary_N2R, *_packing(grid), heads, key_heads, dim, rotary_N2R.shape[2],
        out, logsumexp_NH, *(pages or (None, None, None)), pages.table_BJ.stride(0) if pages else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_NX: Tensor,
        rotary_N2R: Tensor,
        heads: int,
        key_heads: int,
        grid: ChunkGrid,
    ) -> Tensor:
        logsumexp = torch.empty(qkv_NX.shape[0], heads)
        out = _attend(qkv_NX, rotary_N2R, heads, key_heads, grid, None, logsumexp)
        ctx.save_for_backward(qkv_NX, rotary_N2R, out, logsumexp)
        ctx.heads, ctx.key_heads, ctx.grid = heads, key_heads, grid
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, rotary, out, logsumexp = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        dim = qkv.shape[1] // (ctx.heads + 2 * ctx.key_heads)
        _backward(
            qkv, rotary, *_packing(ctx.grid), ctx.heads, ctx.key_heads, dim, rotary.shape[2],
            out, logsumexp, gradients[0].contiguous(), dqkv, torch.get_num_threads(),
        )  # fmt: skip
        return dqkv, None, None, None, None


_differentiable: Callable[..., Tensor] = _SoftmaxAttention.apply


def attention(qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, grid: ChunkGrid) -> Tensor:
    """Causal attention of packed sequences and families, float32 [N, H * D]; differentiable in qkv_NX."""
    qkv_NX, rotary_N2R = qkv_NX.contiguous(), rotary_N2R.contiguous()
    if torch.is_grad_enabled() and qkv_NX.requires_grad:
        return _differentiable(qkv_NX, rotary_N2R, heads, key_heads, grid)
    return _attend(qkv_NX, rotary_N2R, heads, key_heads, grid)


def prefill(qkv_NX: Tensor, rotary_N2R: Tensor, heads: int, key_heads: int, grid: ChunkGrid, pages: Pages) -> Tensor:
    """Pieces from position `grid.starts` on against all keys before them in `pages`, where theirs are left too."""
    grid.refuse_branches()
    return _attend(qkv_NX.contiguous(), rotary_N2R.contiguous(), heads, key_heads, grid, pages)


def decode(
    qkv_BX: Tensor, rotary_B2R: Tensor, heads: int, key_heads: int, pages: Pages, position_B: Tensor, active: int
) -> Tensor:
    """One token of each of the first `active` sequences, float32 [B, H * D]; the other rows are zero."""
    batch, columns = qkv_BX.shape
    dim = columns // (heads + 2 * key_heads)
    k_pages, v_pages, table = pages
    out = torch.empty(batch, heads * dim)
    if active < batch:
        out[active:] = 0.0
    _decode(
        qkv_BX.contiguous(), rotary_B2R.contiguous(), active, heads, key_heads, dim, rotary_B2R.shape[2],
        k_pages, v_pages, table, table.stride(0), position_B, out, torch.get_num_threads(),
    )  # fmt: skip
    return out
