"""Experts against a loop over tokens in float64, routing by its rules, and the same bits whatever runs beside."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels import experts_cpu
from cispo.kernels.experts import expert_layer, route, swiglu_experts, swiglu_experts_dense

Form = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def twin(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, experts_per_token: int) -> Tensor:
    return swiglu_experts(x, route(x @ router.t(), experts_per_token), gate_up, down)


def leaves(tokens: int, width: int = 32, experts: int = 4, inner: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, width), (experts, width), (experts, 2 * inner, width), (experts, width, inner)]
    return [(torch.randn(shape, generator=generator) * 0.5).requires_grad_() for shape in shapes]


def loop(x_ND: Tensor, router_ED: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, experts_per_token: int) -> Tensor:
    chosen = torch.softmax(x_ND @ router_ED.t(), dim=-1).topk(experts_per_token)
    weight_NK = chosen.values / chosen.values.sum(-1, keepdim=True)
    rows = []
    for token, (ids, weights) in enumerate(zip(chosen.indices.tolist(), weight_NK, strict=True)):
        total = torch.zeros(x_ND.shape[1], dtype=x_ND.dtype)
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = (gate_up_EFD[expert] @ x_ND[token]).chunk(2)
            total = total + weight * (down_EDF[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def with_gradients(form: Form, tensors: list[Tensor], experts_per_token: int) -> tuple[Tensor, ...]:
    x, router, gate_up, down = tensors
    out = form(x, router, gate_up, down, experts_per_token)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), tensors)


@pytest.mark.parametrize("form", [expert_layer, twin])
@pytest.mark.parametrize(
    ("tokens", "width", "experts", "inner", "experts_per_token"),
    [
        (1, 32, 4, 16, 2),
        (7, 48, 3, 80, 2),
        (64, 32, 4, 16, 2),
        (500, 16, 2, 32, 1),
        (90, 32, 20, 16, 17),
        (5, 16, 1, 16, 1),
    ],
)
def test_experts_equal_a_loop_forward_and_backward(
    form: Form, tokens: int, width: int, experts: int, inner: int, experts_per_token: int
) -> None:
    tensors = leaves(tokens, width, experts, inner)
    assert form is twin or experts_cpu.serves(*tensors)
    actual = with_gradients(form, tensors, experts_per_token)
    reference = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for mine, wanted in zip(actual, with_gradients(loop, reference, experts_per_token), strict=True):
        torch.testing.assert_close(mine.double(), wanted, atol=2e-5, rtol=2e-5)


def test_a_size_that_is_no_multiple_of_the_lanes_takes_the_twin() -> None:
    tensors = leaves(6, width=24, inner=20)
    assert not experts_cpu.serves(*tensors)
    assert torch.equal(expert_layer(*tensors, 2), twin(*tensors, 2))


def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_training() -> None:
    x, router, gate_up, down = leaves(700, width=32, experts=5, inner=48)
    trained = expert_layer(x, router, gate_up, down, 2)
    with torch.no_grad():
        for first, last in ((0, 1), (3, 5), (0, 64), (100, 117), (0, 700)):
            rows = expert_layer(x[first:last], router, gate_up, down, 2)
            assert torch.equal(rows, trained[first:last]), (first, last)


def test_the_number_of_threads_changes_no_bit() -> None:
    tensors, results = leaves(900, width=32, experts=5, inner=48), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(expert_layer, tensors, 2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_changed_weight_is_used_at_once() -> None:
    x, router, gate_up, down = (tensor.detach() for tensor in leaves(8))
    before = expert_layer(x, router, gate_up, down, 2)
    down.mul_(2.0)
    assert torch.equal(expert_layer(x, router, gate_up, down, 2), 2.0 * before)


@pytest.mark.parametrize("tokens", [4, 16, 60])
def test_the_dense_form_has_the_same_bits(tokens: int) -> None:
    x, router, gate_up, down = leaves(tokens)
    routing = route(x @ router.t(), 2)
    with torch.no_grad():
        dense = swiglu_experts_dense(x, routing, gate_up, down)
        assert torch.equal(dense, swiglu_experts(x, routing, gate_up, down))


def test_an_expert_without_tokens_gets_no_gradient() -> None:
    x, router, gate_up, down = leaves(8)
    with torch.no_grad():
        x[:, 0] = 1.0
        router.zero_()
        router[:, 0] = torch.tensor([3.0, 2.0, -9.0, -9.0])
    expert_layer(x, router, gate_up, down, 2).sum().backward()
    assert gate_up.grad is not None
    assert gate_up.grad[:2].abs().sum() > 0
    assert gate_up.grad[2:].abs().sum() == 0


def test_equal_logits_go_to_the_lower_index_and_weights_sum_to_one() -> None:
    routing = route(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 1.0, 5.0]]), 2)
    assert routing.expert_ids_NK.tolist() == [[0, 1], [1, 3]]
    torch.testing.assert_close(routing.weight_NK.sum(-1), torch.ones(2))
