"""The head's loss and gradients against plain autograd in float64, and its blocks."""

import pytest
import torch
from torch import Tensor

from cispo.kernels import head_loss
from cispo.kernels.head_loss import head_logprobs, head_policy_loss


def inputs(rows: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 32, generator=generator).requires_grad_()
    weight = torch.randn(100, 32, generator=generator).requires_grad_()
    targets = torch.randint(0, 100, (rows,), generator=generator)
    return hidden, weight, targets, torch.randn(rows, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradients_equal_autograd(temperature: float) -> None:
    hidden, weight, targets, coefficient = inputs()
    head = head_policy_loss(hidden, weight, targets, lambda _, rows: coefficient[rows], temperature=temperature)
    reference = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logprob_NV = torch.log_softmax(reference[0] @ reference[1].t() / temperature, dim=-1)
    logprob_N = logprob_NV[torch.arange(30), targets]
    loss = -(coefficient * logprob_N).sum()
    torch.testing.assert_close(head.logprob_N.double(), logprob_N.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        head.entropy_N.double(), -(logprob_NV.exp() * logprob_NV).sum(-1).detach(), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(head.loss.double(), loss.detach(), atol=1e-4, rtol=1e-5)
    gradients = torch.autograd.grad(3.0 * head.loss, (hidden, weight))
    for actual, wanted in zip(gradients, torch.autograd.grad(3.0 * loss, reference), strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=1e-4, rtol=1e-4)


def test_blocks_change_no_logprob_and_are_seen_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, coefficient = inputs(50)
    whole, _ = head_logprobs(hidden, weight, targets, temperature=1.0)
    monkeypatch.setattr(head_loss, "BLOCK_ROWS", 16)
    seen: list[tuple[slice, Tensor]] = []

    def coefficients(logprob_C: Tensor, rows: slice) -> Tensor:
        seen.append((rows, logprob_C.clone()))
        return coefficient[rows]

    head = head_policy_loss(hidden, weight, targets, coefficients, temperature=1.0)
    assert [rows for rows, _ in seen] == [slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 50)]
    assert torch.equal(torch.cat([logprob for _, logprob in seen]), whole)
    assert torch.equal(head.logprob_N, whole)
    assert not head.logprob_N.requires_grad


def test_tokens_with_coefficient_zero_have_no_gradient() -> None:
    hidden, weight, targets, _ = inputs()
    head = head_policy_loss(hidden, weight, targets, lambda logprob, _: torch.zeros_like(logprob), temperature=1.0)
    for gradient in torch.autograd.grad(head.loss, (hidden, weight)):
        assert gradient.abs().sum() == 0
