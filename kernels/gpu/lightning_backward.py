"""Gradients of lightning attention in Triton: the forward's walk, three times, with the operands exchanged.

With LA(a, b, c)_i = sum_{j <= i} exp(-s (i - j)) (a_i . b_j) c_j, and LA' the same over j >= i,

    dq = LA(dout, v, k)        dk = LA'(v, dout, q)        dv = LA'(k, q, dout)

so nothing is kept of the forward but q, k and v. One launch has all three: a program picks its role at run time, and
the three of a block of columns lie side by side, where those that walk backwards share what they read. What SiLU does
to a gradient is applied before it is written.

N packed tokens, B sequences, H heads, C = 64 rows of a chunk, D head dim, V columns of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH, ChunkGrid
from cispo.kernels.gpu.build import Build
from cispo.kernels.gpu.lightning_forward import (
    POINTERS,
    allow_descriptors,
    chunk_decays,
    chunk_output,
    chunk_state,
    forward,
    launch,
    silu_rows,
)

_CHUNK = tl.constexpr(CHUNK_LENGTH)
_ROLES = tl.constexpr(3)


@triton.jit
def backward_kernel(
    q, k, v, dout, x, dqkv, slopes_H, cu_seqlens, order_B, qkv_row, qkv_head, x_row, dqkv_row, heads,
    D: tl.constexpr, BLOCK_V: tl.constexpr, HAS_SILU: tl.constexpr,
):  # fmt: skip
    """dqkv: head by head dq, dk, dv, or with HAS_SILU the gradient of x: what q, k and v are SiLU of, head by head."""
    program = tl.program_id(0)
    BLOCKS: tl.constexpr = D // BLOCK_V
    role = program % _ROLES
    block = program // _ROLES % BLOCKS * BLOCK_V
    head = program // (BLOCKS * _ROLES) % heads
    sequence = tl.load(order_B + program // (BLOCKS * _ROLES * heads))
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    rows = tl.load(cu_seqlens + sequence + 1) - begin.to(tl.int32)
    is_dk = role == 0
    is_dv = role == 1
    is_reverse = role < 2
    qkv_at = begin * qkv_row + head * qkv_head
    dout_row = heads * D
    dout_at = dout + begin * dout_row + head * D
    a_at = tl.where(is_dk, v + qkv_at, tl.where(is_dv, k + qkv_at, dout_at))
    b_at = tl.where(is_dk, dout_at, tl.where(is_dv, q + qkv_at, v + qkv_at))
    c_at = tl.where(is_dk, q + qkv_at, tl.where(is_dv, dout_at, k + qkv_at)) + block
    a_row = tl.where(is_reverse, qkv_row, dout_row)
    b_row = tl.where(is_dk, dout_row, qkv_row)
    c_row = tl.where(is_dv, dout_row, qkv_row)
    of_role = tl.where(is_dk, D, tl.where(is_dv, 2 * D, 0)) + head * 3 * D + block
    a_rows = tl.make_tensor_descriptor(a_at, [rows, D], [a_row, 1], [_CHUNK, D])
    b_rows = tl.make_tensor_descriptor(b_at, [rows, D], [b_row, 1], [_CHUNK, D])
    c_rows = tl.make_tensor_descriptor(c_at, [rows, BLOCK_V], [c_row, 1], [_CHUNK, BLOCK_V])
    gradient_at = dqkv + begin * dqkv_row + of_role
    gradient_rows = tl.make_tensor_descriptor(gradient_at, [rows, BLOCK_V], [dqkv_row, 1], [_CHUNK, BLOCK_V])
    within, query_decay, key_decay, chunk_decay = chunk_decays(tl.load(slopes_H + head), is_reverse)
    state = tl.zeros((D, BLOCK_V), tl.float32)
    chunks = tl.cdiv(rows, _CHUNK)
    for step in range(0, chunks):
        chunk = tl.where(is_reverse, chunks - 1 - step, step) * _CHUNK
        if HAS_SILU:
            # First, so that it is there when it is needed. Plain loads: for one more descriptor there are no registers.
            row = chunk + tl.arange(0, _CHUNK)
            x_tile = x + begin * x_row + of_role + row[:, None].to(tl.int64) * x_row + tl.arange(0, BLOCK_V)[None, :]
            x_rows = tl.load(x_tile, mask=(row < rows)[:, None], other=0.0)
        b_transposed = tl.trans(b_rows.load([chunk, 0]))
        c_chunk = c_rows.load([chunk, 0])
        gradient = chunk_output(a_rows.load([chunk, 0]), b_transposed, c_chunk, state, within, query_decay)
        if HAS_SILU:
            x_chunk = x_rows.to(tl.float32)
            sigmoid = 1.0 / (1.0 + tl.exp(-x_chunk))
            gradient *= sigmoid * (1.0 + x_chunk * (1.0 - sigmoid))
        gradient_rows.store([chunk, 0], gradient.to(dqkv.dtype.element_ty))
        state = chunk_state(state, b_transposed, c_chunk, key_decay, chunk_decay)


_TYPES = {name: POINTERS[name] for name in ("q", "k", "v", "slopes_H", "cu_seqlens", "order_B")}
_TYPES |= dict.fromkeys(("dout", "x", "dqkv"), "*bf16")
_TYPES |= dict.fromkeys(("qkv_row", "qkv_head", "x_row", "dqkv_row", "heads"), "i32")


def _build(dim: int, has_silu: bool, num_stages: int) -> Build:
    nothing = {} if has_silu else {"x": None, "x_row": None}
    return Build(
        name=f"lightning_backward D={dim}{' SiLU' if has_silu else ''}",
        kernel=backward_kernel,
        types={name: type for name, type in _TYPES.items() if name not in nothing},
        constants={"D": dim, "BLOCK_V": 64, "HAS_SILU": has_silu, **nothing},
        num_warps=4,
        num_stages=num_stages,
        has_products=True,
        aligned=tuple(name for name in ("qkv_row", "qkv_head", "x_row", "dqkv_row") if name not in nothing),
    )


_BACKWARD = {
    (dim, has_silu): _build(dim, has_silu, stages)
    for dim, has_silu, stages in ((64, True, 3), (64, False, 3), (128, True, 2), (128, False, 4))
}
BUILDS = list(_BACKWARD.values())


def backward(qkv_NI: Tensor, x_NI: Tensor | None, dout_NJ: Tensor, slopes_H: Tensor, grid: ChunkGrid) -> Tensor:
    """Gradient of the projections x_NI, contiguous [N, 3 J] in their dtype, from that of the outputs.

    qkv_NI: SiLU of x_NI, contiguous. x_NI: rows of a stride that is a multiple of 16 elements; None for the gradient of
    qkv_NI itself. dout_NJ: contiguous.
    """
    heads = slopes_H.shape[0]
    dim = qkv_NI.shape[1] // (3 * heads)
    build = _BACKWARD[dim, x_NI is not None]
    dqkv_NI = torch.empty_like(qkv_NI)
    parts = (qkv_NI, qkv_NI[:, dim:], qkv_NI[:, 2 * dim :])
    programs = len(grid.lengths) * heads * 3 * (dim // build.constants["BLOCK_V"])
    projections, x_rows = ((), ()) if x_NI is None else ((x_NI,), (x_NI.stride(0),))
    rows = (qkv_NI.stride(0), 3 * dim, *x_rows, dqkv_NI.stride(0))
    allow_descriptors(qkv_NI)
    places = (slopes_H, grid.cu_seqlens_B1, grid.longest_first_B)
    launch(build, (programs,), *parts, dout_NJ, *projections, dqkv_NI, *places, *rows, heads)
    return dqkv_NI


class LightningAttention(torch.autograd.Function):
    """Whole sequences, differentiable in the projections. Kept for the backward: these and their SiLU."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, slopes_H: Tensor, grid: ChunkGrid) -> Tensor:
        qkv_NI = silu_rows(x_NI)
        ctx.save_for_backward(x_NI, qkv_NI, slopes_H)
        ctx.grid = grid
        return forward(qkv_NI, slopes_H, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x_NI, qkv_NI, slopes_H = ctx.saved_tensors
        return backward(qkv_NI, x_NI, gradients[0].contiguous(), slopes_H, ctx.grid), None, None


def attention(x_NI: Tensor, slopes_H: Tensor, grid: ChunkGrid) -> Tensor:
    """`forward` of the SiLU of projections x_NI [N, 3 J], rows of a stride that is a multiple of 16 elements."""
    out_NJ: Tensor = LightningAttention.apply(x_NI, slopes_H, grid)
    return out_NJ
