"""Lightning attention of packed sequences in Triton: one walk over the chunks of 64, the state in registers.

A program has one head of one sequence and a block of its value columns. It reads q, k and v once, writes the outputs,
and stores no state between. The chunk step (`chunk_output`, `chunk_state`) is what decode and the backward evaluate too:
operands in the inputs' dtype, sums and decays float32, the state rounded only as an operand.

N packed tokens, B sequences or pieces, S slots, H heads, C = 64 rows of a chunk, D head dim, V columns of a block.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH
from cispo.kernels.gpu.build import Build

HEAD_DIMS = (64, 128)
_CHUNK = tl.constexpr(CHUNK_LENGTH)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)) in float32, rounded to x's dtype."""
    x_float = x.to(tl.float32)
    return (x_float / (1.0 + tl.exp(-x_float))).to(x.dtype)


@triton.jit
def decay_rate(slope):
    """The slope as a power of 2 a token; negative."""
    return slope * -_LOG2_E


@triton.jit
def decay(rate, distance):
    """exp(-s distance) for distances from 0, in tokens: never more than 1."""
    return tl.exp2(rate * distance.to(tl.float32))


@triton.jit
def chunk_decays(slope, IS_REVERSE):
    """M [C, C], lq [C], lk [C] and lam of the twin, for queries after their keys or, in reverse, before them."""
    rate = decay_rate(slope)
    row = tl.arange(0, _CHUNK)
    after = row[:, None] - row[None, :]
    distance = tl.where(IS_REVERSE, -after, after)
    within = tl.where(distance >= 0, decay(rate, tl.maximum(distance, 0)), 0.0)
    to_query = tl.where(IS_REVERSE, _CHUNK - row, row + 1)
    return within, decay(rate, to_query), decay(rate, _CHUNK - to_query), tl.exp2(rate * _CHUNK)


@triton.jit
def chunk_output(q, k_transposed, v, state, within, query_decay):
    """Outputs of 64 rows [C, V]: ((Q K^T) . M) V + diag(lq) Q S, in float32."""
    scores = (tl.dot(q, k_transposed) * within).to(v.dtype)
    return tl.dot(scores, v, tl.dot(q, state.to(q.dtype)) * query_decay[:, None])


@triton.jit
def chunk_state(state, k_transposed, v, key_decay, chunk_decay):
    """State after the chunk [D, V]: lam S + (diag(lk) K)^T V, in float32."""
    return tl.dot(k_transposed, (v * key_decay[:, None]).to(v.dtype), state * chunk_decay)


@triton.jit
def forward_kernel(
    q, k, v, out, slopes_H, cu_seqlens, order_B, start_B, slot_B, state_SHDD, copy_SHDD,
    qkv_row, qkv_head, heads,
    D: tl.constexpr, BLOCK_V: tl.constexpr, IS_CACHED: tl.constexpr, HAS_COPY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    BLOCKS: tl.constexpr = D // BLOCK_V
    head = program // BLOCKS % heads
    sequence = tl.load(order_B + program // (BLOCKS * heads))
    begin = tl.load(cu_seqlens + sequence)
    rows = tl.load(cu_seqlens + sequence + 1) - begin
    row = tl.arange(0, _CHUNK)
    dim = tl.arange(0, D)
    column = program % BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
    within, query_decay, key_decay, chunk_decay = chunk_decays(tl.load(slopes_H + head), False)
    state = tl.zeros((D, BLOCK_V), tl.float32)
    first = 0
    if IS_CACHED:
        # Rows count from the boundary before the piece. A chunk that began in the cache is `first_chunk_kernel`'s.
        start = tl.load(start_B + sequence)
        cached_rows = start % _CHUNK
        begin -= cached_rows
        rows += cached_rows
        first = tl.where(cached_rows > 0, _CHUNK, 0)
        place = tl.load(slot_B + sequence) * heads + head
        state_at = state_SHDD + place * D * D + dim[:, None] * D + column[None, :]
        state = tl.load(state_at, mask=(dim >= 0)[:, None] & (start + first >= _CHUNK), other=0.0)
    begin += first
    rows = tl.maximum(rows - first, 0)
    qkv_at = begin.to(tl.int64) * qkv_row + head * qkv_head
    out_at = (begin.to(tl.int64) * heads + head) * D + program % BLOCKS * BLOCK_V
    # Past the last row of the sequence these read zeros and write nothing.
    q_rows = tl.make_tensor_descriptor(q + qkv_at, [rows, D], [qkv_row, 1], [_CHUNK, D])
    k_rows = tl.make_tensor_descriptor(k + qkv_at, [rows, D], [qkv_row, 1], [_CHUNK, D])
    v_at = v + qkv_at + program % BLOCKS * BLOCK_V
    v_rows = tl.make_tensor_descriptor(v_at, [rows, BLOCK_V], [qkv_row, 1], [_CHUNK, BLOCK_V])
    out_rows = tl.make_tensor_descriptor(out + out_at, [rows, BLOCK_V], [heads * D, 1], [_CHUNK, BLOCK_V])
    for chunk in range(0, rows, _CHUNK):
        k_transposed = tl.trans(k_rows.load([chunk, 0]))
        v_chunk = v_rows.load([chunk, 0])
        out_chunk = chunk_output(q_rows.load([chunk, 0]), k_transposed, v_chunk, state, within, query_decay)
        out_rows.store([chunk, 0], out_chunk.to(out.dtype.element_ty))
        key_weight, state_weight = key_decay, chunk_decay
        if IS_CACHED:
            # A last chunk that is not full leaves the state as it is: times 1, plus a product with zeros.
            is_full = chunk + _CHUNK <= rows
            key_weight = tl.where(is_full, key_decay, 0.0)
            state_weight = tl.where(is_full, chunk_decay, 1.0)
        state = chunk_state(state, k_transposed, v_chunk, key_weight, state_weight)
    if IS_CACHED:
        tl.store(state_at, state)
        if HAS_COPY:
            copy_at = copy_SHDD + place * D * D + dim[:, None] * D + column[None, :]
            tl.store(copy_at, state.to(copy_SHDD.dtype.element_ty))


@triton.jit
def first_chunk_kernel(
    q, k, v, out, slopes_H, cu_seqlens, start_B, slot_B, state_SHDD, k_recent_SHDC, v_recent_SHCD,
    qkv_row, qkv_head, heads,
    D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The chunk that each piece starts in the middle of: its rows before the piece and the state come from the slot."""
    program = tl.program_id(0)
    BLOCKS: tl.constexpr = D // BLOCK_V
    head = program // BLOCKS % heads
    sequence = program // (BLOCKS * heads)
    start = tl.load(start_B + sequence)
    cached_rows = start % _CHUNK
    if cached_rows > 0:
        begin = tl.load(cu_seqlens + sequence) - cached_rows
        rows = tl.load(cu_seqlens + sequence + 1) - begin
        place = tl.load(slot_B + sequence) * heads + head
        row = tl.arange(0, _CHUNK)
        dim = tl.arange(0, D)
        column = program % BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
        within, query_decay, key_decay, chunk_decay = chunk_decays(tl.load(slopes_H + head), False)
        is_token = ((row >= cached_rows) & (row < rows))[:, None]
        is_cached = (row < cached_rows)[:, None]
        qkv_at = begin.to(tl.int64) * qkv_row + head * qkv_head
        q_tile = qkv_at + row[:, None] * qkv_row + dim[None, :]
        v_tile = qkv_at + row[:, None] * qkv_row + column[None, :]
        q_rows = tl.load(q + q_tile, mask=is_token, other=0.0)
        k_rows = tl.load(k + q_tile, mask=is_token, other=0.0)
        v_rows = tl.load(v + v_tile, mask=is_token, other=0.0)
        k_before = k_recent_SHDC + place * D * _CHUNK + row[:, None] + dim[None, :] * _CHUNK
        v_before = v_recent_SHCD + place * D * _CHUNK + row[:, None] * D + column[None, :]
        k_rows = tl.where(is_cached, tl.load(k_before, mask=is_cached, other=0.0), k_rows)
        v_rows = tl.where(is_cached, tl.load(v_before, mask=is_cached, other=0.0), v_rows)
        state_at = state_SHDD + place * D * D + dim[:, None] * D + column[None, :]
        state = tl.load(state_at, mask=(dim >= 0)[:, None] & (start >= _CHUNK), other=0.0)
        out_rows = chunk_output(q_rows, tl.trans(k_rows), v_rows, state, within, query_decay)
        out_tile = (begin.to(tl.int64) * heads + head) * D + row[:, None] * (heads * D) + column[None, :]
        tl.store(out + out_tile, out_rows.to(out.dtype.element_ty), mask=is_token)
        if rows >= _CHUNK:
            tl.store(state_at, chunk_state(state, tl.trans(k_rows), v_rows, key_decay, chunk_decay))


@triton.jit
def recent_kernel(
    k, v, cu_seqlens, start_B, slot_B, k_recent_SHDC, v_recent_SHCD, qkv_row, qkv_head, heads, D: tl.constexpr
):
    """Leave the keys and values of each piece's unfinished chunk in its slot; a launch after all have read theirs."""
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    cached_rows = tl.load(start_B + sequence) % _CHUNK
    begin = tl.load(cu_seqlens + sequence) - cached_rows
    rows = tl.load(cu_seqlens + sequence + 1) - begin
    last_begin = rows // _CHUNK * _CHUNK
    row = tl.arange(0, _CHUNK)
    dim = tl.arange(0, D)
    is_token = ((last_begin + row >= cached_rows) & (last_begin + row < rows))[:, None]
    tile = (begin + last_begin).to(tl.int64) * qkv_row + head * qkv_head + row[:, None] * qkv_row + dim[None, :]
    recent_at = (tl.load(slot_B + sequence) * heads + head) * D * _CHUNK
    k_rows = tl.load(k + tile, mask=is_token, other=0.0)
    v_rows = tl.load(v + tile, mask=is_token, other=0.0)
    tl.store(k_recent_SHDC + recent_at + row[:, None] + dim[None, :] * _CHUNK, k_rows, mask=is_token)
    tl.store(v_recent_SHCD + recent_at + row[:, None] * D + dim[None, :], v_rows, mask=is_token)


POINTERS = {
    **dict.fromkeys(("q", "k", "v", "out", "k_recent_SHDC", "v_recent_SHCD", "copy_SHDD"), "*bf16"),
    **dict.fromkeys(("slopes_H", "state_SHDD"), "*fp32"),
    **dict.fromkeys(("cu_seqlens", "order_B", "start_B"), "*i32"),
    "slot_B": "*i64",
}
SIZES = dict.fromkeys(("qkv_row", "qkv_head", "heads"), "i32")


def _build(name: str, kernel: Any, constants: Mapping[str, Any], num_warps: int, num_stages: int) -> Build:
    """A configuration whose strides and head count are multiples of 16 where they are in every model of note."""
    types = {argument: type for argument, type in (POINTERS | SIZES).items() if argument in kernel.arg_names}
    unused = () if constants.get("IS_CACHED", True) else _CACHE_ARGUMENTS
    types = {argument: type for argument, type in types.items() if argument not in unused}
    nothing = dict.fromkeys(unused)
    has_products = kernel is not recent_kernel
    aligned = ("qkv_row", "qkv_head")
    return Build(name, kernel, types, {**nothing, **constants}, num_warps, num_stages, has_products, aligned)


_CACHE_ARGUMENTS = ("start_B", "slot_B", "state_SHDD", "copy_SHDD")
_FORWARD = {
    (dim, is_cached): _build(
        f"lightning_forward D={dim}{' cached' if is_cached else ''}",
        forward_kernel,
        {"D": dim, "BLOCK_V": 64, "IS_CACHED": is_cached, "HAS_COPY": is_cached},
        num_warps=4,
        num_stages=2,
    )
    for dim in HEAD_DIMS
    for is_cached in (False, True)
}
_FIRST_CHUNK = {
    dim: _build(f"lightning_first_chunk D={dim}", first_chunk_kernel, {"D": dim, "BLOCK_V": 64}, 4, 1)
    for dim in HEAD_DIMS
}
_RECENT = {dim: _build(f"lightning_recent D={dim}", recent_kernel, {"D": dim}, 4, 1) for dim in HEAD_DIMS}
BUILDS = [*_FORWARD.values(), *_FIRST_CHUNK.values(), *_RECENT.values()]
