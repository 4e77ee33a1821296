"""A digest of tensors' bits, computed where they are: a 64-bit sum that sees every element and its place.

    digest(x) = sum_i bits(x_i) m(i) mod 2^64,   m(i) an odd number mixed from i

Integer sums have no rounding, so the digest of a tensor is that of its parts added up, in any order, whoever holds
them. One flipped bit changes it, and so do two elements that have changed places. It is no defence against who wants to
cheat.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_FACTOR = -7046029254386353131
SECOND_FACTOR = -4658895280553007687
"""Odd numbers of mixed bits: the golden ratio times 2^64, and one of splitmix64's (as signed integers)."""
_CHUNK = 1 << 18
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What is held of a tensor: `count` runs of consecutive elements, `length` each, `stride` apart, from `first` on.

    first, length, stride count elements of the whole tensor, in row-major order.
    """

    held: Tensor
    first: int = 0
    count: int = 1
    stride: int = 0

    @classmethod
    def of(cls, held: Tensor, whole: torch.Size, dim: int, start: int) -> "Part":
        """Rows along `dim` of a tensor of shape `whole`, from row `start` on."""
        inner = whole[dim + 1 :].numel()
        return cls(held, start * inner, whole[:dim].numel(), whole[dim] * inner)


def digests(parts: Sequence[Part]) -> Tensor:
    """The digest of each part, int64 [P] on the device of the first; nothing waits for the device."""
    device = parts[0].held.device if parts else torch.device("cpu")
    sums_P = torch.zeros(len(parts), dtype=torch.int64, device=device)
    for index, part in enumerate(parts):
        bits = part.held.detach().contiguous().view(-1)
        bits = bits.view(_INTEGERS[bits.element_size()])
        if not bits.numel():
            continue
        if bits.is_cuda:
            from cispo.kernels.gpu.digest import add_digest

            add_digest(bits, sums_P, index, first=part.first, count=part.count, stride=part.stride)
        else:
            sums_P[index] = _digest(bits, part)
    return sums_P


def _digest(bits: Tensor, part: Part) -> Tensor:
    """The plain form of the kernel."""
    total = torch.zeros((), dtype=torch.int64)
    for row, run in enumerate(bits.view(part.count, -1)):
        for start in range(0, len(run), _CHUNK):
            piece = run[start : start + _CHUNK]
            first = part.first + row * part.stride + start
            place = torch.arange(first, first + len(piece), dtype=torch.int64)
            total += piece.long().mul_(multipliers(place)).sum()
    return total


def multipliers(place: Tensor) -> Tensor:
    """m(i) of int64 places, which are overwritten."""
    mixed = place.add_(1).mul_(FIRST_FACTOR)
    return mixed.bitwise_xor_(mixed >> 32).mul_(SECOND_FACTOR).bitwise_or_(1)
