"""What a run that samples ahead keeps of its steps: the same groups come back; a torn or later line is forgotten."""

from pathlib import Path

import numpy as np
import pytest

from cispo.errors import RunFolderError
from cispo.recipe.schema import LoggingSettings
from cispo.run_folder import SCHEDULE, RunFolder
from cispo.schedule import read_batch, read_schedule, write_schedule
from cispo.types import Prompt, Rollout, Score, ScoredGroup, ScoreStatus, StopReason, Turn


def turn(ids: list[int], versions: list[int], *, is_sampled: bool = True, experts: bool = False) -> Turn:
    count = len(ids)
    return Turn(
        np.array(ids, np.int32),
        np.full(count, is_sampled),
        np.linspace(-1.0, -0.1, count, dtype=np.float32) * is_sampled,
        np.array(versions, np.int32) * is_sampled,
        np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2) if experts else None,
    )


def group(name: str, *, experts: bool = False) -> ScoredGroup:
    prompt = np.array([1, 2, 3], np.int32)
    prompt_experts = np.zeros((2, 2, 2), np.uint8) if experts else None
    turns = (
        turn([7, 8], [3, 4], experts=experts),
        turn([9], [0], is_sampled=False, experts=experts),
        turn([5], [4], experts=experts),
    )
    rollouts = (
        Rollout(name, 0, prompt, turns, StopReason.EOS, "text", prompt_experts),
        Rollout(name, 1, prompt, turns[:1], StopReason.LENGTH, "other", prompt_experts),
    )
    scores = (Score(1.0, parts={"correct": 1.0}), Score(0.0, ScoreStatus.ERROR, message="gone"))
    return ScoredGroup(Prompt(name, "question"), rollouts, scores)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", LoggingSettings())


@pytest.mark.parametrize("experts", [False, True])
def test_what_the_learner_trained_on_comes_back(folder: RunFolder, experts: bool) -> None:
    groups = [group("a", experts=experts), group("b", experts=experts)]
    write_schedule(folder, 5, groups, "cafe")
    for before, after in zip(groups, read_batch(folder.batch_path(5)), strict=True):
        assert after.prompt.id == before.prompt.id
        assert [(score.value, score.status) for score in after.scores] == [(1.0, "ok"), (0.0, "error")]
        for old, new in zip(before.rollouts, after.rollouts, strict=True):
            assert (new.stop_reason, new.completion_index) == (old.stop_reason, old.completion_index)
            for field in ("prompt_token_ids_T", "completion_token_ids_T", "loss_mask_T", "logprobs_T"):
                np.testing.assert_array_equal(getattr(new, field), getattr(old, field), strict=True)
            np.testing.assert_array_equal(new.policy_versions_T, old.policy_versions_T, strict=True)
            assert (new.expert_ids_TLK is None) is (not experts)
            if experts:
                np.testing.assert_array_equal(new.expert_ids_TLK, old.expert_ids_TLK, strict=True)
    (record,) = read_schedule(folder.path).values()
    assert (record.step, record.prompts, record.versions, record.weights) == (5, ("a", "b"), ((3, 4), (3, 4)), "cafe")


def test_a_resumed_run_forgets_a_torn_line_and_later_steps(folder: RunFolder) -> None:
    for step in (1, 2, 3):
        write_schedule(folder, step, [group("a")], f"hash{step}")
    with (folder.path / SCHEDULE).open("a", encoding="utf-8") as lines:
        lines.write('{"step": 4, "pro')
    folder.close()
    resumed = RunFolder.open_for_resume(folder.path, LoggingSettings())
    resumed.truncate_after(2)
    write_schedule(resumed, 3, [group("b")], "again")
    records = read_schedule(resumed.path)
    assert {step: record.weights for step, record in records.items()} == {1: "hash1", 2: "hash2", 3: "again"}
    assert [one.prompt.id for one in read_batch(resumed.batch_path(3))] == ["b"]
    resumed.truncate_after(1)
    assert [path.name for path in resumed.batch_path(1).parent.iterdir()] == ["step_000001.npz"]


def test_a_run_that_kept_nothing_says_which_do(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=r"only runs with rollout\.max_off_policy_steps above 0 keep"):
        read_schedule(folder.path)
    with pytest.raises(RunFolderError, match=r"step_000007\.npz is not there"):
        read_batch(folder.batch_path(7))
