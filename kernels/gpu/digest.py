"""The digest of a tensor's bits on CUDA, in one pass over memory; see `cispo.kernels.digest`."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.digest import FIRST_FACTOR, SECOND_FACTOR
from cispo.kernels.gpu.build import Build

_FIRST = tl.constexpr(FIRST_FACTOR)
_SECOND = tl.constexpr(SECOND_FACTOR)


@triton.jit
def _digest_kernel(bits, sums, index, length, first, stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Adds the digest of BLOCKS blocks of a run to sums[index]; integers, so the order of additions does not matter."""
    run = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    total = tl.zeros([BLOCK], tl.int64)
    for block in range(BLOCKS):
        at = begin + block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        value = tl.load(bits + run * length + at, mask=at < length, other=0).to(tl.int64)
        mixed = (first + run * stride + at + 1) * _FIRST
        mixed = (mixed ^ (mixed >> 32)) * _SECOND | 1
        total += value * mixed
    tl.atomic_add(sums + index, tl.sum(total, 0), sem="relaxed")


_BLOCK, _BLOCKS = 1024, 16


@cache
def _build(bits: str) -> Build:
    types = {"bits": f"*{bits}", "sums": "*i64"} | dict.fromkeys(("index", "length", "first", "stride"), "i64")
    return Build(f"digest_{bits}", _digest_kernel, types, {"BLOCK": _BLOCK, "BLOCKS": _BLOCKS}, 4, 1, False)


_NAMES = {torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
BUILDS = [_build(bits) for bits in ("i16", "i32")]


def add_digest(bits: Tensor, sums: Tensor, index: int, *, first: int, count: int, stride: int) -> None:
    """Add the digest of a flat integer tensor, `count` runs of it `stride` places apart, to sums[index] (int64)."""
    length = bits.numel() // count
    grid = (triton.cdiv(length, _BLOCK * _BLOCKS), count)
    _build(_NAMES[bits.dtype]).launch(grid, bits, sums, index, length, first, stride)
