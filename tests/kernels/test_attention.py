"""Softmax attention against the library's, in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels.chunks import chunk_grid
from cispo.kernels.softmax_attention import softmax_attention

LENGTHS = [[5, 64, 130, 1, 70], [128], [63, 65], [200, 3]]


def leaves(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def library_softmax(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, lengths: list[int]) -> Tensor:
    out = []
    for q, k, v in zip(q_NHD.split(lengths), k_NKD.split(lengths), v_NKD.split(lengths), strict=True):
        rows = F.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, enable_gqa=True
        )
        out.append(rows.transpose(0, 1))
    return torch.cat(out)


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, error


def check(actual: Tensor, actual_leaves: list[Tensor], expected: Tensor, expected_leaves: list[Tensor]) -> None:
    assert_relative(actual, expected)
    weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(9))
    gradients = torch.autograd.grad((actual * weight).sum(), actual_leaves)
    references = torch.autograd.grad((expected * weight.double()).sum(), expected_leaves)
    for gradient, reference in zip(gradients, references, strict=True):
        assert_relative(gradient, reference)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_softmax_equals_the_library(lengths: list[int], key_heads: int) -> None:
    tokens = sum(lengths)
    tensors = leaves((tokens, 4, 16), (tokens, key_heads, 16), (tokens, key_heads, 16))
    grid = chunk_grid(lengths, torch.device("cpu"))
    reference = doubles(tensors)
    check(softmax_attention(*tensors, grid), tensors, library_softmax(*reference, lengths), reference)


def test_a_sequence_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        chunk_grid([3, 0], torch.device("cpu"))
