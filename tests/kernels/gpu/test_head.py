"""The head on CUDA against float64: loss, gradients, spans of several blocks, and a row's bits."""

import pytest
import torch
from torch import Tensor

from cispo.kernels.gpu import head as gpu
from cispo.kernels.head_loss import head_logits, head_logprobs, head_policy_loss
from cispo.rollout.sampling import sample_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head weight, targets, and coefficients of which a third is 0."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / 4).to(DEVICE, dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).to(DEVICE)
    coefficient = torch.randn(rows, generator=generator) * (torch.arange(rows) % 3 > 0)
    return hidden, weight, targets, coefficient.to(DEVICE)


def expected(hidden: Tensor, weight: Tensor, targets: Tensor, coefficient: Tensor, temperature: float) -> list[Tensor]:
    """Loss, logprobs, entropies and both gradients in float64."""
    doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logprob_NV = torch.log_softmax(doubles[0] @ doubles[1].t() / temperature, dim=-1)
    logprob_N = logprob_NV.gather(1, targets[:, None])[:, 0]
    loss = -(coefficient * logprob_N).sum()
    gradients = torch.autograd.grad(3.0 * loss, doubles)
    return [loss.detach(), logprob_N.detach(), -(logprob_NV.exp() * logprob_NV).sum(-1).detach(), *gradients]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("span_rows", [8192, 60])
@pytest.mark.parametrize(("rows", "vocabulary"), [(100, 100), (70, 1003), (1, 4500)])
def test_loss_and_gradients_equal_autograd(
    rows: int, vocabulary: int, span_rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "SPAN_ROWS", span_rows)
    monkeypatch.setattr(gpu, "SPARE_ROWS", 16)
    monkeypatch.setattr(gpu, "BLOCK_MULTIPLE", 16)
    hidden, weight, targets, coefficient = inputs(rows, vocabulary, 32, torch.float32)
    seen: list[slice] = []

    def coefficients(logprob_C: Tensor, block: slice) -> Tensor:
        seen.append(block)
        return coefficient[block]

    loss, logprob, entropy = gpu.head_policy_loss(hidden, weight, targets, coefficients, temperature)
    gradients = torch.autograd.grad(3.0 * loss, (hidden, weight))
    assert [row for block in seen for row in range(block.start, block.stop)] == list(range(rows))
    wanted = expected(hidden, weight, targets, coefficient, temperature)
    for ours, reference in zip((loss, logprob, entropy, *gradients), wanted, strict=True):
        torch.testing.assert_close(ours.detach().double(), reference, atol=3e-4, rtol=1e-5)
    scored, _ = gpu.head_logprobs(hidden.detach(), weight.detach(), targets, temperature)
    # On CUDA the library's float32 product has other bits at other row counts, which the two passes' blocks are.
    torch.testing.assert_close(scored, logprob, atol=0 if DEVICE == "cpu" else 5e-5, rtol=0)


def test_rows_whose_coefficient_is_zero_are_in_no_gradient() -> None:
    hidden, weight, targets, _ = inputs(40, 100, 16, torch.float32)
    loss, *_ = gpu.head_policy_loss(hidden, weight, targets, lambda logprob, _: torch.zeros_like(logprob), 1.0)
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.abs().sum() == 0


def test_a_row_sampled_at_its_own_temperature_has_the_learners_bits() -> None:
    hidden, weight, targets, _ = inputs(140, 1003, 32, torch.float32)
    logits = hidden.detach() @ weight.detach().t()
    assert gpu.row_logprobs(logits, targets).shape == (140,)
    logprob, entropy, lse = torch.full((3, 140), float("nan"), device=DEVICE).unbind(0)
    gpu._statistics(logits, targets, torch.full((140,), 0.7, device=DEVICE), logprob, entropy, lse)
    for rows in (slice(0, 1), slice(7, 20), slice(139, 140)):
        temperature = torch.full((targets[rows].shape[0],), 0.7, device=DEVICE)
        assert torch.equal(gpu.row_logprobs(logits[rows].clone(), targets[rows], temperature), logprob[rows])


def test_no_rows_and_targets_outside_the_vocabulary() -> None:
    hidden, weight, targets, coefficient = inputs(0, 100, 16, torch.float32)
    loss, *_ = gpu.head_policy_loss(hidden, weight, targets, lambda _, rows: coefficient[rows], 1.0)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    assert dhidden.shape == (0, 16)
    assert loss == 0 == dweight.abs().sum()
    hidden, weight, targets, _ = inputs(3, 100, 16, torch.float32)
    targets[1] = 100
    logprob, _ = gpu.head_logprobs(hidden.detach(), weight.detach(), targets, 1.0)
    assert logprob.isnan().tolist() == [False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("span_rows", [8192, 700])
@pytest.mark.parametrize("vocabulary", [5003, 5008])
def test_bfloat16_is_near_float64(vocabulary: int, span_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SPAN_ROWS", span_rows)
    hidden, weight, targets, coefficient = inputs(1000, vocabulary, 512, torch.bfloat16)
    head = head_policy_loss(hidden, weight, targets, lambda _, rows: coefficient[rows], temperature=0.7)
    gradients = torch.autograd.grad(3.0 * head.loss, (hidden, weight))
    limits = (1e-5, 1e-5, 1e-5, 4e-3, 4e-3)
    results = (head.loss, head.logprob_N, head.entropy_N, *gradients)
    wanted = expected(hidden, weight, targets, coefficient, 0.7)
    for ours, reference, limit in zip(results, wanted, limits, strict=True):
        assert (ours.double() - reference).norm() / reference.norm() < limit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("vocabulary", "width"), [(5003, 512), (5008, 512), (151_936, 2048)])
def test_sampling_scoring_and_training_give_a_row_the_same_bits(
    vocabulary: int, width: int, dtype: torch.dtype
) -> None:
    hidden, weight, targets, coefficient = inputs(2000, vocabulary, width, dtype)
    head = head_policy_loss(hidden, weight, targets, lambda _, rows: coefficient[rows], temperature=0.7)
    hidden, weight = hidden.detach(), weight.detach()
    logprob, entropy = head_logprobs(hidden, weight, targets, temperature=0.7)
    if dtype is torch.float32:
        # The library's float32 product splits its sums by the row count, and the two passes have other blocks of rows.
        torch.testing.assert_close(head.logprob_N, logprob, atol=5e-5, rtol=0)
        torch.testing.assert_close(head.entropy_N, entropy, atol=5e-5, rtol=0)
        return
    assert torch.equal(head.logprob_N, logprob)
    assert torch.equal(head.entropy_N, entropy)
    for rows in (1, 5, 16, 33, 64, 130):
        logits = head_logits(hidden[-rows:].clone(), weight)
        temperature = torch.full((rows,), 0.7, device="cuda")
        assert torch.equal(gpu.row_logprobs(logits, targets[-rows:], temperature), logprob[-rows:]), rows
        ids, sampled = sample_tokens(logits, torch.rand(rows, dtype=torch.float64, device="cuda"), temperature)
        assert torch.equal(head_logprobs(hidden[-rows:], weight, ids, temperature=0.7)[0], sampled), rows
