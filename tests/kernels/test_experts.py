"""Experts against a loop over tokens in float64, and routing by its rules."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels.experts import route, swiglu_experts, swiglu_experts_dense


def leaves(tokens: int, width: int = 32, experts: int = 4, inner: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, width), (experts, width), (experts, 2 * inner, width), (experts, width, inner)]
    return [(torch.randn(shape, generator=generator) * 0.5).requires_grad_() for shape in shapes]


def loop(x_ND: Tensor, router_ED: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    chosen = torch.softmax(x_ND @ router_ED.t(), dim=-1).topk(2)
    weight_NK = chosen.values / chosen.values.sum(-1, keepdim=True)
    rows = []
    for token, (ids, weights) in enumerate(zip(chosen.indices.tolist(), weight_NK, strict=True)):
        total = torch.zeros(x_ND.shape[1], dtype=x_ND.dtype)
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = (gate_up_EFD[expert] @ x_ND[token]).chunk(2)
            total = total + weight * (down_EDF[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_experts_equal_a_loop_forward_and_backward(tokens: int) -> None:
    x, router, gate_up, down = tensors = leaves(tokens)
    reference = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out, expected = swiglu_experts(x, route(x @ router.t(), 2), gate_up, down), loop(*reference)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * weight).sum(), tensors)
    references = torch.autograd.grad((expected * weight.double()).sum(), reference)
    for actual, wanted in zip((out, *gradients), (expected, *references), strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("tokens", [4, 16, 60])
def test_the_dense_form_has_the_same_bits(tokens: int) -> None:
    x, router, gate_up, down = leaves(tokens)
    routing = route(x @ router.t(), 2)
    with torch.no_grad():
        dense = swiglu_experts_dense(x, routing, gate_up, down)
        assert torch.equal(dense, swiglu_experts(x, routing, gate_up, down))


def test_an_expert_without_tokens_gets_no_gradient() -> None:
    x, _, gate_up, down = leaves(8)
    logits = torch.tensor([[3.0, 2.0, -9.0, -9.0]]).expand(8, 4)
    swiglu_experts(x, route(logits, 2), gate_up, down).sum().backward()
    assert gate_up.grad is not None
    assert gate_up.grad[:2].abs().sum() > 0
    assert gate_up.grad[2:].abs().sum() == 0


def test_equal_logits_go_to_the_lower_index_and_weights_sum_to_one() -> None:
    routing = route(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 1.0, 5.0]]), 2)
    assert routing.expert_ids_NK.tolist() == [[0, 1], [1, 3]]
    torch.testing.assert_close(routing.weight_NK.sum(-1), torch.ones(2))
