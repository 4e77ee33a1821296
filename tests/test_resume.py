"""The whole run from the command line: repeatable bit for bit, killed at any moment and resumed to equal numbers."""

import json
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.runs import SHORT_RUN, assert_same_run, finish, first_difference, kill_everything, start_training

STEPS = 4
ARGUMENTS = [*SHORT_RUN, "rollout.workers=1", "sandbox.workers=1"]


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    return start_training(folder, "code", [*ARGUMENTS, *options])


def kill_after(folder: Path, delay_s: float) -> None:
    """Start a run and kill all of it so long after its folder has appeared."""
    process = start(folder)
    while not (folder / "checkpoints").is_dir() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(delay_s)
    if process.poll() is None:
        kill_everything(process)


def steps_kept(folder: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*")), default=0)


def test_a_killed_and_resumed_run_equals_one_left_alone(run_left_alone: tuple[Path, float], tmp_path: Path) -> None:
    """The killed run is a second run with the same seed up to the kill, so this shows repeatability too."""
    alone, seconds = run_left_alone
    delay_s = random.uniform(0.3, 0.8) * seconds
    print(f"killed {delay_s:.2f} s after the run folder appeared")
    kill_after(tmp_path / "killed", delay_s)
    finish(start(tmp_path / "killed", "--resume"), tmp_path / "killed")
    assert_same_run(alone, tmp_path / "killed", f"killed {delay_s:.2f} s after the folder appeared")


@pytest.mark.slow
def test_twenty_kills_at_any_time(run_left_alone: tuple[Path, float], tmp_path: Path) -> None:
    alone, seconds = run_left_alone
    for attempt in range(20):
        delay_s = random.uniform(0.0, seconds)
        folder = tmp_path / f"killed_{attempt}"
        kill_after(folder, delay_s)
        metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
        kept = steps_kept(folder)
        print(f"kill {attempt}: {delay_s:.2f} s after the folder appeared, {metrics} lines, checkpoint of step {kept}")
        assert metrics - kept <= 1, "more than one generation batch would be done again"
        finish(start(folder, "--resume"), folder)
        assert_same_run(alone, folder, f"kill {attempt}, {delay_s:.2f} s after the folder appeared")


def test_a_difference_is_told_by_its_record(tmp_path: Path) -> None:
    for run, verdict in (("alone", "ok"), ("resumed", "sandbox_error")):
        (tmp_path / run / "rollouts").mkdir(parents=True)
        for step in range(1, STEPS + 1):
            record = {"prompt_id": "p", "completion_index": step, "completion": "x", "info": {"verdict": "ok"}}
            record |= {"info": {"verdict": verdict}} if step == 2 else {}
            (tmp_path / run / "rollouts" / f"step_{step:06d}.jsonl").write_text(json.dumps(record) + "\n")
        metrics = "".join(json.dumps({"step": step, "time_s/step": run}) + "\n" for step in range(1, STEPS + 1))
        (tmp_path / run / "metrics.jsonl").write_text(metrics)
    told = first_difference(tmp_path / "alone", tmp_path / "resumed")
    assert told.startswith("rollouts/step_000002.jsonl: prompt_id 'p', completion_index 2 differs in")
    assert "{'verdict': 'ok'}" in told and "{'verdict': 'sandbox_error'}" in told
