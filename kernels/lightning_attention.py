"""Lightning attention: of packed sequences, of prompts that leave a cache, and of one more token.

    q, k, v = silu(projections)
    S_t = exp(-s) S_{t-1} + k_t^T v_t        o_t = q_t S_t                                   (Lightning Attention-2,
                                                                                  arXiv 2401.04658, with M1's slopes s)

computed by chunks of 64 as  O = ((Q K^T) . M) V + diag(lq) Q S_prev,  S = lam S_prev + (diag(lk) K)^T V  with
M_ij = exp(-s (i - j)) for i >= j, lq_i = exp(-s (i + 1)), lk_j = exp(-s (C - 1 - j)), lam = exp(-s C).
All decays are exponentials of differences, so no slope overflows. Arithmetic is float32 whatever the inputs.

Decode keeps the state at the last chunk boundary and the keys and values since, and evaluates one row of the very
product that training evaluates for the whole chunk. The CPU kernels spell that out (cispo.kernels.lightning_cpu); here,
in plain PyTorch, it is the same operands in the same layout, so the same bits wherever the library's products do not
depend on the row count (see cispo.model.arithmetic).

N packed tokens, M chunks, B sequences, S slots, H heads, C = 64 rows of a chunk, D head dim, I = 3 H D projections in
M1's order (head by head: q, k, v), J = H D outputs, K = I + J: the projections, then those of the output gate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels import cpu_library, lightning_cpu
from cispo.kernels.chunks import CHUNK_LENGTH, ChunkGrid
from cispo.kernels.norm import gated_norm
from cispo.kernels.pointwise import silu

QUERY_ROWS = 4
"""Rows that one decoded query is padded to: a single row takes another path through the library's product."""


@dataclass(frozen=True, slots=True, eq=False)
class Decays:
    """The constants of one layer's slopes [H]: within_HCC is M, query_HC1 is lq, key_HC1 is lk, chunk_H11 is lam.

    within_CHC and query_CH11 are M and lq by row, for the one row of a decode step. table_HT is what the CPU kernels
    read: exp(-s (63 - u)) for u = 0 .. 63, zeros for u = 64 .. 127, then lq. Row i of M is the 64 values from 63 - i,
    lk its first 64 values, lam its last. slopes_H is what the CUDA kernels read, float32.
    """

    within_HCC: Tensor
    query_HC1: Tensor
    key_HC1: Tensor
    chunk_H11: Tensor
    within_CHC: Tensor
    query_CH11: Tensor
    table_HT: Tensor
    slopes_H: Tensor


def decays(slopes_H: Tensor) -> Decays:
    """The decay constants of slopes [H] (float32), for chunks of 64."""
    slopes_H11 = slopes_H.float().view(-1, 1, 1)
    row_C = torch.arange(CHUNK_LENGTH, device=slopes_H.device, dtype=torch.float32)
    distance_CC = row_C[:, None] - row_C[None, :]
    within_HCC = torch.exp(-slopes_H11 * distance_CC.clamp(min=0)) * (distance_CC >= 0)
    query_HC1 = torch.exp(-slopes_H11 * (row_C[None, :, None] + 1))
    key_HC1 = torch.exp(-slopes_H11 * (CHUNK_LENGTH - 1 - row_C[None, :, None]))
    return Decays(
        within_HCC=within_HCC,
        query_HC1=query_HC1,
        key_HC1=key_HC1,
        chunk_H11=torch.exp(-slopes_H11 * CHUNK_LENGTH),
        within_CHC=within_HCC.transpose(0, 1).contiguous(),
        query_CH11=query_HC1.transpose(0, 1).unsqueeze(3).contiguous(),
        table_HT=torch.cat((key_HC1, torch.zeros_like(key_HC1), query_HC1), dim=1).squeeze(2),
        slopes_H=slopes_H.float().contiguous(),
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product over the two leading dimensions, as the library's three-dimensional one."""
    m, h = a.shape[:2]
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(m, h, a.shape[2], b.shape[3])


def _chunk_states(kv_MHDD: Tensor, grid: ChunkGrid, decay: Decays, initial_BHDD: Tensor | None = None) -> Tensor:
    """State before each chunk, float32 [M, H, D, D]: that of its piece's first (zero if None), else decayed sums."""
    states_MHDD = torch.zeros_like(kv_MHDD)
    if initial_BHDD is not None:
        states_MHDD.index_copy_(0, grid.first_chunk_B, initial_BHDD)
    for chunks in grid.at_place[1:]:
        previous = states_MHDD.index_select(0, chunks - 1)
        states_MHDD.index_copy_(0, chunks, decay.chunk_H11 * previous + kv_MHDD.index_select(0, chunks - 1))
    return states_MHDD


def _chunk_state_gradients(dstates_MHDD: Tensor, grid: ChunkGrid, decay: Decays) -> Tensor:
    """Gradient of the state after each chunk, float32 [M, H, D, D]: the reverse of `_chunk_states`."""
    after_MHDD = torch.zeros_like(dstates_MHDD)
    for chunks in reversed(grid.at_place[1:]):
        gradient = decay.chunk_H11 * after_MHDD.index_select(0, chunks) + dstates_MHDD.index_select(0, chunks)
        after_MHDD.index_copy_(0, chunks - 1, gradient)
    return after_MHDD


def _chunk_kv(k_MHCD: Tensor, v_MHCD: Tensor, decay: Decays) -> Tensor:
    """What a full chunk adds to the state: (diag(lk) K)^T V, float32 [M, H, D, D]."""
    return _product((k_MHCD * decay.key_HC1).transpose(2, 3), v_MHCD)


def _chunk_outputs(q: Tensor, k: Tensor, v: Tensor, states: Tensor, decay: Decays) -> tuple[Tensor, Tensor]:
    """Decayed scores [M, H, C, C] and outputs [M, H, C, D] of grids and the states before their chunks."""
    scores = _product(q, k.transpose(2, 3).contiguous()).mul_(decay.within_HCC)
    return scores, _product(scores, v).add_(_product(q, states).mul_(decay.query_HC1))


class _LightningAttention(torch.autograd.Function):
    """Forward and backward on grids [M, H, C, D]; the backward is section 2.4's transpose, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, grid: ChunkGrid, decay: Decays) -> Tensor:
        states = _chunk_states(_chunk_kv(k, v, decay), grid, decay)
        scores, out = _chunk_outputs(q, k, v, states, decay)
        ctx.save_for_backward(q, k, v, scores, states)
        ctx.grid, ctx.decay = grid, decay
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, scores, states = ctx.saved_tensors
        grid, decay, dout = ctx.grid, ctx.decay, gradients[0].contiguous()
        dscores = _product(dout, v.transpose(2, 3)).mul_(decay.within_HCC)
        dout_decayed = dout * decay.query_HC1
        after = _chunk_state_gradients(_product(q.transpose(2, 3), dout_decayed), grid, decay)
        k_decayed = k * decay.key_HC1
        dq = _product(dscores, k).add_(_product(dout_decayed, states.transpose(2, 3)))
        dk = _product(dscores.transpose(2, 3), q).add_(_product(v, after.transpose(2, 3)).mul_(decay.key_HC1))
        dv = _product(scores.transpose(2, 3), dout).add_(_product(k_decayed, after))
        return dq, dk, dv, None, None


def _heads(qkv_NI: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v after SiLU, float32 [N, H, D] each."""
    rows_NHE = silu(qkv_NI).reshape(qkv_NI.shape[0], heads, -1).float()
    q_NHD, k_NHD, v_NHD = rows_NHE.split(rows_NHE.shape[2] // 3, dim=2)
    return q_NHD, k_NHD, v_NHD


def _is_served(qkv_NI: Tensor, slopes: Decays) -> bool:
    heads = slopes.table_HT.shape[0]
    return cpu_library.serves(qkv_NI) and lightning_cpu.takes(qkv_NI.shape[1] // (3 * heads))


def keeps_copy(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether decode wants the fourth cache, `copy_SHDD`: half the bytes a step, the same bits."""
    return device.type == "cuda" and dtype is torch.bfloat16 and dim in (64, 128)


def _refuse_copy(copy_SHDD: Tensor | None, qkv_NI: Tensor) -> None:
    if copy_SHDD is not None:
        raise ValueError(
            f"only the CUDA kernels read a rounded copy of the state, and they do not take {qkv_NI.dtype} projections "
            f"of strides {qkv_NI.stride()} on {qkv_NI.device}; leave copy_SHDD out"
        )


def _is_on_cuda(qkv_NI: Tensor, slopes: Decays) -> bool:
    """Whether the Triton kernels take it: bfloat16 on CUDA, heads of 64 or 128, rows as their loads want them."""
    dim = qkv_NI.shape[1] // (3 * slopes.slopes_H.shape[0])
    is_aligned = qkv_NI.stride(1) == 1 and qkv_NI.stride(0) % 16 == 0 and qkv_NI.data_ptr() % 16 == 0
    return keeps_copy(dim, qkv_NI.dtype, qkv_NI.device) and is_aligned


def lightning_attention(qkv_NI: Tensor, slopes: Decays, grid: ChunkGrid) -> Tensor:
    """o_t = sum_{j <= t} exp(-s (t - j)) (q_t . k_j) v_j for every packed sequence; [N, J]. No 1/sqrt(D) scale.

    qkv_NI: projections before SiLU, any float dtype; columns of a wider buffer will do. slopes: `decays` of the layer.
    Differentiable in qkv_NI. The result is float32, but bfloat16 from the CUDA kernels: it is rounded next in any case.
    The CPU kernels take branches too, which go on from their prompt; the others refuse them.
    """
    if _is_served(qkv_NI, slopes):
        return lightning_cpu.attention(qkv_NI, slopes.table_HT, grid)
    grid.refuse_branches()
    if _is_on_cuda(qkv_NI, slopes):
        from cispo.kernels.gpu import lightning_backward

        return lightning_backward.attention(qkv_NI, slopes.slopes_H, grid)
    grids = [grid.scatter(x) for x in _heads(qkv_NI, slopes.table_HT.shape[0])]
    apply: Callable[..., Tensor] = _LightningAttention.apply
    return grid.gather(apply(*grids, grid, slopes)).flatten(1)


def gated_lightning_attention(
    qkv_gate_NK: Tensor, norm_J: Tensor, epsilon: float, slopes: Decays, grid: ChunkGrid
) -> Tensor:
    """sigmoid(gate) rms_norm(`lightning_attention`), [N, J] in qkv_gate_NK's dtype: with the bits of the parts.

    norm_J: weight of the norm, in the same dtype; epsilon: its constant. Differentiable in qkv_gate_NK and norm_J.
    """
    inner = norm_J.numel()
    if _is_served(qkv_gate_NK[:, : 3 * inner], slopes) and cpu_library.serves(norm_J):
        return lightning_cpu.gated_attention(qkv_gate_NK, norm_J, epsilon, slopes.table_HT, grid)
    qkv_NI, gate_NJ = qkv_gate_NK.split([3 * inner, inner], dim=1)
    out_NJ = lightning_attention(qkv_NI, slopes, grid).to(qkv_gate_NK.dtype)
    return gated_norm(out_NJ, gate_NJ, norm_J, epsilon)


def lightning_prefill(
    qkv_NI: Tensor,
    slopes: Decays,
    grid: ChunkGrid,
    slot_B: Tensor,
    state_SHDD: Tensor,
    k_recent_SHDC: Tensor,
    v_recent_SHCD: Tensor,
    copy_SHDD: Tensor | None = None,
) -> Tensor:
    """`lightning_attention` of pieces that go on from three caches, and leave there what the next piece goes on from.

    A piece whose start is past 0 reads what its slot of slot_B (int64) was left with; every piece leaves, at its end,
    the state at the last chunk boundary (float32), and the keys (transposed) and values of the rows since, in the dtype
    of the projections. At a multiple of 64 the full last chunk is in the state already and there are no recent rows.
    What the caches hold of rows not yet written means nothing. Not differentiable. copy_SHDD: a fourth cache, the state
    rounded to bfloat16, which the CUDA kernels' decode step reads in its place; only they take one (ValueError).
    """
    grid.refuse_branches()
    caches = (state_SHDD, k_recent_SHDC, v_recent_SHCD)
    if _is_on_cuda(qkv_NI, slopes):
        from cispo.kernels.gpu import lightning_forward

        qkv_NI = lightning_forward.silu_rows(qkv_NI)
        return lightning_forward.prefill(qkv_NI, slopes.slopes_H, grid, slot_B, *caches, copy_SHDD)
    _refuse_copy(copy_SHDD, qkv_NI)
    if _is_served(qkv_NI, slopes):
        return lightning_cpu.prefill(qkv_NI, slopes.table_HT, grid, slot_B, *caches)
    q, k, v = (grid.scatter(x) for x in _heads(qkv_NI, slopes.table_HT.shape[0]))
    state, k_recent, v_recent = (cache.index_select(0, slot_B).float() for cache in caches)
    starts_B = torch.tensor(grid.starts, device=k.device).view(-1, 1, 1, 1)
    row_C = torch.arange(CHUNK_LENGTH, device=k.device).view(-1, 1)
    is_cached = row_C < starts_B % CHUNK_LENGTH
    first = grid.first_chunk_B
    k.index_copy_(0, first, torch.where(is_cached, k_recent.transpose(2, 3), k.index_select(0, first)))
    v.index_copy_(0, first, torch.where(is_cached, v_recent, v.index_select(0, first)))
    kv = _chunk_kv(k, v, slopes)
    states = _chunk_states(kv, grid, slopes, torch.where(starts_B >= CHUNK_LENGTH, state, torch.zeros_like(state)))
    for cache, left in zip(caches, _final_state(k, v, kv, states, slopes, grid), strict=True):
        cache.index_copy_(0, slot_B, left.to(cache.dtype))
    _, out = _chunk_outputs(q, k, v, states, slopes)
    return grid.gather(out).flatten(1)


def _final_state(
    k: Tensor, v: Tensor, kv: Tensor, states: Tensor, slopes: Decays, grid: ChunkGrid
) -> tuple[Tensor, Tensor, Tensor]:
    """state_BHDD, k_recent_BHDC and v_recent_BHCD of `lightning_prefill`; rows not yet written are zero."""
    states, kv, k, v = (x.index_select(0, grid.last_chunk_B) for x in (states, kv, k, v))
    ends = (start + length for start, length in zip(grid.starts, grid.lengths, strict=True))
    is_full = torch.tensor([end % CHUNK_LENGTH == 0 for end in ends], device=k.device).view(-1, 1, 1, 1)
    states = torch.where(is_full, slopes.chunk_H11 * states + kv, states)
    return states, k.masked_fill(is_full, 0.0).transpose(2, 3), v.masked_fill(is_full, 0.0)


def lightning_decode(
    qkv_BI: Tensor,
    slopes: Decays,
    slot_B: Tensor,
    row_B: Tensor,
    full_rows: Tensor | None,
    state_SHDD: Tensor,
    k_recent_SHDC: Tensor,
    v_recent_SHCD: Tensor,
    copy_SHDD: Tensor | None = None,
) -> Tensor:
    """One token for each of the sequences in slots slot_B; [B, J], in `lightning_attention`'s dtype.

    The caches are updated in place; copy_SHDD as in `lightning_prefill`.

    qkv_BI: projections before SiLU. slot_B: where each sequence lies in the caches, int64; only idle rows may share a
    slot. row_B: row of the token in its chunk (position modulo 64), int64. full_rows: indices of the sequences whose
    chunk this token completes (int64), or None when there is none; their state takes the chunk in and the rows start
    anew. The CUDA kernels find them in row_B themselves.
    """
    if _is_on_cuda(qkv_BI, slopes):
        from cispo.kernels.gpu import lightning_decode as cuda

        return cuda.decode(qkv_BI, slopes.slopes_H, slot_B, row_B, state_SHDD, k_recent_SHDC, v_recent_SHCD, copy_SHDD)
    _refuse_copy(copy_SHDD, qkv_BI)
    if _is_served(qkv_BI, slopes):
        return lightning_cpu.decode(qkv_BI, slopes.table_HT, slot_B, row_B, state_SHDD, k_recent_SHDC, v_recent_SHCD)
    q_BHD, k_BHD, v_BHD = _heads(qkv_BI, slopes.table_HT.shape[0])
    k_recent_SHDC[slot_B, :, :, row_B] = k_BHD.to(k_recent_SHDC.dtype)
    v_recent_SHCD[slot_B, :, row_B] = v_BHD.to(v_recent_SHCD.dtype)
    caches = (state_SHDD, k_recent_SHDC, v_recent_SHCD)
    state, k_rows, v_rows = (cache.index_select(0, slot_B).float() for cache in caches)
    query = F.pad(q_BHD.unsqueeze(2), (0, 0, 0, QUERY_ROWS - 1))
    within = slopes.within_CHC.index_select(0, row_B).unsqueeze(2)
    scores = _product(query, k_rows).mul_(within)
    decayed = _product(query, state).mul_(slopes.query_CH11.index_select(0, row_B))
    out_BHD = _product(scores, v_rows).add_(decayed)[:, :, 0]
    if full_rows is not None:
        full_slots = slot_B.index_select(0, full_rows)
        k, v = k_rows.index_select(0, full_rows).transpose(2, 3), v_rows.index_select(0, full_rows)
        after = slopes.chunk_H11 * state.index_select(0, full_rows) + _chunk_kv(k, v, slopes)
        state_SHDD.index_copy_(0, full_slots, after)
        k_recent_SHDC.index_fill_(0, full_slots, 0.0)
        v_recent_SHCD.index_fill_(0, full_slots, 0.0)
    return out_BHD.flatten(1)
