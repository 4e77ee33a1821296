"""One more token for each of many sequences: one row of the chunk step that training evaluates, in Triton.

A sequence keeps, in its slot, the state at the last chunk boundary and the keys and values since. A step appends to the
latter and evaluates `chunk_output` of the forward for one row, transposed: the state and the recent rows are the tall
operand of a product and the token is its narrow one, so that little is multiplied for nothing. An element's sum runs
over the same terms in the same order as in training, so it has the bits of training. Where a chunk is full, a second
launch takes it into the state; the device decides, so a step can be in a CUDA graph.

B sequences, S slots, H heads, C = 64 rows of a chunk, D head dim, V columns of a flush's block, I = 3 H D projections.
"""

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cispo.kernels.chunks import CHUNK_LENGTH
from cispo.kernels.gpu.build import Build
from cispo.kernels.gpu.lightning_forward import (
    HEAD_DIMS,
    chunk_decays,
    chunk_state,
    decay,
    decay_rate,
    launch,
    silu,
)

_CHUNK = tl.constexpr(CHUNK_LENGTH)
_QUERIES = tl.constexpr(8)
FLUSH_PARTS = 16
_FLUSH_PARTS = tl.constexpr(FLUSH_PARTS)


@triton.jit
def decode_kernel(
    qkv_BI, out_BJ, slopes_H, slot_B, row_B, state_SHDD, copy_SHDD, k_recent_SHDC, v_recent_SHCD,
    qkv_row, heads,
    D: tl.constexpr, HAS_COPY: tl.constexpr, IS_DESCRIBED: tl.constexpr,
):  # fmt: skip
    """copy_SHDD: with IS_DESCRIBED a descriptor of its rows of D, whose tiles come without registers of their own."""
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    at = tl.load(row_B + sequence).to(tl.int32)
    place = tl.load(slot_B + sequence) * heads + head
    row = tl.arange(0, _CHUNK)
    dim = tl.arange(0, D)
    state_tile = dim[:, None] * D + dim[None, :]
    if IS_DESCRIBED:
        state = copy_SHDD.load([(place * D).to(tl.int32), 0])
    elif HAS_COPY:
        state = tl.load(copy_SHDD + place * D * D + state_tile)
    else:
        state = tl.load(state_SHDD + place * D * D + state_tile).to(qkv_BI.dtype.element_ty)
    # Whole groups of 16 keys, so that loads stay wide: what is not before the token gets no score.
    is_near = row < (at + 15) // 16 * 16
    k_tile = k_recent_SHDC + place * D * _CHUNK + dim[:, None] * _CHUNK + row[None, :]
    v_tile = v_recent_SHCD + place * D * _CHUNK + row[:, None] * D + dim[None, :]
    k_chunk = tl.load(k_tile, mask=is_near[None, :], other=0.0)
    v_chunk = tl.load(v_tile, mask=(row < at)[:, None], other=0.0)
    token = qkv_BI + sequence.to(tl.int64) * qkv_row + head * 3 * D
    q_token = silu(tl.load(token + dim))
    k_token = silu(tl.load(token + D + dim))
    v_token = silu(tl.load(token + 2 * D + dim))
    tl.store(k_recent_SHDC + place * D * _CHUNK + dim * _CHUNK + at, k_token)
    tl.store(v_recent_SHCD + place * D * _CHUNK + at * D + dim, v_token)
    is_token = row == at
    k_chunk = tl.where(is_token[None, :], k_token[:, None], k_chunk)
    v_chunk = tl.where(is_token[:, None], v_token[None, :], v_chunk)
    rate = decay_rate(tl.load(slopes_H + head))
    within = decay(rate, tl.maximum(at - row, 0))
    # The token's query is one column of the least that a product has; the others are zero.
    is_query = (tl.arange(0, _QUERIES) == 0)[None, :]
    q_columns = tl.where(is_query, q_token[:, None], 0.0)
    scores = tl.where((row <= at)[:, None], tl.dot(tl.trans(k_chunk), q_columns) * within[:, None], 0.0)
    out = tl.dot(tl.trans(v_chunk), scores.to(v_chunk.dtype), tl.dot(tl.trans(state), q_columns) * decay(rate, at + 1))
    out_tile = out_BJ + (sequence * heads + head) * D + dim[:, None] + tl.arange(0, _QUERIES)[None, :]
    tl.store(out_tile, out.to(out_BJ.dtype.element_ty), mask=is_query)


@triton.jit
def flush_kernel(
    slopes_H, slot_B, row_B, state_SHDD, copy_SHDD, k_recent_SHDC, v_recent_SHCD, heads,
    D: tl.constexpr, BLOCK_V: tl.constexpr, HAS_COPY: tl.constexpr,
):  # fmt: skip
    """Take the chunks that this step has filled into their states. Few programs: mostly there is nothing to do."""
    program = tl.program_id(0)
    BLOCKS: tl.constexpr = D // BLOCK_V
    sequence = program // (BLOCKS * _FLUSH_PARTS)
    if tl.load(row_B + sequence) == _CHUNK - 1:
        slot = tl.load(slot_B + sequence)
        row = tl.arange(0, _CHUNK)
        dim = tl.arange(0, D)
        column = program % BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
        for head in range(program // BLOCKS % _FLUSH_PARTS, heads, _FLUSH_PARTS):
            place = slot * heads + head
            state_tile = place * D * D + dim[:, None] * D + column[None, :]
            k_chunk = tl.load(k_recent_SHDC + place * D * _CHUNK + dim[:, None] * _CHUNK + row[None, :])
            v_chunk = tl.load(v_recent_SHCD + place * D * _CHUNK + row[:, None] * D + column[None, :])
            _, _, key_decay, chunk_decay = chunk_decays(tl.load(slopes_H + head), False)
            state = chunk_state(tl.load(state_SHDD + state_tile), k_chunk, v_chunk, key_decay, chunk_decay)
            tl.store(state_SHDD + state_tile, state)
            if HAS_COPY:
                tl.store(copy_SHDD + state_tile, state.to(copy_SHDD.dtype.element_ty))


def _build(name: str, kernel: Any, dim: int, has_copy: bool, **more: Any) -> Build:
    nothing = {} if has_copy else {"copy_SHDD": None}
    types = {name: type for name, type in _TYPES.items() if name in kernel.arg_names and name not in nothing}
    constants = {"D": dim, "HAS_COPY": has_copy, **more, **nothing}
    aligned = ("qkv_row",) if "qkv_row" in types else ()
    return Build(f"{name} D={dim}{' copy' if has_copy else ''}", kernel, types, constants, 4, 1, True, aligned)


def _decode_build(dim: int, has_copy: bool) -> Build:
    build = _build("lightning_decode", decode_kernel, dim, has_copy, IS_DESCRIBED=has_copy)
    build = replace(build, num_warps=dim // 16)
    if not has_copy:
        return build
    types = {**build.types, "copy_SHDD": f"tensordesc<bf16[{dim}, {dim}]>"}
    # A step waits for memory: with 80 registers three programs of heads of 128 lie on a processor, with more only two.
    return replace(build, types=types, max_registers=80)


_TYPES = dict.fromkeys(("qkv_BI", "out_BJ", "copy_SHDD", "k_recent_SHDC", "v_recent_SHCD"), "*bf16")
_TYPES |= {"slopes_H": "*fp32", "state_SHDD": "*fp32", "slot_B": "*i64", "row_B": "*i64"}
_TYPES |= {"qkv_row": "i32", "heads": "i32"}
_VARIANTS = [(dim, has_copy) for dim in HEAD_DIMS for has_copy in (False, True)]
_DECODE = {variant: _decode_build(*variant) for variant in _VARIANTS}
_FLUSH = {variant: _build("lightning_flush", flush_kernel, *variant, BLOCK_V=64) for variant in _VARIANTS}
BUILDS = [*_DECODE.values(), *_FLUSH.values()]


def decode(
    qkv_BI: Tensor,
    slopes_H: Tensor,
    slot_B: Tensor,
    row_B: Tensor,
    state_SHDD: Tensor,
    k_recent_SHDC: Tensor,
    v_recent_SHCD: Tensor,
    copy_SHDD: Tensor | None = None,
) -> Tensor:
    """One token for each of the sequences in slots slot_B, [B, J] in qkv_BI's dtype; no wait for the host.

    qkv_BI: projections before SiLU, rows of a stride that is a multiple of 16 elements. slot_B: where each sequence
    lies in the caches; row_B: row of the token in its chunk; both int64. state_SHDD: float32; the other caches have
    qkv_BI's dtype. All are updated in place. copy_SHDD: the state rounded, where it is kept: it is read in its place,
    half the bytes and the same bits.
    """
    batch, heads = qkv_BI.shape[0], slopes_H.shape[0]
    dim = qkv_BI.shape[1] // (3 * heads)
    step, flush = (builds[dim, copy_SHDD is not None] for builds in (_DECODE, _FLUSH))
    out_BJ = qkv_BI.new_empty(batch, heads * dim)
    copy = () if copy_SHDD is None else (copy_SHDD,)
    described = tuple(map(_rows_of, copy)) if step.constants["IS_DESCRIBED"] else copy
    recent = (k_recent_SHDC, v_recent_SHCD)
    operands = (qkv_BI, out_BJ, slopes_H, slot_B, row_B, state_SHDD, *described, *recent)
    launch(step, (batch * heads,), *operands, qkv_BI.stride(0), heads)
    flush_programs = (batch * FLUSH_PARTS * (dim // flush.constants["BLOCK_V"]),)
    launch(flush, flush_programs, slopes_H, slot_B, row_B, state_SHDD, *copy, *recent, heads)
    return out_BJ


def _rows_of(copy_SHDD: Tensor) -> TensorDescriptor:
    """The rounded states as the decode kernel reads them: one matrix of S H D rows, in tiles of a head."""
    dim = copy_SHDD.shape[-1]
    return TensorDescriptor(copy_SHDD, [copy_SHDD.numel() // dim, dim], [dim, 1], [dim, dim])
