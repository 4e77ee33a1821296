"""One more token for each of many sequences: one row of the chunk step that training evaluates, in Triton.

A sequence keeps, in its slot, the state at the last chunk boundary and the keys and values since. A step appends to the
latter and multiplies a tile of 64 rows, of which one is the token's: the products of training, so the bits of training.
Where a chunk is full, a second launch takes it into the state; the device decides, so a step can be in a CUDA graph.

B sequences, S slots, H heads, C = 64 rows of a chunk, D head dim, V columns of a block, I = 3 H D projections.
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
    chunk_output,
    chunk_state,
    decay,
    decay_rate,
    launch,
    silu,
)

_CHUNK = tl.constexpr(CHUNK_LENGTH)
FLUSH_PARTS = 16
_FLUSH_PARTS = tl.constexpr(FLUSH_PARTS)


@triton.jit
def decode_kernel(
    qkv_BI, out_BJ, slopes_H, slot_B, row_B, state_SHDD, copy_SHDD, k_recent_SHDC, v_recent_SHCD,
    qkv_row, heads,
    D: tl.constexpr, BLOCK_V: tl.constexpr, HAS_COPY: tl.constexpr, IS_DESCRIBED: tl.constexpr,
):  # fmt: skip
    """copy_SHDD: with IS_DESCRIBED a descriptor of its rows of D, whose tiles come without registers of their own."""
    program = tl.program_id(0)
    BLOCKS: tl.constexpr = D // BLOCK_V
    block = program % BLOCKS
    head = program // BLOCKS % heads
    sequence = program // (BLOCKS * heads)
    at = tl.load(row_B + sequence).to(tl.int32)
    place = tl.load(slot_B + sequence) * heads + head
    row = tl.arange(0, _CHUNK)
    dim = tl.arange(0, D)
    column = block * BLOCK_V + tl.arange(0, BLOCK_V)
    state_tile = dim[:, None] * D + column[None, :]
    k_tile = dim[:, None] * _CHUNK + row[None, :]
    v_tile = row[:, None] * D + column[None, :]
    if IS_DESCRIBED:
        state = copy_SHDD.load([(place * D).to(tl.int32), block * BLOCK_V])
    elif HAS_COPY:
        state = tl.load(copy_SHDD + place * D * D + state_tile)
    else:
        state = tl.load(state_SHDD + place * D * D + state_tile)
    # Whole groups of 16 rows, so that loads stay wide; what is not written is discarded after.
    is_near = row < (at + 15) // 16 * 16
    k_chunk = tl.load(k_recent_SHDC + place * D * _CHUNK + k_tile, mask=is_near[None, :], other=0.0)
    v_chunk = tl.load(v_recent_SHCD + place * D * _CHUNK + v_tile, mask=is_near[:, None], other=0.0)
    token = qkv_BI + sequence.to(tl.int64) * qkv_row + head * 3 * D
    q_token = silu(tl.load(token + dim))
    k_token = silu(tl.load(token + D + dim))
    v_token = silu(tl.load(token + 2 * D + column))
    is_token, is_before = row == at, row < at
    q_chunk = tl.where(is_token[:, None], q_token[None, :], 0.0)
    k_chunk = tl.where(is_before[None, :], k_chunk, tl.where(is_token[None, :], k_token[:, None], 0.0))
    v_chunk = tl.where(is_before[:, None], v_chunk, tl.where(is_token[:, None], v_token[None, :], 0.0))
    # Only this row of M is needed, and of lq: other rows of the tile are zero.
    rate = decay_rate(tl.load(slopes_H + head))
    within = tl.where(row <= at, decay(rate, tl.maximum(at - row, 0)), 0.0)[None, :]
    out = chunk_output(q_chunk, k_chunk, v_chunk, state, within, decay(rate, row + 1))
    out_tile = (sequence * heads + head) * D + column[None, :] + row[:, None] * 0
    tl.store(out_BJ + out_tile, out.to(out_BJ.dtype.element_ty), mask=is_token[:, None])
    if block == 0:
        tl.store(k_recent_SHDC + place * D * _CHUNK + dim * _CHUNK + at, k_token)
    tl.store(v_recent_SHCD + place * D * _CHUNK + at * D + column, v_token)


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


def _build(name: str, kernel: Any, dim: int, has_copy: bool) -> Build:
    nothing = {} if has_copy else {"copy_SHDD": None}
    types = {name: type for name, type in _TYPES.items() if name in kernel.arg_names and name not in nothing}
    constants = {"D": dim, "BLOCK_V": _BLOCK_V, "HAS_COPY": has_copy, **nothing}
    aligned = ("qkv_row",) if "qkv_row" in types else ()
    return Build(f"{name} D={dim}{' copy' if has_copy else ''}", kernel, types, constants, 4, 1, True, aligned)


def _decode_build(dim: int, has_copy: bool) -> Build:
    build = _build("lightning_decode", decode_kernel, dim, has_copy)
    is_described = has_copy and dim == 128
    build = replace(build, constants={**build.constants, "IS_DESCRIBED": is_described})
    if not is_described:
        return build
    types = {**build.types, "copy_SHDD": f"tensordesc<bf16[{dim}, {_BLOCK_V}]>"}
    # A step waits for memory: with 128 registers four programs lie on a processor, with more only three.
    return replace(build, types=types, max_registers=128)


_BLOCK_V = 64
_TYPES = dict.fromkeys(("qkv_BI", "out_BJ", "copy_SHDD", "k_recent_SHDC", "v_recent_SHCD"), "*bf16")
_TYPES |= {"slopes_H": "*fp32", "state_SHDD": "*fp32", "slot_B": "*i64", "row_B": "*i64"}
_TYPES |= {"qkv_row": "i32", "heads": "i32"}
_VARIANTS = [(dim, has_copy) for dim in HEAD_DIMS for has_copy in (False, True)]
_DECODE = {variant: _decode_build(*variant) for variant in _VARIANTS}
_FLUSH = {variant: _build("lightning_flush", flush_kernel, *variant) for variant in _VARIANTS}
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
    programs = (batch * heads * (dim // step.constants["BLOCK_V"]),)
    copy = () if copy_SHDD is None else (copy_SHDD,)
    described = tuple(map(_rows_of, copy)) if step.constants["IS_DESCRIBED"] else copy
    recent = (k_recent_SHDC, v_recent_SHCD)
    operands = (qkv_BI, out_BJ, slopes_H, slot_B, row_B, state_SHDD, *described, *recent)
    launch(step, programs, *operands, qkv_BI.stride(0), heads)
    flush_programs = (batch * FLUSH_PARTS * (dim // flush.constants["BLOCK_V"]),)
    launch(flush, flush_programs, slopes_H, slot_B, row_B, state_SHDD, *copy, *recent, heads)
    return out_BJ


def _rows_of(copy_SHDD: Tensor) -> TensorDescriptor:
    """The rounded states as the decode kernel reads them: one matrix of S H D rows, in tiles of a head's block."""
    dim = copy_SHDD.shape[-1]
    return TensorDescriptor(copy_SHDD, [copy_SHDD.numel() // dim, dim], [dim, 1], [dim, _BLOCK_V])
