"""The digest kernel has the digest of its plain form, to the last bit."""

import pytest
import torch

from cispo.kernels.digest import Part, digests
from cispo.kernels.gpu.digest import add_digest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize(("count", "length", "first", "stride"), [(1, 5, 0, 0), (1, 40_000, 7, 0), (3, 100, 200, 900)])
def test_the_kernel_has_the_plain_forms_digest(
    dtype: torch.dtype, count: int, length: int, first: int, stride: int
) -> None:
    info = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(length)
    bits = torch.randint(info.min, info.max, (count * length,), generator=generator, dtype=dtype)
    expected = digests([Part(bits, first, count, stride)])
    sums = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    add_digest(bits.to(DEVICE), sums, 1, first=first, count=count, stride=stride)
    assert sums.tolist() == [0, int(expected)]
