import numpy as np
import pytest

from cispo.group_metrics import add_groups
from cispo.metrics import StepMetrics
from cispo.types import Prompt, Rollout, Score, ScoredGroup, ScoreStatus, StopReason, Turn

FAILED = Score(0.0, status=ScoreStatus.ERROR, parts={"code": 9.0}, message="the sandbox is gone")


def rollout(index: int, length: int, stop_reason: StopReason) -> Rollout:
    ids = np.zeros(length, np.int32)
    turn = Turn(ids, np.ones(length, np.bool_), np.zeros(length, np.float32), ids)
    return Rollout("p", index, ids, (turn,), stop_reason, "text")


def group(*scores: Score, stop_reason: StopReason = StopReason.EOS) -> ScoredGroup:
    rollouts = tuple(rollout(i, length=10 * (i + 1), stop_reason=stop_reason) for i in range(len(scores)))
    return ScoredGroup(Prompt("p", "text"), rollouts, scores)


def test_rows_of_a_step() -> None:
    metrics = StepMetrics()
    solved = group(Score(1.0, parts={"code": 1.0}), Score(0.1 + 0.2 + 0.7, parts={"code": 1.0}))
    unsolved = group(Score(0.0), Score(0.0), stop_reason=StopReason.LENGTH)
    mixed = group(Score(1.0), FAILED, Score(0.5, parts={"code": 0.25}))
    add_groups(metrics, [solved, unsolved, mixed, group(FAILED)], full_reward=1.0)
    reduced = metrics.reduce()
    assert reduced == pytest.approx(
        {
            "reward/mean": 3.5 / 6,
            "reward/std": float(np.std([1, 1, 0, 0, 1, 0.5])),
            "reward/code/mean": 0.75,
            "reward/frac_error": 2 / 8,
            "group/frac_solved_all": 1 / 4,
            "group/frac_solved_none": 1 / 4,
            "group/frac_mixed": 1 / 4,
            "completion/length_tokens/mean": (30 + 30 + 60 + 10) / 8,
            "completion/length_tokens/max": 30.0,
            "completion/frac_truncated": 2 / 8,
            "completion/frac_interrupted": 0.0,
            **{f"stop/{reason}": 0.0 for reason in StopReason},
            "stop/eos": 6 / 8,
            "stop/length": 2 / 8,
        }
    )


def test_a_step_whose_rewards_all_failed_has_no_reward_but_says_so() -> None:
    metrics = StepMetrics()
    add_groups(metrics, [group(FAILED, FAILED)], full_reward=1.0)
    reduced = metrics.reduce()
    assert reduced["reward/frac_error"] == 1.0 and "reward/mean" not in reduced and "reward/std" not in reduced
    assert reduced["group/frac_solved_none"] == 0.0
