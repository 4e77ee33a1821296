"""Lightning attention's CPU kernels (kernels/cpu/lightning.cpp, lightning_gradient.cpp), for float32 and whole lanes.

The arithmetic of a token in row i of its chunk is one and the same in training, prefill and decode. With fma rounded
once, every chain of fma from 0 and in the order given, and M, lq, lk, lam the float32 decays of
cispo.kernels.lightning_attention:

    q, k, v = x * (1 / (1 + exp(-x)))            of the projections x
    p_j = (chain over d of q_d k_jd) * M_ij      for j = 0 .. i
    o_d = fma(lq_i, chain over e of q_e S_ed, chain over j of p_j v_jd)
    S_de = fma(lam, S_de, chain over j of (lk_j * k_jd) v_je)             after row 63

A branch goes on from the row and state that its prompt ends with, and has the bits of the whole sequence. Training sums
over a few keys past the query too; their p is 0 and changes nothing. The backward sums in an order of its own, the same
at every number of threads.

N packed tokens, M chunks, B sequences, S slots, H heads, C = 64 rows of a chunk, D head dim, T = 3 C constants of a
head, I = 3 H D projections, J = H D outputs, K = 4 H D: the projections and then the output gate's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cispo.kernels import norm_cpu
from cispo.kernels.chunks import ChunkGrid
from cispo.kernels.cpu_library import CpuFunction

_LANES = 16
_MAXIMUM_DIM = 128

_forward = CpuFunction("lightning_forward", "pippipipppppppiii")
_backward = CpuFunction("lightning_backward", "pippipippppiiii")
_decode = CpuFunction("lightning_decode", "pipppppppniit")


def takes(head_dim: int) -> bool:
    """Whether the kernels take heads of this dim."""
    return head_dim % _LANES == 0 and 0 < head_dim <= _MAXIMUM_DIM


def _rows(qkv_NI: Tensor) -> Tensor:
    return qkv_NI if qkv_NI.stride(1) == 1 else qkv_NI.contiguous()


def _packing(grid: ChunkGrid) -> tuple[Tensor, Tensor, int, Tensor, int]:
    return grid.starts_B, grid.lengths_B, len(grid.lengths), grid.families_F, len(grid.families) - 1


def _attention(
    qkv_NI: Tensor,
    table_HT: Tensor,
    grid: ChunkGrid,
    states_MHDD: Tensor | None = None,
    slot_B: Tensor | None = None,
    caches: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor:
    rows, heads = qkv_NI.shape[0], table_HT.shape[0]
    inner = qkv_NI.shape[1] // 3
    out_NJ = torch.empty(rows, inner)
    sizes = heads, inner // heads, torch.get_num_threads()
    rows_and_packing = qkv_NI, qkv_NI.stride(0), *_packing(grid)
    _forward(*rows_and_packing, table_HT, out_NJ, states_MHDD, slot_B, *caches, *sizes)
    return out_NJ


def _new_states(qkv_NI: Tensor, table_HT: Tensor, grid: ChunkGrid) -> Tensor:
    """Room for the state before every chunk, [M, H, D, D]: with it the backward works SiLU and the scores out again."""
    heads = table_HT.shape[0]
    dim = qkv_NI.shape[1] // (3 * heads)
    return torch.empty(grid.chunks, heads, dim, dim)


def _gradient(
    qkv_NI: Tensor, table_HT: Tensor, grid: ChunkGrid, states_MHDD: Tensor, dout_NJ: Tensor, dqkv_NI: Tensor
) -> None:
    sizes = *states_MHDD.shape[1:3], torch.get_num_threads()
    inputs = qkv_NI, qkv_NI.stride(0), *_packing(grid), table_HT, states_MHDD, dout_NJ
    _backward(*inputs, dqkv_NI, dqkv_NI.stride(0), *sizes)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_NI: Tensor, table_HT: Tensor, grid: ChunkGrid) -> Tensor:
        states_MHDD = _new_states(qkv_NI, table_HT, grid)
        ctx.save_for_backward(qkv_NI, table_HT, states_MHDD)
        ctx.grid = grid
        return _attention(qkv_NI, table_HT, grid, states_MHDD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv_NI, table_HT, states_MHDD = ctx.saved_tensors
        dqkv_NI = torch.empty(qkv_NI.shape)
        _gradient(qkv_NI, table_HT, ctx.grid, states_MHDD, gradients[0].contiguous(), dqkv_NI)
        return dqkv_NI, None, None


class _GatedAttention(torch.autograd.Function):
    """Attention, norm and gate at once, so that both gradients go into one buffer and nothing joins them later."""

    @staticmethod
    def forward(
        ctx: Any, qkv_gate_NK: Tensor, norm_J: Tensor, epsilon: float, table_HT: Tensor, grid: ChunkGrid
    ) -> Tensor:
        inner = norm_J.numel()
        qkv_NI, gate_NJ = qkv_gate_NK[:, : 3 * inner], qkv_gate_NK[:, 3 * inner :]
        states_MHDD = _new_states(qkv_NI, table_HT, grid)
        out_NJ = _attention(qkv_NI, table_HT, grid, states_MHDD)
        ctx.save_for_backward(qkv_gate_NK, norm_J, out_NJ, table_HT, states_MHDD)
        ctx.epsilon, ctx.grid = epsilon, grid
        return norm_cpu.gated_norm(out_NJ, gate_NJ, norm_J, epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv_gate_NK, norm_J, out_NJ, table_HT, states_MHDD = ctx.saved_tensors
        qkv_columns = 3 * norm_J.numel()
        dqkv_gate_NK = torch.empty_like(qkv_gate_NK)
        qkv_NI, gate_NJ = qkv_gate_NK[:, :qkv_columns], qkv_gate_NK[:, qkv_columns:]
        dqkv_NI, dgate_NJ = dqkv_gate_NK[:, :qkv_columns], dqkv_gate_NK[:, qkv_columns:]
        dnormed_NJ = gradients[0].contiguous()
        dout_NJ, dnorm_J = norm_cpu.gated_norm_gradient(dnormed_NJ, out_NJ, gate_NJ, norm_J, ctx.epsilon, dgate_NJ)
        _gradient(qkv_NI, table_HT, ctx.grid, states_MHDD, dout_NJ, dqkv_NI)
        return dqkv_gate_NK, dnorm_J, None, None, None


_differentiable_attention: Callable[[Tensor, Tensor, ChunkGrid], Tensor] = _Attention.apply
_differentiable_gated_attention: Callable[[Tensor, Tensor, float, Tensor, ChunkGrid], Tensor] = _GatedAttention.apply


def attention(qkv_NI: Tensor, table_HT: Tensor, grid: ChunkGrid) -> Tensor:
    """float32 [N, J] of packed sequences and families. table_HT: `Decays.table_HT`."""
    qkv_NI = _rows(qkv_NI)
    if torch.is_grad_enabled() and qkv_NI.requires_grad:
        return _differentiable_attention(qkv_NI, table_HT, grid)
    return _attention(qkv_NI, table_HT, grid)


def gated_attention(qkv_gate_NK: Tensor, norm_J: Tensor, epsilon: float, table_HT: Tensor, grid: ChunkGrid) -> Tensor:
    """sigmoid(gate) rms_norm(attention), float32 [N, J], of the projections of both; `norm_cpu.gated_norm`'s bits."""
    qkv_gate_NK, norm_J = qkv_gate_NK.contiguous(), norm_J.contiguous()
    if torch.is_grad_enabled():
        return _differentiable_gated_attention(qkv_gate_NK, norm_J, epsilon, table_HT, grid)
    qkv_NI, gate_NJ = qkv_gate_NK.split([3 * norm_J.numel(), norm_J.numel()], dim=1)
    return norm_cpu.gated_norm(_attention(qkv_NI, table_HT, grid), gate_NJ, norm_J, epsilon)


def prefill(
    qkv_NI: Tensor,
    table_HT: Tensor,
    grid: ChunkGrid,
    slot_B: Tensor,
    state_SHDD: Tensor,
    k_recent_SHDC: Tensor,
    v_recent_SHCD: Tensor,
) -> Tensor:
    """`attention` of pieces from position `grid.starts` on, and in the slots slot_B (int64) of contiguous caches what
    `decode` goes on from; a start past 0 goes on from what is there."""
    caches = (state_SHDD, k_recent_SHDC, v_recent_SHCD)
    return _attention(_rows(qkv_NI), table_HT, grid, None, slot_B, caches)


def decode(
    qkv_BI: Tensor,
    table_HT: Tensor,
    slot_B: Tensor,
    row_B: Tensor,
    state_SHDD: Tensor,
    k_recent_SHDC: Tensor,
    v_recent_SHCD: Tensor,
) -> Tensor:
    """float32 [B, J] of one token for each of the slots slot_B, in row row_B (both int64) of its chunk.

    Reads of the recent keys and values only the rows up to the token's own.
    """
    qkv_BI = _rows(qkv_BI)
    batch, heads = qkv_BI.shape[0], table_HT.shape[0]
    inner = qkv_BI.shape[1] // 3
    out_BJ = torch.empty(batch, inner)
    caches = state_SHDD, k_recent_SHDC, v_recent_SHCD
    sizes = batch, heads, inner // heads, torch.get_num_threads()
    _decode(qkv_BI, qkv_BI.stride(0), row_B, slot_B, table_HT, out_BJ, *caches, *sizes)
    return out_BJ
