"""The head's loss and gradients against plain autograd in float64, its blocks, and its bits."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cispo.kernels import cpu_library, head_loss
from cispo.kernels.head_loss import HeadLoss, head_logits, head_logprobs, head_policy_loss

SIZES = ((100, 32), (512, 128), (37, 16), (1100, 48), (100, 24))
"""V and D; of these kernels the last one has only the twin."""


@pytest.fixture(params=["fused", "plain"])
def either_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(cpu_library, "serves", lambda *tensors: False)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(rows: int = 30, vocabulary: int = 100, width: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden, weight, targets, torch.randn(rows, generator=generator)


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficient: Tensor, temperature: float = 0.7
) -> tuple[HeadLoss, Tensor, Tensor]:
    head = head_policy_loss(hidden, weight, targets, lambda _, rows: coefficient[rows], temperature=temperature)
    return head, *torch.autograd.grad(head.loss, (hidden, weight))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("vocabulary", "width"), SIZES)
def test_loss_and_gradients_equal_autograd(
    either_kernel: None, vocabulary: int, width: int, temperature: float
) -> None:
    hidden, weight, targets, coefficient = inputs(150, vocabulary, width)
    head = head_policy_loss(hidden, weight, targets, lambda _, rows: coefficient[rows], temperature=temperature)
    reference = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logprob_NV = torch.log_softmax(reference[0] @ reference[1].t() / temperature, dim=-1)
    logprob_N = logprob_NV[torch.arange(150), targets]
    loss = -(coefficient * logprob_N).sum()
    torch.testing.assert_close(head.logprob_N.double(), logprob_N.detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        head.entropy_N.double(), -(logprob_NV.exp() * logprob_NV).sum(-1).detach(), atol=2e-5, rtol=1e-5
    )
    torch.testing.assert_close(head.loss.double(), loss.detach(), atol=1e-3, rtol=1e-5)
    gradients = torch.autograd.grad(3.0 * head.loss, (hidden, weight))
    for actual, wanted in zip(gradients, torch.autograd.grad(3.0 * loss, reference), strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=1e-4, rtol=1e-4)


def test_blocks_change_no_logprob_and_are_seen_in_order(monkeypatch: pytest.MonkeyPatch, either_kernel: None) -> None:
    hidden, weight, targets, coefficient = inputs(50)
    whole, _ = head_logprobs(hidden, weight, targets, temperature=1.0)
    monkeypatch.setattr(head_loss, "BLOCK_ROWS", 16)
    seen: list[tuple[slice, Tensor]] = []

    def coefficients(logprob_C: Tensor, rows: slice) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append((rows, logprob_C.clone()))
        return coefficient[rows]

    head = head_policy_loss(hidden, weight, targets, coefficients, temperature=1.0)
    assert [rows for rows, _ in seen] == [slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 50)]
    assert torch.equal(torch.cat([logprob for _, logprob in seen]), whole)
    assert torch.equal(head.logprob_N, whole)
    assert not head.logprob_N.requires_grad


def test_tokens_with_coefficient_zero_have_no_gradient(either_kernel: None) -> None:
    hidden, weight, targets, _ = inputs()
    head = head_policy_loss(hidden, weight, targets, lambda logprob, _: torch.zeros_like(logprob), temperature=1.0)
    for gradient in torch.autograd.grad(head.loss, (hidden, weight)):
        assert gradient.abs().sum() == 0


def test_a_row_has_the_same_bits_alone_and_in_either_pass() -> None:
    hidden, weight, targets, coefficient = inputs(150, 100)
    head, dhidden, _ = loss_and_gradients(hidden, weight, targets, coefficient)
    logprob, entropy = head_logprobs(hidden, weight, targets, temperature=0.7)
    assert torch.equal(head.logprob_N, logprob)
    assert torch.equal(head.entropy_N, entropy)
    for row in (0, 47, 48, 149):
        one = slice(row, row + 1)
        leaf = hidden[one].detach().requires_grad_()
        alone, dleaf, _ = loss_and_gradients(leaf, weight, targets[one], coefficient[one])
        assert torch.equal(alone.logprob_N, logprob[one])
        assert torch.equal(alone.entropy_N, entropy[one])
        assert torch.equal(dleaf, dhidden[one])


def test_the_number_of_threads_changes_no_bit(restored_threads: None) -> None:
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        head, *gradients = loss_and_gradients(*inputs(300, 100))
        results.append((head.loss.detach(), head.logprob_N, head.entropy_N, *gradients))
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_a_second_backward_gives_the_same() -> None:
    hidden, weight, targets, coefficient = inputs()
    head = head_policy_loss(hidden, weight, targets, lambda _, rows: coefficient[rows], temperature=1.0)
    head.loss.backward(retain_graph=True)
    assert hidden.grad is not None
    assert weight.grad is not None
    once = hidden.grad.clone(), weight.grad.clone()
    head.loss.backward()
    assert torch.equal(hidden.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


def test_rows_may_lie_apart_and_coefficients_may_be_one_number() -> None:
    hidden, weight, targets, _ = inputs()
    wide = torch.cat((hidden.detach(), torch.zeros(30, 5)), dim=1)[:, :32].requires_grad_()
    results = []
    for leaf in (wide, hidden):
        head = head_policy_loss(
            leaf, weight, targets, lambda logprob, _: torch.ones(()).expand_as(logprob), temperature=1.0
        )
        results.append((head.loss.detach(), *torch.autograd.grad(head.loss, (leaf, weight))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_large_logits_neither_overflow_nor_lose_the_entropy(either_kernel: None) -> None:
    hidden, weight, targets, _ = inputs()
    logprob, entropy = head_logprobs(1e3 * hidden.detach(), weight, targets, temperature=1.0)
    assert logprob.isfinite().all()
    assert (entropy >= 0).all()
    assert entropy.max() < 1


def test_what_is_not_finite_stays_visible(either_kernel: None) -> None:
    hidden, weight, targets, _ = inputs()
    hidden = hidden.detach().clone()
    hidden[3, 5] = float("nan")
    logprob, entropy = head_logprobs(hidden, weight, targets, temperature=1.0)
    assert logprob.isnan().nonzero().tolist() == entropy.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("target", [-1, 100])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    hidden, weight, targets, coefficient = inputs()
    targets[7] = target
    with pytest.raises(IndexError, match="vocabulary of 100"):
        head_logprobs(hidden, weight, targets, temperature=1.0)
    with pytest.raises(IndexError, match="vocabulary of 100"):
        loss_and_gradients(hidden, weight, targets, coefficient)


def test_logprobs_are_those_of_the_logits() -> None:
    hidden, weight, targets, _ = inputs()
    logprob, _ = head_logprobs(hidden, weight, targets, temperature=0.7)
    expected = torch.log_softmax(head_logits(hidden, weight, temperature=0.7).detach(), dim=-1)
    torch.testing.assert_close(logprob, expected[torch.arange(30), targets], atol=2e-6, rtol=1e-6)


def test_no_rows_are_no_error() -> None:
    _, weight, _, _ = inputs()
    hidden = torch.zeros(0, 32, requires_grad=True)
    head, dhidden, dweight = loss_and_gradients(hidden, weight, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert dhidden.shape == (0, 32)
    assert head.loss == 0 == dweight.abs().sum()
