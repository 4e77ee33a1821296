"""What an evaluation says of itself, also when rewards failed: a measurement that is missing ends no run."""

import json
from pathlib import Path

import pytest
import yaml

from cispo.errors import RecipeError
from cispo.evaluation import Evaluation, describe_gain, load_heldout
from cispo.metric_table import check_names
from cispo.recipe.load import load_train, read_recipe
from cispo.recipe.schema import TrainRecipe
from cispo.recipe.show import annotated_yaml, train_plan
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


def test_a_further_set_is_measured_under_its_own_name() -> None:
    before = Evaluation((outcome([False]), outcome([True])), name="human_eval")
    after = Evaluation((outcome([True]), outcome([True])), name="human_eval", parts=("a", "b"))
    metrics = after.metrics()
    assert (metrics["eval/human_eval/pass@1"], metrics["eval/human_eval.a/pass@1"]) == (1.0, 1.0)
    check_names(metrics)
    first, second, gain = describe_gain(before, after)
    assert first.startswith("held-out human_eval before: pass@1 0.500")
    assert second.startswith("held-out human_eval after:  pass@1 1.000")
    assert gain.startswith("gain +0.500 [")


FURTHER = "evaluation.also.human_eval.data.path=bundled:code/train.jsonl"


def test_further_sets_have_settings_of_their_own() -> None:
    overrides = [FURTHER, "evaluation.also.human_eval.temperature=0.2", "checkpoint.keep_best=eval/human_eval/pass@1"]
    evaluation = read_recipe("code", overrides, TrainRecipe).recipe.evaluation
    assert evaluation is not None
    assert list(evaluation.sets) == ["heldout", "human_eval"] and evaluation.sets["heldout"] is evaluation
    assert (evaluation.temperature, evaluation.sets["human_eval"].temperature) == (1.0, 0.2)
    assert (evaluation.completions_per_prompt, evaluation.sets["human_eval"].completions_per_prompt) == (2, 1)


def test_a_further_set_is_loaded_and_looked_at_as_the_first_is(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "Write f.", "entry_point": "f", "tests": []}, {"id": "b", "prompt": "Write g."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = read_recipe("code", [f"evaluation.also.mine.data.path={tmp_path}/rows.jsonl"], TrainRecipe).recipe
    first, mine = load_heldout(recipe.evaluation, base_path=tmp_path)
    assert (first.name, mine.name) == ("heldout", "mine") and len(first.prompts) > 2
    assert [prompt.id for prompt in mine.prompts] == ["a", "b"]
    assert load_heldout(None, base_path=tmp_path) == []
    for override, message in (
        ("evaluation.also.mine.data.path=gone.jsonl", "command line evaluation.also.mine.data.path: "),
        ("evaluation.also.mine.by=kind", "rows.jsonl: no column 'kind'"),
        ("evaluation.also.mine.data.columns={hidden: tests}", "also.mine.data.path: no column of a known set of code"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_train("code", [f"evaluation.also.mine.data.path={tmp_path}/rows.jsonl", override])
        assert message in str(caught.value)


def test_the_dry_run_shows_further_sets() -> None:
    loaded = load_train("code", [FURTHER])
    text = annotated_yaml(loaded)
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    at = lines.index("also:")
    assert lines[at + 1 : at + 4] == ["human_eval:", "data:", "path: bundled:code/train.jsonl"]
    assert TrainRecipe.model_validate(yaml.safe_load(text)) == loaded.recipe
    assert "heldout and human_eval: before the first step and after the last one" in train_plan(loaded.recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.also.a/b.data.path=x", "evaluation.also: the name 'a/b' cannot stand in a metric"),
        ("evaluation.also.heldout.data.path=x", "evaluation.also: the name 'heldout' cannot stand in a metric"),
        ("evaluation.also.x.data.pth=x", "evaluation.also.x.data.pth: no such setting; did you mean 'path'?"),
        ("evaluation.also.x.temperature=1", "evaluation.also.x.data: is not set and has no default"),
        ("evaluation.also={x: {data: {path: x}, completions_per_prompt: 500}}", "completions_per_prompt: is 500"),
        ("evaluation.also={x: {data: {path: x}, pass_at: [2]}}", "pass_at: has 2 with completions_per_prompt 1"),
        ("checkpoint.keep_best=eval/x/pass@1", "keep_best: is eval/x/pass@1 but no set that is measured has that name"),
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
