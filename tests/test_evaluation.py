"""What an evaluation says of itself, also when rewards failed: a measurement that is missing ends no run."""

import pytest

from cispo.errors import RecipeError
from cispo.evaluation import Evaluation, describe_gain
from cispo.metric_table import check_names
from cispo.recipe.load import read_recipe
from cispo.recipe.schema import TrainRecipe
from cispo.statistics import PromptOutcome


def outcome(correct: list[bool], well_formed: list[bool] | None = None, errors: int = 0) -> PromptOutcome:
    return PromptOutcome(
        correct=tuple(correct),
        well_formed=tuple([True] * len(correct) if well_formed is None else well_formed),
        rewards=tuple(map(float, correct)),
        lengths_tokens=tuple(5 for _ in correct),
        errors=errors,
    )


ALL_FAILED = Evaluation((outcome([], errors=2), outcome([], errors=2)))


def test_the_gain_is_split_into_form_and_correctness_without_rest() -> None:
    before = Evaluation((outcome([True, False], [True, False]), outcome([False, False], [True, True])))
    after = Evaluation((outcome([True, True]), outcome([True, False])))
    assert before.pass_at_1.value == 0.25
    assert (before.well_formed, before.correct_given_form) == (0.75, 1 / 3)
    *_, last = describe_gain(before, after)
    # 0.25 * (3/4 + 1/3) / 2 by form, (3/4 - 1/3) * (1 + 3/4) / 2 by correctness.
    assert last.startswith("gain +0.500 [")
    assert last.endswith("+0.135 by form, +0.365 by correctness")


def test_an_evaluation_of_which_nothing_could_be_scored_says_so() -> None:
    assert str(ALL_FAILED) == "pass@1 unknown: the reward failed on all 4 completions of 2 prompts"
    assert ALL_FAILED.metrics() == {"eval/heldout/frac_error": 1.0}
    assert (ALL_FAILED.well_formed, ALL_FAILED.correct_given_form) == (0.0, 0.0)


def test_failed_rewards_are_told_beside_the_rest() -> None:
    text = str(Evaluation((outcome([True], errors=1), outcome([False, True]))))
    assert "2 prompts, 3 completions; the reward of 1 more failed)" in text


def test_a_gain_over_too_few_prompts_is_unknown_instead_of_an_error() -> None:
    good = Evaluation((outcome([True]), outcome([False])))
    for pair in ((ALL_FAILED, good), (good, ALL_FAILED), (Evaluation((outcome([True]),)),) * 2):
        *shown, last = describe_gain(*pair)
        assert last == "gain unknown: it takes at least 2 prompts that were scored both before and after"
        assert len(shown) == 2


def test_parts_are_measured_beside_the_whole() -> None:
    outcomes = (outcome([True]), outcome([False]), outcome([True]), outcome([False]))
    metrics = Evaluation(outcomes, parts=("sums", "two terms", "sums", "two terms")).metrics()
    assert metrics["eval/heldout/pass@1"] == 0.5
    assert metrics["eval/heldout.sums/pass@1"] == 1.0
    assert metrics["eval/heldout.two_terms/pass@1"] == 0.0
    check_names(metrics)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.pass_at=[4]", "pass_at: has 4 with completions_per_prompt 2"),
        ("evaluation.pass_at=[0]", "pass_at: has 0 with"),
        ("checkpoint.keep_best=pass", "checkpoint.keep_best: there is no metric 'pass'"),
    ],
)
def test_settings_that_measure_nothing(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe("code", [override], TrainRecipe)
    assert message in str(caught.value)


def test_the_best_needs_an_evaluation() -> None:
    overrides = ["checkpoint.keep_best=eval/heldout/pass@1", "evaluation.pass_at=[2]"]
    assert read_recipe("code", overrides, TrainRecipe).recipe.checkpoint.keep_best == "eval/heldout/pass@1"
    with pytest.raises(RecipeError, match=r"checkpoint\.keep_best: is eval/heldout/pass@1 but evaluation is null"):
        read_recipe("code", [*overrides[:1], "evaluation=null"], TrainRecipe)
