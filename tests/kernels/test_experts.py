"""Experts against a loop over tokens in float64, and the same bits whatever runs beside."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from cispo.kernels import experts_cpu
from cispo.kernels.experts import expert_layer, swiglu_experts, swiglu_experts_dense
from cispo.kernels.routing import choose, route, router_logits

Form = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def twin(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, experts_per_token: int) -> Tensor:
    return swiglu_experts(x, route(router_logits(x, router), experts_per_token), gate_up, down)


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


def steered_twin(
    x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, threshold_N: Tensor | None, given_ids_NK: Tensor
) -> Tensor:
    routing = route(
        router_logits(x, router), given_ids_NK.shape[1], threshold_N=threshold_N, given_ids_NK=given_ids_NK
    )
    return swiglu_experts(x, routing, gate_up, down)


def steered_kernel(
    x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, threshold_N: Tensor | None, given_ids_NK: Tensor
) -> Tensor:
    assert experts_cpu.serves(x, router, gate_up, down)
    return expert_layer(
        x, router, gate_up, down, given_ids_NK.shape[1], threshold_N=threshold_N, given_ids_NK=given_ids_NK
    )


def thresholded_loop(tensors: Sequence[Tensor], thresholds: Sequence[float], ids_NK: Tensor) -> Tensor:
    """The rule as it is written: softmax, share of the chosen, drop, share again."""
    x_ND, router_ED, gate_up_EFD, down_EDF = tensors
    rows = []
    for x_D, threshold, ids in zip(x_ND, thresholds, ids_NK.tolist(), strict=True):
        probability_E = torch.softmax(router_ED @ x_D, dim=-1)
        shares = [probability / sum(probability_E[ids].tolist()) for probability in probability_E[ids].tolist()]
        kept = [e for e, share in zip(ids, shares, strict=True) if share >= threshold or share == max(shares)]
        weights = [probability_E[e] / sum(probability_E[i] for i in kept) for e in kept]
        outputs = []
        for e, weight in zip(kept, weights, strict=True):
            gate, up = (gate_up_EFD[e] @ x_D).chunk(2)
            outputs.append(weight * (down_EDF[e] @ (F.silu(gate) * up)))
        rows.append(torch.stack(outputs).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("form", [steered_kernel, steered_twin])
@given(
    thresholds=st.lists(st.floats(0, 0.99), min_size=1, max_size=9),
    experts_per_token=st.integers(1, 20),
    is_reversed=st.booleans(),
)
def test_a_threshold_follows_its_rule_forward_and_backward(
    form: Callable[..., Tensor], thresholds: list[float], experts_per_token: int, is_reversed: bool
) -> None:
    tensors = leaves(len(thresholds), experts=20)
    ids_NK = choose(router_logits(*tensors[:2]), experts_per_token)
    if is_reversed:  # the heaviest need not come first where experts are given
        ids_NK = ids_NK.flip(-1)
    shares_NK = route(router_logits(*tensors[:2]), experts_per_token).weight_NK.detach()
    assume(((shares_NK - torch.tensor(thresholds).unsqueeze(1)).abs() > 1e-4).all())
    reference = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = thresholded_loop(reference, thresholds, ids_NK)
    actual = form(*tensors, torch.tensor(thresholds), ids_NK)
    weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((actual * weight).sum(), tensors)
    wanted_gradients = torch.autograd.grad((wanted * weight).sum(), reference)
    for mine, theirs in zip((actual, *gradients), (wanted, *wanted_gradients), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=2e-5)


def test_a_row_that_drops_nothing_keeps_its_bits() -> None:
    x, router, gate_up, down = leaves(64, experts=20)
    for form in (steered_kernel, steered_twin):
        ids_NK = choose(router_logits(x, router), 5)
        plain = form(x, router, gate_up, down, None, ids_NK)
        shares_NK = route(router_logits(x, router), 5).weight_NK
        threshold_N = torch.where(torch.arange(64) % 2 == 0, shares_NK.min(-1).values * 0.99, 0.9).detach()
        mixed = form(x, router, gate_up, down, threshold_N, ids_NK)
        assert torch.equal(mixed[::2], plain[::2])
        assert not torch.equal(mixed[1::2], plain[1::2])


def test_given_experts_are_taken_and_weighed_by_the_router() -> None:
    tensors = leaves(50, experts=6)
    own_NK = choose(router_logits(*tensors[:2]), 2)
    assert torch.equal(steered_kernel(*tensors, None, own_NK.to(torch.uint8)), expert_layer(*tensors, 2))
    assert torch.equal(steered_twin(*tensors, None, own_NK.to(torch.int16)), twin(*tensors, 2))
    other_NK = torch.stack([(own_NK[:, 0] + 1) % 6, own_NK[:, 0]], dim=-1)
    results = []
    for form in (steered_kernel, steered_twin):
        out = form(*tensors, None, other_NK)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)
    reference = [tensor.detach().double() for tensor in tensors]
    wanted = thresholded_loop(reference, [0.0] * 50, other_NK)
    torch.testing.assert_close(results[0][0].double(), wanted, atol=2e-5, rtol=2e-5)
    assert results[0][2].abs().sum() > 0, "the router learns from the weights"


@pytest.mark.parametrize(("experts", "inner"), [(4, 16), (20, 16), (4, 20)])
def test_what_is_observed_is_what_the_rule_says(experts: int, inner: int) -> None:
    x, router, gate_up, down = leaves(40, experts=experts, inner=inner)
    threshold_N = torch.linspace(0, 0.99, 40)
    seen: list[tuple[Tensor, Tensor]] = []

    def observe(ids_NK: Tensor, entropy_N: Tensor) -> None:
        seen.append((ids_NK, entropy_N))

    for is_training in (True, False):
        with torch.set_grad_enabled(is_training):
            expert_layer(x, router, gate_up, down, 3, threshold_N=threshold_N, observe=observe)
        ids_NK, entropy_N = seen.pop()
        assert not seen, "observed once"
        assert torch.equal(ids_NK.long(), route(router_logits(x, router), 3, threshold_N=threshold_N).kept_ids_NK)
        assert (ids_NK == -1).any()
        probability_NE = torch.softmax(x.double() @ router.double().t(), dim=-1)
        wanted_N = -(probability_NE * probability_NE.log()).sum(-1)
        torch.testing.assert_close(entropy_N.double(), wanted_N, atol=1e-6, rtol=1e-6)
        assert not entropy_N.requires_grad


def test_ids_and_thresholds_of_other_tokens_are_refused() -> None:
    x, router, gate_up, down = leaves(4)
    with pytest.raises(ValueError, match="from 0 to 4 for 4 experts"):
        expert_layer(x, router, gate_up, down, 2, given_ids_NK=torch.tensor([[0, 1]] * 3 + [[0, 4]]))
    with pytest.raises(ValueError, match=r"expected \(4, 2\)"):
        expert_layer(x, router, gate_up, down, 2, given_ids_NK=torch.zeros(3, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="for 4 tokens"):
        expert_layer(x, router, gate_up, down, 2, threshold_N=torch.zeros(3))
