"""Lightning attention of packed sequences in Triton: one walk over the chunks of 64, the state in registers.

A program has one head of one sequence and a block of its value columns. It reads q, k and v once, writes the outputs,
and stores no state between. The chunk step (`chunk_output`, `chunk_state`) is what decode and the backward evaluate
too: operands in the inputs' dtype, sums and decays float32, the state rounded only as an operand.

N packed tokens, B sequences or pieces, S slots, H heads, C = 64 rows of a chunk, D head dim, V columns of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH, ChunkGrid
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
    to_end = -row + _CHUNK
    to_query = tl.where(IS_REVERSE, to_end, row + 1)
    from_key = tl.where(IS_REVERSE, row, to_end - 1)
    return within, decay(rate, to_query), decay(rate, from_key), tl.exp2(rate * _CHUNK)


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
    """q, k and v have one row stride and one head stride. order_B: longest first, so that no long one starts last."""
    program = tl.program_id(0)
    BLOCKS: tl.constexpr = D // BLOCK_V
    head = program // BLOCKS % heads
    sequence = tl.load(order_B + program // (BLOCKS * heads))
    begin = tl.load(cu_seqlens + sequence)
    rows = tl.load(cu_seqlens + sequence + 1) - begin
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
        first = (cached_rows > 0).to(tl.int32) * _CHUNK
        place = tl.load(slot_B + sequence) * heads + head
        state_tile = place * D * D + dim[:, None] * D + column[None, :]
        state = tl.where(start + first >= _CHUNK, tl.load(state_SHDD + state_tile), 0.0)
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
            is_full = rows >= chunk + _CHUNK
            key_weight = tl.where(is_full, key_decay, 0.0)
            state_weight = tl.where(is_full, chunk_decay, 1.0)
        state = chunk_state(state, k_transposed, v_chunk, key_weight, state_weight)
    if IS_CACHED:
        tl.store(state_SHDD + state_tile, state)
        if HAS_COPY:
            tl.store(copy_SHDD + state_tile, state.to(copy_SHDD.dtype.element_ty))


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
        state = tl.where(start >= _CHUNK, tl.load(state_at), 0.0)
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


@triton.jit
def silu_kernel(x, out, x_row, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < columns
    tl.store(out + row * columns + column, silu(tl.load(x + row * x_row + column, mask=is_column)), mask=is_column)


POINTERS = {
    **dict.fromkeys(("q", "k", "v", "x", "out", "copy_SHDD", "k_recent_SHDC", "v_recent_SHCD"), "*bf16"),
    **dict.fromkeys(("slopes_H", "state_SHDD"), "*fp32"),
    **dict.fromkeys(("cu_seqlens", "order_B", "start_B"), "*i32"),
    "slot_B": "*i64",
}
SIZES = dict.fromkeys(("qkv_row", "qkv_head", "heads", "x_row", "columns"), "i32")
_CACHE_ARGUMENTS = ("start_B", "slot_B", "state_SHDD", "copy_SHDD")


def _build(name: str, kernel: Any, num_warps: int, num_stages: int, **constants: Any) -> Build:
    """A configuration whose strides are multiples of 16, as the launches see to."""
    nothing: dict[str, Any] = {}
    if not constants.get("IS_CACHED", True):
        nothing = dict.fromkeys(_CACHE_ARGUMENTS)
    elif constants.get("HAS_COPY") is False:
        nothing = {"copy_SHDD": None}
    names = [name for name in kernel.arg_names if name not in nothing]
    types = {name: type for name, type in (POINTERS | SIZES).items() if name in names}
    has_products = kernel in (forward_kernel, first_chunk_kernel)
    aligned = tuple(name for name in ("qkv_row", "qkv_head", "x_row", "columns") if name in types)
    return Build(name, kernel, types, {**constants, **nothing}, num_warps, num_stages, has_products, aligned)


def _walk(dim: int, *, is_cached: bool, has_copy: bool) -> dict[str, Any]:
    return {"D": dim, "BLOCK_V": 64, "IS_CACHED": is_cached, "HAS_COPY": has_copy}


_TRAINED = {
    dim: _build(f"lightning_forward D={dim}", forward_kernel, 4, stages, **_walk(dim, is_cached=False, has_copy=False))
    for dim, stages in ((64, 3), (128, 4))
}
_PREFILLED = {
    (dim, has_copy): _build(
        f"lightning_prefill D={dim}{' copy' if has_copy else ''}",
        forward_kernel,
        4,
        3,
        **_walk(dim, is_cached=True, has_copy=has_copy),
    )
    for dim in HEAD_DIMS
    for has_copy in (False, True)
}
_FIRST_CHUNK = {
    dim: _build(f"lightning_first_chunk D={dim}", first_chunk_kernel, 8, 1, D=dim, BLOCK_V=64) for dim in HEAD_DIMS
}
_RECENT = {dim: _build(f"lightning_recent D={dim}", recent_kernel, 4, 1, D=dim) for dim in HEAD_DIMS}
_SILU = _build("lightning_silu", silu_kernel, 4, 1, BLOCK=2048)
BUILDS = [*_TRAINED.values(), *_PREFILLED.values(), *_FIRST_CHUNK.values(), *_RECENT.values(), _SILU]


def launch(build: Build, grid: tuple[int, ...], *arguments: Any) -> None:
    """Run a build on its arguments that are no constants, in the kernel's order; those it has no use for left out."""
    given = iter(arguments)
    names = [name for name in build.kernel.arg_names if name not in build.constants]
    values = dict(zip(names, given, strict=True))
    build.kernel[grid](**values, **build.constants, **build.options)


def allow_descriptors(x: Tensor) -> None:
    """Give Triton the memory that a kernel writes its tensor descriptors to; it asks at the launch."""
    if x.is_cuda:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device=x.device, dtype=torch.int8))


def silu_rows(x_NI: Tensor) -> Tensor:
    """SiLU of rows of any stride, contiguous [N, I], with the bits that decode gives it.

    A pass of its own: within the walk over the chunks, where two programs a head would take it, it costs more.
    """
    rows, columns = x_NI.shape
    out_NI = x_NI.new_empty(rows, columns)
    launch(_SILU, (rows, triton.cdiv(columns, _SILU.constants["BLOCK"])), x_NI, out_NI, x_NI.stride(0), columns)
    return out_NI


def forward(qkv_NI: Tensor, slopes_H: Tensor, grid: ChunkGrid) -> Tensor:
    """Lightning attention of whole sequences, [N, J] in qkv_NI's dtype.

    qkv_NI: q, k and v after SiLU, head by head, contiguous [N, 3 J]. slopes_H: float32.
    """
    heads = slopes_H.shape[0]
    dim = qkv_NI.shape[1] // (3 * heads)
    build = _TRAINED[dim]
    out_NJ = qkv_NI.new_empty(qkv_NI.shape[0], heads * dim)
    allow_descriptors(qkv_NI)
    programs = len(grid.lengths) * heads * (dim // build.constants["BLOCK_V"])
    parts = (qkv_NI, qkv_NI[:, dim:], qkv_NI[:, 2 * dim :])
    places = (grid.cu_seqlens_B1, grid.longest_first_B)
    launch(build, (programs,), *parts, out_NJ, slopes_H, *places, qkv_NI.stride(0), 3 * dim, heads)
    return out_NJ


def prefill(
    qkv_NI: Tensor,
    slopes_H: Tensor,
    grid: ChunkGrid,
    slot_B: Tensor,
    state_SHDD: Tensor,
    k_recent_SHDC: Tensor,
    v_recent_SHCD: Tensor,
    copy_SHDD: Tensor | None = None,
) -> Tensor:
    """Pieces that go on from their slots and leave there what the next goes on from; [N, J] in qkv_NI's dtype.

    qkv_NI: q, k and v after SiLU, head by head, contiguous [N, 3 J]. slot_B: int64, all different. state_SHDD: float32;
    the other caches in qkv_NI's dtype. copy_SHDD: the state rounded, where that is kept too.
    """
    heads, batch = slopes_H.shape[0], len(grid.lengths)
    dim = qkv_NI.shape[1] // (3 * heads)
    q, k, v = qkv_NI, qkv_NI[:, dim:], qkv_NI[:, 2 * dim :]
    out_NJ = qkv_NI.new_empty(qkv_NI.shape[0], heads * dim)
    sizes = (qkv_NI.stride(0), 3 * dim, heads)
    recent = (k_recent_SHDC, v_recent_SHCD)
    build = _PREFILLED[dim, copy_SHDD is not None]
    programs = batch * heads * (dim // build.constants["BLOCK_V"])
    bounds, start_B = grid.cu_seqlens_B1, grid.start_B
    if any(start % CHUNK_LENGTH for start in grid.starts):
        arguments = (q, k, v, out_NJ, slopes_H, bounds, start_B, slot_B, state_SHDD, *recent, *sizes)
        launch(_FIRST_CHUNK[dim], (programs,), *arguments)
    allow_descriptors(qkv_NI)
    places = (bounds, grid.longest_first_B, start_B, slot_B)
    states = (state_SHDD,) if copy_SHDD is None else (state_SHDD, copy_SHDD)
    launch(build, (programs,), q, k, v, out_NJ, slopes_H, *places, *states, *sizes)
    launch(_RECENT[dim], (batch * heads,), k, v, bounds, start_B, slot_B, *recent, *sizes)
    return out_NJ
