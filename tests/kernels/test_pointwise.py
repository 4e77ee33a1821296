"""SiLU and sigmoid: the right values and gradients, and the same bits wherever an element lies."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels.pointwise import sigmoid, silu

FUNCTIONS = [(silu, F.silu), (sigmoid, torch.sigmoid)]


@pytest.fixture
def five_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("function", [silu, sigmoid])
def test_an_elements_bits_do_not_depend_on_its_place(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 4
    whole = function(x)
    for length in (1, 7, 37):
        assert torch.equal(torch.cat([function(part.clone()) for part in x.split(length)]), whole)


@pytest.mark.parametrize("function", [silu, sigmoid])
def test_nor_on_the_number_of_threads(five_threads: None, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(200_003, generator=torch.Generator().manual_seed(0)) * 4
    shared_out = function(x)
    torch.set_num_threads(1)
    assert torch.equal(function(x), shared_out)


@pytest.mark.parametrize(("ours", "library"), FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_librarys(
    ours: Callable[[Tensor], Tensor], library: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = torch.cat([torch.linspace(-30, 30, 601), torch.tensor([-200.0, -100.0, 0.0, 100.0, 200.0])]).to(dtype)
    results = []
    for function in (ours, library):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        assert out.dtype is dtype
        (out.float() * torch.arange(len(x))).sum().backward()
        results.append((out.detach(), leaf.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
