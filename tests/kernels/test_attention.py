"""Attention twins against the token recurrence and the library's softmax, in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels.chunks import chunk_grid
from cispo.kernels.lightning_attention import decays, lightning_attention
from cispo.kernels.softmax_attention import softmax_attention

LENGTHS = [[5, 64, 130, 1, 70], [128], [63, 65], [200, 3]]
SLOPES_H = torch.tensor([0.917, 0.25, 0.06, 0.004])


def leaves(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def recurrence(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, lengths: list[int]) -> Tensor:
    """S_t = exp(-s) S_{t-1} + k_t^T v_t, o_t = q_t S_t, token by token."""
    decay_H11 = torch.exp(-SLOPES_H.double()).view(-1, 1, 1)
    out, token = [], 0
    for length in lengths:
        state_HDD = torch.zeros(q_NHD.shape[1], q_NHD.shape[2], v_NHD.shape[2], dtype=torch.float64)
        for _ in range(length):
            state_HDD = decay_H11 * state_HDD + k_NHD[token].unsqueeze(2) * v_NHD[token].unsqueeze(1)
            out.append((q_NHD[token].unsqueeze(1) @ state_HDD).squeeze(1))
            token += 1
    return torch.stack(out)


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
@pytest.mark.parametrize("dim", [8, 32])
def test_lightning_equals_the_recurrence(lengths: list[int], dim: int) -> None:
    tensors = leaves(*[(sum(lengths), 4, dim)] * 3)
    grid = chunk_grid(lengths, torch.device("cpu"))
    reference = doubles(tensors)
    check(lightning_attention(*tensors, decays(SLOPES_H), grid), tensors, recurrence(*reference, lengths), reference)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_softmax_equals_the_library(lengths: list[int], key_heads: int) -> None:
    tokens = sum(lengths)
    tensors = leaves((tokens, 4, 16), (tokens, key_heads, 16), (tokens, key_heads, 16))
    grid = chunk_grid(lengths, torch.device("cpu"))
    reference = doubles(tensors)
    check(softmax_attention(*tensors, grid), tensors, library_softmax(*reference, lengths), reference)


def test_steep_slopes_do_not_overflow() -> None:
    q, k, v = leaves(*[(300, 1, 8)] * 3)
    out = lightning_attention(q, k, v, decays(torch.tensor([50.0])), chunk_grid([300], torch.device("cpu")))
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v, atol=1e-5, rtol=1e-5)


def test_a_sequence_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        chunk_grid([3, 0], torch.device("cpu"))
