"""The run folder: a name is taken once, a kill loses no finished step, and a resumed run is the same run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cispo.durable_files import write_atomically
from cispo.errors import RunFolderError
from cispo.run_folder import RunFolder, resolved_yaml
from cispo.types import Group, Prompt, Rollout, Score, ScoredGroup, ScoreStatus, StopReason, Turn


class Learner(BaseModel):
    learning_rate: float = 1e-6
    max_grad_norm: float = float("inf")
    schedule: str = "constant"


class Recipe(BaseModel):
    name: str = "toy"
    steps: int = 3
    learner: Learner = Learner()
    logging: dict[str, str] = {}
    base_path: Path = Path("/somewhere")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs" / "toy", Recipe())


def scored_group() -> ScoredGroup:
    turn = Turn(
        np.array([5, 6, 7], np.int32),
        np.array([True, False, True]),
        np.array([-0.5, 0.0, -0.25], np.float32),
        np.array([3, 0, 4], np.int32),
    )
    rollout = Rollout("p1", 0, np.array([1], np.int32), (turn,), StopReason.LENGTH, "naïve\ntext")
    score = Score(0.5, parts={"code": 0.5}, info={"tests": np.int64(4), "status": ScoreStatus.OK})
    group = Group(Prompt("p1", "question"), (rollout,))
    return ScoredGroup(group.prompt, group.rollouts, (score,))


def test_folder_holds_the_resolved_recipe(folder: RunFolder) -> None:
    stored = yaml.safe_load((folder.path / "recipe.yaml").read_text())
    assert stored["learner"] == {"learning_rate": 1e-6, "max_grad_norm": float("inf"), "schedule": "constant"}
    assert stored["base_path"] == "/somewhere"


def test_name_that_exists_is_refused_with_the_remedies(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=r"exists already; choose another name with --name, or .* --resume"):
        RunFolder.create(folder.path, Recipe())
    assert [path.name for path in folder.path.parent.iterdir()] == ["toy"], "the refused attempt left nothing behind"


def test_of_many_creators_one_gets_the_name(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from pydantic import BaseModel
        from cispo.errors import RunFolderError
        from cispo.run_folder import RunFolder
        class Recipe(BaseModel): steps: int = 1
        print("ready", flush=True); sys.stdin.readline()
        try: RunFolder.create(Path(sys.argv[1]), Recipe()); print("mine")
        except RunFolderError: print("taken")
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    answers = sorted(process.communicate()[0].strip() for process in processes)
    assert answers == ["mine", "taken", "taken"]


def test_metrics_are_one_strict_json_object_a_step(folder: RunFolder) -> None:
    folder.append_metrics(0, {"reward/mean": np.float32(0.25), "loss/ratio/max": float("inf"), "x": float("nan")})
    folder.append_metrics(1, {"reward/mean": 1e-7, "group/count": 8})
    first, second = folder.metrics_path.read_text().splitlines()
    assert first == '{"step": 0, "reward/mean": 0.25, "loss/ratio/max": null, "x": null}'
    assert second == '{"step": 1, "reward/mean": 1e-07, "group/count": 8}'
    assert folder.last_step() == 1


def test_steps_must_ascend(folder: RunFolder) -> None:
    folder.append_metrics(4, {})
    with pytest.raises(ValueError, match="metrics of step 4 after those of step 4"):
        folder.append_metrics(4, {})


def test_last_step_is_found_beyond_one_block(folder: RunFolder) -> None:
    for step in range(3):
        folder.append_metrics(step, {f"name_{i}": 1.5 for i in range(5000)})
    assert folder.last_step() == 2


def test_rollouts_are_written_a_line_each_and_replaced(folder: RunFolder) -> None:
    for _ in range(2):
        folder.write_rollouts(42, [scored_group()])
    path = folder.path / "rollouts" / "step_000042.jsonl"
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert record["completion"] == "naïve\ntext"
    assert record["policy_version"] == {"min": 3, "max": 4}, "tokens that were not sampled have no version"
    assert record["info"] == {"tests": 4, "status": "ok"}
    assert (record["stop_reason"], record["status"], record["reward"]) == ("length", "ok", 0.5)


def test_truncate_after_forgets_later_steps(folder: RunFolder) -> None:
    for step in range(4):
        folder.append_metrics(step, {"value": step / 3})
        folder.write_rollouts(step, [scored_group()])
    before = folder.metrics_path.read_text().splitlines()
    folder.truncate_after(1)
    assert folder.metrics_path.read_text().splitlines() == before[:2]
    left = sorted(path.name for path in (folder.path / "rollouts").iterdir())
    assert left == ["step_000000.jsonl", "step_000001.jsonl"]
    folder.append_metrics(2, {})


def test_checkpoint_steps_are_listed_in_order(folder: RunFolder) -> None:
    for step in (40, 5, 100):
        folder.checkpoint_path(step).mkdir()
    (folder.path / "checkpoints" / ".step_000101.tmp").mkdir()
    assert folder.checkpoint_steps() == [5, 40, 100]


@settings(max_examples=40, deadline=None)
@given(kept=st.integers(0, 4), cut=st.integers(1, 60))
def test_torn_last_line_is_dropped_on_resume(tmp_path_factory: pytest.TempPathFactory, kept: int, cut: int) -> None:
    folder = RunFolder.create(tmp_path_factory.mktemp("run") / "toy", Recipe())
    for step in range(kept):
        folder.append_metrics(step, {"reward/mean": step / 7})
    whole = folder.metrics_path.read_bytes()
    torn = b'{"step": 99, "reward/mean": 0.123456789, "reward/std": 0.987654321}'[:cut]
    folder.metrics_path.write_bytes(whole + torn)
    folder.close()
    resumed = RunFolder.open_for_resume(folder.path, Recipe())
    assert folder.metrics_path.read_bytes() == whole
    resumed.append_metrics(kept, {})
    assert resumed.last_step() == kept
    resumed.close()


def test_kill_at_any_moment_leaves_whole_steps(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_run_folder import Recipe, RunFolder, scored_group
        folder = RunFolder.create(Path(sys.argv[1]), Recipe())
        print("ready", flush=True)
        step = 0
        while True:
            folder.write_rollouts(step, [scored_group()] * 20)
            folder.append_metrics(step, {f"name_{i}": step + i / 7 for i in range(50)})
            step += 1
    """)
    command = [sys.executable, "-c", program, str(tmp_path / "run"), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.15)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    folder = RunFolder.open_for_resume(tmp_path / "run", Recipe())
    lines = folder.read_metrics()
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert all(len(line) == 51 for line in lines)
    for path in (folder.path / "rollouts").glob("step_*.jsonl"):
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == 20


def test_resume_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"there is no run to resume at .*; start it without --resume"):
        RunFolder.open_for_resume(tmp_path / "toy", Recipe())


def test_resume_refuses_another_recipe_and_names_the_settings(folder: RunFolder) -> None:
    folder.close()
    other = Recipe(name="other", learner=Learner(learning_rate=2e-6))
    with pytest.raises(RunFolderError) as caught:
        RunFolder.open_for_resume(folder.path, other)
    assert "name (was toy, now other); learner.learning_rate (was 1e-06, now 2e-06)" in str(caught.value)
    RunFolder.open_for_resume(folder.path, Recipe()).close()


def test_resume_accepts_what_changes_no_result(folder: RunFolder) -> None:
    folder.close()
    longer = Recipe(steps=30, logging={"wandb": "offline"}, base_path=Path("/moved"))
    RunFolder.open_for_resume(folder.path, longer).close()
    assert (folder.path / "recipe.yaml").read_text() == resolved_yaml(longer)


def test_two_processes_never_write_one_run(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="another process is writing the run"):
        RunFolder.open_for_resume(folder.path, Recipe())
    folder.close()
    RunFolder.open_for_resume(folder.path, Recipe()).close()


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def failing() -> Iterator[str]:
        yield "new"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, failing())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_resuming_removes_the_drafts_that_a_kill_left(folder: RunFolder) -> None:
    """Killed while it writes a file, a process leaves its hidden draft."""
    code = f"""
        import os, signal
        from pathlib import Path
        from cispo.durable_files import write_atomically
        def lines():
            yield "half"
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(Path({str(folder.path)!r}) / %s, lines())
    """
    for target in ('"metrics.jsonl"', '"rollouts/step_000002.jsonl"'):
        subprocess.run([sys.executable, "-c", textwrap.dedent(code % target)], check=False)
    before = sorted(folder.path.rglob("*"))
    folder.truncate_after(1)
    assert len(before) - len(sorted(folder.path.rglob("*"))) == 2
    assert list((folder.path / "rollouts").iterdir()) == []
    assert (folder.path / "recipe.yaml").exists()
    assert (folder.path / ".lock").exists()


def test_length_may_not_change_where_the_learning_rate_depends_on_it(tmp_path: Path) -> None:
    falling = Learner(schedule="cosine")
    RunFolder.create(tmp_path / "toy", Recipe(learner=falling)).close()
    with pytest.raises(RunFolderError, match="steps"):
        RunFolder.open_for_resume(tmp_path / "toy", Recipe(learner=falling, steps=30))
    RunFolder.open_for_resume(tmp_path / "toy", Recipe(learner=falling)).close()
