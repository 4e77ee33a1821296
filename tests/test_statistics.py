import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.metric_table import check_names
from cispo.statistics import (
    PromptOutcome,
    evaluation_metrics,
    mean_pass_at_k,
    mean_reward,
    paired_gain,
    pass_at_1,
    pass_at_k,
    wilson_interval,
)

OUTCOMES = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=30)


def outcome(correct: str, errors: int = 0) -> PromptOutcome:
    """One letter a completion: R right, W well-formed and wrong, M malformed."""
    return PromptOutcome(
        correct=tuple(letter == "R" for letter in correct),
        well_formed=tuple(letter != "M" for letter in correct),
        rewards=tuple({"R": 1.0, "W": 0.25, "M": 0.0}[letter] for letter in correct),
        lengths_tokens=tuple(10 for _ in correct),
        errors=errors,
    )


def test_with_one_completion_a_prompt_the_interval_is_wilsons() -> None:
    estimate = pass_at_1([[True]] * 20 + [[False]] * 80)
    assert (estimate.low, estimate.high) == pytest.approx((0.1333669, 0.2888292), abs=1e-6)
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(0.2, 100), abs=1e-12)
    assert str(estimate) == "0.200 [0.133, 0.289]"


def test_copies_of_one_completion_bring_no_confidence_but_independent_ones_do() -> None:
    single = pass_at_1([[True]] * 30 + [[False]] * 70)
    copied = pass_at_1([[True] * 8] * 30 + [[False] * 8] * 70)
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high), abs=1e-12)
    mixed = pass_at_1([[True, True, True, False, False, False, False, False, False, False]] * 100)
    assert (mixed.low, mixed.high) == pytest.approx(wilson_interval(0.3, 1000), abs=1e-12)


@given(OUTCOMES)
def test_the_interval_holds_the_value_and_stays_in_bounds(correct: list[list[bool]]) -> None:
    estimate = pass_at_1(correct)
    assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
    assert estimate.high - estimate.low > 0.0


def test_prompts_weigh_the_same_however_many_completions_they_have() -> None:
    assert pass_at_1([[True], [False, False, False], []]).value == 0.5
    with pytest.raises(ValueError, match="at least one prompt"):
        pass_at_1([[]])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                share = sum(min(subset) < correct for subset in subsets) / len(subsets)
                assert pass_at_k(n, correct, k) == pytest.approx(share, abs=1e-12)
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 1, 5)


def test_a_paired_gain_is_narrower_than_the_two_intervals() -> None:
    before = [[i % 10 < 3] for i in range(200)]
    after = [[i % 10 < 6] for i in range(200)]
    gain = paired_gain(before, after)
    assert gain.value == pytest.approx(0.3)
    deviation = math.sqrt((60 * 0.7**2 + 140 * 0.3**2) / 199)
    assert gain.high - gain.value == pytest.approx(1.959964 * deviation / math.sqrt(200), abs=1e-6)
    with pytest.raises(ValueError, match="same prompts"):
        paired_gain(before, after[1:])


def test_evaluation_metrics_split_form_from_correctness() -> None:
    outcomes = [outcome("RW"), outcome("MM"), outcome("RR", errors=2), outcome("", errors=2)]
    metrics = evaluation_metrics("heldout", outcomes)
    check_names(metrics)
    assert metrics["eval/heldout/pass@1"] == pytest.approx(0.5)
    assert metrics["eval/heldout/pass@2"] == pytest.approx(2 / 3)
    assert metrics["eval/heldout/avg@2"] == pytest.approx((0.625 + 0.0 + 1.0) / 3)
    assert metrics["eval/heldout/well_formed"] == pytest.approx(4 / 6)
    assert metrics["eval/heldout/correct_given_form"] == pytest.approx(3 / 4)
    assert metrics["eval/heldout/frac_error"] == pytest.approx(0.4)
    assert metrics["eval/heldout/completion_length_tokens/mean"] == 10.0
    assert metrics["eval/heldout/pass@1/low"] < 0.5 < metrics["eval/heldout/pass@1/high"]


def test_an_evaluation_whose_rewards_all_failed_says_only_that() -> None:
    assert evaluation_metrics("heldout", [outcome("", errors=3)]) == {"eval/heldout/frac_error": 1.0}
    with pytest.raises(ValueError, match="no completions"):
        evaluation_metrics("heldout", [])
    assert "eval/x/correct_given_form" not in evaluation_metrics("x", [outcome("MM")])


def test_the_interval_holds_the_truth_about_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        chance_of_prompt = rng.beta(0.5, 1.0, size=50)
        right = rng.random((50, 4)) < chance_of_prompt[:, None]
        estimate = pass_at_1(right.tolist())
        held += estimate.low <= 1 / 3 <= estimate.high
    assert 0.92 <= held / 400 <= 0.99


@given(OUTCOMES)
def test_at_k_of_1_the_mean_pass_is_pass_at_1_and_it_rises_with_k(correct: list[list[bool]]) -> None:
    first, same = mean_pass_at_k(correct, 1), pass_at_1(correct)
    assert (first.value, first.low, first.high) == pytest.approx((same.value, same.low, same.high))
    least = min(map(len, correct))
    estimates = [mean_pass_at_k(correct, k) for k in range(1, least + 1)]
    assert all(0 <= e.low <= e.value <= e.high <= 1 and e.low < e.high for e in estimates)
    values = [estimate.value for estimate in estimates]
    assert values == pytest.approx(sorted(values))


def test_the_interval_of_pass_at_k_is_over_prompts() -> None:
    """Of the prompts 30 in 100 are solved within 4: Wilson's interval, whatever the completions."""
    estimate = mean_pass_at_k([[True] * 4] * 30 + [[False] * 4] * 70, 4)
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(0.3, 100), abs=1e-12)


def test_the_interval_of_the_mean_reward() -> None:
    estimate = mean_reward([[1.0, 0.0], [0.25, 0.25], [], [1.0, 1.0]])
    values = np.array([0.5, 0.25, 1.0])
    half = 1.959963984540054 * values.std(ddof=1) / math.sqrt(3)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half), abs=1e-12
    )
    assert mean_reward([[0.5]]) == mean_reward([[0.5, 0.5]])
    with pytest.raises(ValueError, match="evaluate at least one prompt"):
        mean_reward([[]])


def test_further_k_are_estimated_up_to_the_completions_there_are() -> None:
    metrics = evaluation_metrics("heldout", [outcome("RWWW"), outcome("RRWW")], pass_at=(2, 8))
    assert metrics["eval/heldout/pass@2"] == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert metrics["eval/heldout/pass@2/low"] < metrics["eval/heldout/pass@2"] < metrics["eval/heldout/pass@2/high"]
    assert metrics["eval/heldout/pass@4"] == 1.0 and "eval/heldout/pass@8" not in metrics
    assert metrics["eval/heldout/avg@4/low"] < metrics["eval/heldout/avg@4"] < metrics["eval/heldout/avg@4/high"]
    check_names(metrics)
