"""A window opens when perplexity has converged and completions are near it: both, and then anew for the next."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cispo.errors import CheckpointError, RecipeError
from cispo.length_windows import LengthWindows
from cispo.recipe import load_train_recipe
from cispo.recipe.rollout_schema import LengthWindowSettings, RolloutSettings
from cispo.recipe.show import train_plan
from cispo.types import Prompt, Rollout, Score, ScoredGroup, StopReason, Turn

SETTINGS = LengthWindowSettings(tokens=(40, 60), steps=4, perplexity_change=0.05, near=0.9)


def groups(lengths: Sequence[int], perplexity: float = 3.0) -> list[ScoredGroup]:
    """One group of completions of these lengths, whose last token was put in and has no logprob."""
    rollouts = []
    for index, length in enumerate(lengths):
        logprobs = np.full(length, -np.log(perplexity), np.float32)
        mask = np.ones(length, np.bool_)
        logprobs[-1], mask[-1] = 0.0, False
        turn = Turn(np.ones(length, np.int32), mask, logprobs, np.zeros(length, np.int32))
        rollouts.append(Rollout("p", index, np.ones(1, np.int32), (turn,), StopReason.LENGTH, ""))
    return [ScoredGroup(Prompt("p", ""), tuple(rollouts), tuple(Score(0.0) for _ in rollouts))]


def test_both_gates_open_a_window_and_are_asked_anew() -> None:
    windows = LengthWindows(SETTINGS, 80)
    near = [*[10] * 60, *[38] * 40]
    for _ in range(3):
        windows.record(groups(near), windows.tokens)
        assert windows.tokens == 40, "four steps are looked at"
    found = windows.record(groups(near), windows.tokens)
    assert found == {
        "completion/window_tokens": 40.0,
        "completion/perplexity": pytest.approx(3.0),
        "completion/length_tokens/p99": 38.0,
    }
    for _ in range(8):
        windows.record(groups([53] * 10), windows.tokens)
    assert windows.tokens == 60, "53 of 60 tokens are not near"
    windows.record(groups([60] * 10), windows.tokens)
    assert windows.tokens == 80
    for _ in range(8):
        windows.record(groups([80] * 10), windows.tokens)
    assert windows.tokens == 80, "the last"


def test_few_long_completions_and_a_perplexity_that_moves_open_nothing() -> None:
    windows = LengthWindows(SETTINGS, 80)
    for _ in range(8):
        windows.record(groups([*[10] * 199, 40]), windows.tokens)
    assert windows.tokens == 40, "one completion in two hundred"
    windows = LengthWindows(SETTINGS, 80)
    for step in range(8):
        windows.record(groups([40] * 4, perplexity=3.0 * 0.9**step), windows.tokens)
    assert windows.tokens == 40, "it falls by a tenth a step"
    for _ in range(4):
        windows.record(groups([40] * 4, perplexity=1.4), windows.tokens)
    assert windows.tokens == 60


def test_a_step_of_an_earlier_window_says_so_and_feeds_no_gate() -> None:
    windows = LengthWindows(SETTINGS, 80)
    for _ in range(4):
        windows.record(groups([40] * 4), 40)
    assert windows.tokens == 60
    for _ in range(8):
        # As long as the new window asks for, so that its gates would open if they were asked.
        late = windows.record(groups([60] * 4, perplexity=5.0), 40)
    assert late["completion/window_tokens"] == 40.0
    assert late["completion/perplexity"] == pytest.approx(5.0)
    assert windows.state_dict() == {"window_tokens": 60, "perplexities": []}
    for step in range(4):
        assert windows.tokens == 60, f"after {step} steps of the new window"
        windows.record(groups([60] * 4), 60)
        windows.record(groups([10] * 4, perplexity=50.0), 40)
    assert windows.tokens == 80


def test_a_step_without_groups_changes_nothing() -> None:
    windows = LengthWindows(SETTINGS, 80)
    assert windows.record([], windows.tokens) == {}
    assert windows.state_dict() == {"window_tokens": 40, "perplexities": []}


def test_a_restored_one_goes_on_alike() -> None:
    left, restored = LengthWindows(SETTINGS, 80), LengthWindows(SETTINGS, 80)
    for _ in range(6):
        left.record(groups([40] * 4), left.tokens)
    restored.load_state_dict(json.loads(json.dumps(left.state_dict())))
    for _ in range(4):
        assert left.record(groups([60] * 4), left.tokens) == restored.record(groups([60] * 4), restored.tokens)
    assert restored.tokens == 80
    restored.load_state_dict({})
    assert restored.tokens == 40
    with pytest.raises(CheckpointError, match="window of 80 tokens, the recipe has 40, 60, 90"):
        LengthWindows(SETTINGS, 90).load_state_dict(left.state_dict())


@pytest.mark.parametrize(
    ("rollout", "reason"),
    [
        ({"length_windows": {"tokens": [40, 40]}}, "larger than the one before"),
        ({"length_windows": {"tokens": [80]}}, "larger than the one before"),
        ({"length_windows": {"tokens": []}}, "at least 1"),
        ({"length_windows": {"tokens": [40], "near": 1.5}}, "near"),
        ({"length_windows": {"tokens": [40]}, "thinking": {"tokens": 50}}, r"length_windows\.tokens\.0 40"),
    ],
)
def test_windows_that_make_no_sense_are_refused(rollout: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        RolloutSettings.model_validate({"prompts_per_step": 1, "max_completion_tokens": 80, **rollout})


def test_the_plan_names_the_windows_and_lengths_beyond_the_policys_are_refused(
    tmp_path: Path, small_policy_folder: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "1 + 1"}\n')
    settings = {
        "name": "toy",
        "steps": 1,
        "policy": {"path": str(small_policy_folder)},
        "data": {"path": "prompts.jsonl"},
        "rollout": {"prompts_per_step": 1, "max_completion_tokens": 64, "length_windows": {"tokens": [16, 32]}},
        "rewards": [{"name": "length", "args": {"cache_tokens": 10}}],
        "learner": {"learning_rate": 1e-3},
    }
    (tmp_path / "toy.yaml").write_text(json.dumps(settings))
    assert "of each at most 16, 32 and then 64" in train_plan(load_train_recipe(tmp_path / "toy.yaml"))
    with pytest.raises(RecipeError, match=r"max_completion_tokens: is 4096 with .* was made for 4096 positions"):
        load_train_recipe(tmp_path / "toy.yaml", ["rollout.max_completion_tokens=4096"])
