import math
from collections.abc import Callable
from itertools import pairwise

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor

from cispo.batch import TokenBatch
from cispo.objective import Coefficients, build_objective
from cispo.objective_settings import ObjectiveSettings

ADAPTER: TypeAdapter[ObjectiveSettings] = TypeAdapter(ObjectiveSettings)
MASKED_CISPO = {"name": "cispo", "ratio_max": math.inf, "mask_ratio_low": 0.8, "mask_ratio_high": 1.2}
EVERY_OBJECTIVE: list[dict[str, object]] = [
    {"name": "cispo", "ratio_max": 2.0},
    {"name": "cispo", "ratio_max": 1.5, "ratio_min": 0.5, "mask_ratio_low": 0.8, "mask_ratio_high": 1.2},
    {"name": "cispo", "ratio_max": 2.0, "anchor": "proximal", "kl_coefficient": 0.3},
    {"name": "grpo"},
    {"name": "grpo", "kl_coefficient": 0.04, "anchor": "proximal"},
    {"name": "dapo"},
    {"name": "dr_grpo", "normaliser_tokens": 7},
    {"name": "cispo", "anchor": "proximal", "rollout_correction": "truncated", "kl_coefficient": 0.2},
    {"name": "dapo", "anchor": "proximal", "rollout_correction": "masked", "rollout_correction_max": 3.0},
    {"name": "reinforce"},
    {"name": "reinforce", "kl_coefficient": 0.1},
]


def token_batch(seed: int, count: int = 400, spread: float = 1.0) -> TokenBatch:
    """Float64 tokens whose ratios reach far beyond every bound; advantages of both signs and 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    logprob_N = -normal().abs() - 0.01
    return TokenBatch(
        logprob_N=logprob_N,
        rollout_logprob_N=logprob_N + spread * normal(),
        proximal_logprob_N=logprob_N + spread * normal(),
        reference_logprob_N=logprob_N + spread * normal(),
        advantage_N=normal().mul(2).round().div(2),
        loss_mask_N=torch.rand(count, generator=generator) < 0.8,
        weight_N=normal().abs(),
        sequence_N=torch.arange(count) // 10,
        group_N=torch.arange(count) // 40,
        policy_version_N=torch.zeros(count, dtype=torch.int64),
    )


def coefficients(settings: dict[str, object], batch: TokenBatch) -> Coefficients:
    return build_objective(ADAPTER.validate_python(settings)).coefficients(batch)


def paper_loss(settings: ObjectiveSettings, batch: TokenBatch) -> Callable[[Tensor], Tensor]:
    """The loss as its paper writes it, for autograd; written down apart from the code under test."""

    def loss(logprob: Tensor) -> Tensor:
        if settings.name == "reinforce":
            terms = logprob * batch.advantage_N
        else:
            anchor = batch.rollout_logprob_N if settings.anchor == "rollout" else batch.proximal_logprob_N
            assert anchor is not None
            ratio = torch.exp(logprob - anchor)
            if settings.name == "cispo":
                keep = torch.ones_like(ratio)
                if settings.mask_ratio_high is not None and settings.mask_ratio_low is not None:
                    keep[(batch.advantage_N > 0) & (ratio > settings.mask_ratio_high)] = 0
                    keep[(batch.advantage_N < 0) & (ratio < settings.mask_ratio_low)] = 0
                clipped = torch.clamp(ratio, settings.ratio_min, settings.ratio_max).detach()
                terms = clipped * keep * batch.advantage_N * logprob
            else:
                clipped = torch.clamp(ratio, settings.clip_low, settings.clip_high)
                terms = torch.minimum(ratio * batch.advantage_N, clipped * batch.advantage_N)
        if settings.name != "reinforce" and settings.rollout_correction != "none":
            assert batch.proximal_logprob_N is not None
            weight = torch.exp(batch.proximal_logprob_N - batch.rollout_logprob_N)
            if settings.rollout_correction == "truncated":
                terms = torch.minimum(weight, torch.tensor(2.0)) * terms
            else:
                terms = torch.where((weight >= 0.5) & (weight <= 3.0), weight * terms, torch.zeros_like(terms))
        if settings.kl_coefficient:
            assert batch.reference_logprob_N is not None
            k3 = (batch.reference_logprob_N - logprob).exp() - (batch.reference_logprob_N - logprob) - 1
            terms = terms - settings.kl_coefficient * k3
        return -(batch.weight_N * terms)[batch.loss_mask_N].sum()

    return loss


@pytest.mark.parametrize("settings", EVERY_OBJECTIVE, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_and_value_are_those_of_the_papers_loss(settings: dict[str, object], seed: int) -> None:
    batch = token_batch(seed)
    assert batch.logprob_N is not None
    logprob = batch.logprob_N.clone().requires_grad_()
    loss = paper_loss(ADAPTER.validate_python(settings), batch)(logprob)
    (gradient,) = torch.autograd.grad(loss, logprob)
    got = coefficients(settings, batch)
    torch.testing.assert_close(-got.coefficient_N, gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.loss_N.sum(), loss.detach(), rtol=1e-12, atol=1e-12)
    assert float(got.sums["loss"]) == pytest.approx(float(loss.detach()))


@pytest.mark.parametrize("seed", range(3))
def test_masked_and_unclipped_cispo_is_the_clipped_surrogate(seed: int) -> None:
    batch = token_batch(seed, count=10_000)
    torch.testing.assert_close(
        coefficients(MASKED_CISPO, batch).coefficient_N,
        coefficients({"name": "grpo"}, batch).coefficient_N,
        rtol=0,
        atol=0,
    )


def test_masked_and_clipped_cispo_differs_where_the_surrogate_is_unbounded() -> None:
    batch = token_batch(0, count=10_000)
    both = coefficients({**MASKED_CISPO, "ratio_max": 1.2, "ratio_min": 0.8}, batch).coefficient_N
    surrogate = coefficients({"name": "grpo"}, batch)
    assert batch.logprob_N is not None
    ratio, advantage = (batch.logprob_N - batch.rollout_logprob_N).exp(), batch.advantage_N
    apart = ((advantage < 0) & (ratio > 1.2)) | ((advantage > 0) & (ratio < 0.8))
    assert torch.equal(both != surrogate.coefficient_N, apart & batch.loss_mask_N)


@pytest.mark.parametrize("settings", [s for s in EVERY_OBJECTIVE if "kl_coefficient" not in s], ids=str)
def test_the_first_update_on_a_batch_is_reinforce(settings: dict[str, object]) -> None:
    batch = token_batch(0, spread=0.0)
    got = coefficients(settings, batch)
    assert torch.equal(got.coefficient_N, coefficients({"name": "reinforce"}, batch).coefficient_N)
    assert [float(got.sums[name]) for name in ("clipped_high", "clipped_low", "masked")] == [0, 0, 0]
    assert float(got.maxima["ratio"]) == 1.0


@hypothesis.settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 30.0), st.floats(1.0, 10.0))
def test_cispo_never_drops_a_token_and_never_exceeds_its_cap(seed: int, spread: float, cap: float) -> None:
    batch = token_batch(seed, count=50, spread=spread)
    got = coefficients({"name": "cispo", "ratio_max": cap}, batch)
    matters = (batch.advantage_N != 0) & batch.loss_mask_N
    assert bool((got.coefficient_N[matters] != 0).all())
    bound = cap * batch.weight_N * batch.advantage_N.abs() * (1 + 1e-12)
    assert bool((got.coefficient_N.abs() <= bound).all())
    assert float(got.sums["masked"]) == 0


def test_a_huge_ratio_stays_finite_under_the_cap() -> None:
    batch = token_batch(0, count=4, spread=0.0)
    assert batch.logprob_N is not None
    far = TokenBatch(**{**{n: getattr(batch, n) for n in batch.__slots__}, "rollout_logprob_N": batch.logprob_N - 1e4})
    assert bool(coefficients({"name": "cispo"}, far).coefficient_N.isfinite().all())


def test_dapo_keeps_what_grpo_clips_between_their_upper_bounds() -> None:
    batch = token_batch(0, count=10_000)
    grpo, dapo = coefficients({"name": "grpo"}, batch), coefficients({"name": "dapo"}, batch)
    assert batch.logprob_N is not None
    ratio = (batch.logprob_N - batch.rollout_logprob_N).exp()
    between = (batch.advantage_N > 0) & (ratio > 1.2) & (ratio <= 1.28) & batch.loss_mask_N
    assert torch.equal(grpo.coefficient_N != dapo.coefficient_N, between)


def test_what_is_counted() -> None:
    ratio = torch.tensor([0.1, 1.0, 3.0, 6.0, 6.0, 9.0], dtype=torch.float64)
    count = len(ratio)
    batch = TokenBatch(
        logprob_N=ratio.log() - 4,
        rollout_logprob_N=torch.full((count,), -4.0, dtype=torch.float64),
        advantage_N=torch.tensor([-1.0, 1, 1, 1, -1, 1], dtype=torch.float64),
        loss_mask_N=torch.tensor([True] * 5 + [False]),
        weight_N=torch.ones(count),
        sequence_N=torch.zeros(count, dtype=torch.int64),
        group_N=torch.zeros(count, dtype=torch.int64),
        policy_version_N=torch.zeros(count, dtype=torch.int64),
    )
    got = coefficients({"name": "cispo", "mask_ratio_low": 0.5, "mask_ratio_high": 5.0}, batch)
    sums = {name: float(value) for name, value in got.sums.items()}
    assert (sums["tokens"], sums["clipped_high"], sums["clipped_low"], sums["masked"]) == (5, 2, 0, 2)
    assert sums["ratio"] == pytest.approx(16.1)
    assert float(got.maxima["ratio"]) == pytest.approx(6.0)
    assert got.coefficient_N.tolist() == pytest.approx([0, 1, 3, 0, -5, 0])
    clipped = coefficients({"name": "grpo"}, batch)
    assert (float(clipped.sums["clipped_high"]), float(clipped.sums["clipped_low"])) == (2, 1)


def test_what_a_correction_counts() -> None:
    weight = torch.tensor([0.3, 0.6, 1.0, 4.0, 6.0, 9.0], dtype=torch.float64)
    count = len(weight)
    batch = TokenBatch(
        logprob_N=torch.full((count,), -2.0, dtype=torch.float64),
        rollout_logprob_N=-2.0 - weight.log(),
        proximal_logprob_N=torch.full((count,), -2.0, dtype=torch.float64),
        advantage_N=torch.ones(count, dtype=torch.float64),
        loss_mask_N=torch.tensor([True] * 5 + [False]),
        weight_N=torch.ones(count),
        sequence_N=torch.zeros(count, dtype=torch.int64),
        group_N=torch.zeros(count, dtype=torch.int64),
        policy_version_N=torch.zeros(count, dtype=torch.int64),
    )
    corrected = {"name": "cispo", "anchor": "proximal"}
    capped = coefficients({**corrected, "rollout_correction": "truncated"}, batch)
    assert capped.coefficient_N.tolist() == pytest.approx([0.3, 0.6, 1, 2, 2, 0])
    masked = coefficients({**corrected, "rollout_correction": "masked"}, batch)
    assert masked.coefficient_N.tolist() == pytest.approx([0, 0.6, 1, 4, 0, 0])
    counted = ("correction", "correction_bounded", "masked")
    found = [[float(got.sums[name]) for name in counted] for got in (capped, masked)]
    assert found == [pytest.approx([5.9, 2, 0]), pytest.approx([5.6, 2, 2])]
    assert "correction" not in coefficients(corrected, batch).sums


def test_kl_to_the_reference_is_k3_and_pulls_towards_it() -> None:
    batch = token_batch(0)
    with_kl = coefficients({"name": "reinforce", "kl_coefficient": 0.5}, batch)
    without = coefficients({"name": "reinforce"}, batch)
    assert batch.logprob_N is not None and batch.reference_logprob_N is not None
    pull = (with_kl.coefficient_N - without.coefficient_N)[batch.loss_mask_N]
    assert torch.equal(pull.sign(), (batch.reference_logprob_N - batch.logprob_N)[batch.loss_mask_N].sign())
    assert float(with_kl.sums["kl_reference"]) > 0


@hypothesis.settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 400), max_size=6), st.sampled_from(EVERY_OBJECTIVE))
def test_any_split_gives_the_same_coefficients_and_sums(
    seed: int, cuts: list[int], settings: dict[str, object]
) -> None:
    batch = token_batch(seed)
    whole = coefficients(settings, batch)
    edges = [0, *sorted(cuts), 400]
    parts = [coefficients(settings, batch.rows(slice(a, b))) for a, b in pairwise(edges) if a < b]
    assert torch.equal(torch.cat([part.coefficient_N for part in parts]), whole.coefficient_N)
    for name, value in whole.sums.items():
        assert sum(float(part.sums[name]) for part in parts) == pytest.approx(float(value), rel=1e-12, abs=1e-12)
    assert max(float(part.maxima["ratio"]) for part in parts) == float(whole.maxima["ratio"])


@pytest.mark.parametrize(
    ("settings", "absent", "name"),
    [
        ({"name": "cispo", "anchor": "proximal"}, "proximal_logprob_N", "proximal"),
        ({"name": "grpo", "kl_coefficient": 0.1}, "reference_logprob_N", "reference"),
        ({"name": "dapo"}, "logprob_N", "current"),
    ],
)
def test_a_missing_logprob_is_named(settings: dict[str, object], absent: str, name: str) -> None:
    batch = token_batch(0)
    without = TokenBatch(**{**{n: getattr(batch, n) for n in batch.__slots__}, absent: None})
    with pytest.raises(ValueError, match=f"no {name} logprobs"):
        coefficients(settings, without)
