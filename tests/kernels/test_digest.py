"""The digest of bits: seen in every element and place, the same from parts as from the whole, checked by hand."""

import pytest
import torch
from torch import Tensor

from cispo.kernels.digest import Part, digests

MASK = (1 << 64) - 1


def by_hand(x: Tensor) -> int:
    """The formula in Python's integers."""
    bits = x.contiguous().view(-1).view(torch.int16 if x.element_size() == 2 else torch.int32).tolist()
    total = 0
    for place, value in enumerate(bits):
        mixed = (place + 1) * 0x9E3779B97F4A7C15 & MASK
        high = mixed >> 32 | (0xFFFFFFFF00000000 if mixed >> 63 else 0)  # an arithmetic shift
        total += value * ((mixed ^ high) * 0xBF58476D1CE4E5B9 & MASK | 1)
    total &= MASK
    return total - (1 << 64) if total >> 63 else total


def digest(x: Tensor) -> int:
    return int(digests([Part(x)])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 33, 17)])
def test_it_is_the_formula(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert digest(x) == by_hand(x)


def test_every_bit_and_every_exchange_is_seen() -> None:
    x = torch.randn(40, generator=torch.Generator().manual_seed(1))
    whole = digest(x)
    for place in range(40):
        for bit in (0, 13, 31):
            changed = x.clone()
            changed.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(1 << 31)
            assert digest(changed) != whole
    exchanged = x.clone()
    exchanged[[3, 17]] = x[[17, 3]]
    assert digest(exchanged) != whole


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_parts_add_up_to_the_whole(dim: int) -> None:
    x = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(2)).bfloat16()
    bounds = [(0, 2), (2, x.shape[dim]), (x.shape[dim], x.shape[dim])]
    parts = [Part.of(x.narrow(dim, start, end - start), x.shape, dim, start) for start, end in bounds]
    assert int(digests(parts).sum()) == digest(x)


def test_a_long_tensor_is_summed_in_pieces_to_the_same() -> None:
    x = torch.arange(600_000, dtype=torch.float32)
    cut = 300_001
    assert int(digests([Part(x[:cut]), Part(x[cut:], first=cut)]).sum()) == digest(x)


def test_nothing_has_digest_0() -> None:
    assert digests([Part(torch.empty(0, 3)), Part(torch.zeros(4))]).tolist() == [0, 0]
