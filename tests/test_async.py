"""A run that samples ahead: how old and long its tokens may be, whom it trains on, a kill, a dead learner, its log."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cispo.cli import main
from cispo.replay import replay
from cispo.schedule import read_schedule
from tests.runs import descendants, finish, name_of, printed, start_training

K, STEPS, PROMPTS_PER_STEP = 2, 6, 4
REWARD = "def reward(prompt, completion, **row):\n    return float(len(completion) % 3)\n"


@pytest.fixture(scope="module")
def recipe(small_policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("async")
    (folder / "lengths.py").write_text(REWARD, encoding="utf-8")
    prompts = "".join(json.dumps({"id": f"p{i}", "prompt": "ask" * (1 + i % 3)}) + "\n" for i in range(12))
    (folder / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    settings = {
        "name": "ahead",
        "steps": STEPS,
        "policy": {"path": str(small_policy_folder), "device": "cpu"},
        "data": {"path": "prompts.jsonl"},
        "rollout": {
            "prompts_per_step": PROMPTS_PER_STEP,
            "group_size": 4,
            "max_prompt_tokens": 16,
            "max_completion_tokens": 24,
            "max_concurrent_completions": 8,
            "max_off_policy_steps": K,
            # Gates that always hold: the window opens with the second step.
            "length_windows": {"tokens": [12], "steps": 2, "perplexity_change": 1e9, "near": 0.01},
        },
        "rewards": [{"name": "lengths.py:reward"}],
        "sandbox": {"workers": 1},
        "learner": {"learning_rate": 1e-3, "updates_per_step": 2},
        "ray": {"dashboard": False},
        "logging": {"console": "lines"},
    }
    (folder / "ahead.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "ahead.yaml"


def train(recipe: Path, run: Path, *options: str) -> subprocess.Popen[bytes]:
    return start_training(run, recipe, options)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def windows_of(run: Path) -> list[int]:
    return [line["completion/window_tokens"] for line in lines(run)]


def check_run(run: Path) -> None:
    """Every step once, tokens within bound and window, each prompt once in a pass, and updates that repeat."""
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
    assert max(line["off_policy/steps/max"] for line in lines(run)) <= K
    windows = windows_of(run)
    assert windows == sorted(windows) and windows[:2] == [12, 12] and windows[K + 2 :] == [24, 24]
    assert all(line["completion/length_tokens/max"] <= line["completion/window_tokens"] for line in lines(run))
    records = read_schedule(run)
    assert sorted(records) == list(range(1, STEPS + 1))
    per_pass = 12 // PROMPTS_PER_STEP
    for first in range(1, STEPS + 1, per_pass):
        seen = [prompt for step in range(first, first + per_pass) for prompt in records[step].prompts]
        assert sorted(seen) == sorted(f"p{i}" for i in range(12))
    for step, record in records.items():
        assert all(step - 1 - K <= low <= high <= step - 1 for low, high in record.versions)
    again = list(replay(run, STEPS))
    assert [one.step for one in again][-1] == STEPS
    assert all(one.checksum == one.expected for one in again)


def test_sampling_ahead_keeps_its_bound_and_its_log_repeats_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "quiet"
    finish(train(recipe, run), run)
    check_run(run)
    assert max(line["off_policy/steps/max"] for line in lines(run)) > 0
    assert windows_of(run) == [12] * 4 + [24] * 2
    assert main(["replay", str(run), str(STEPS)]) == 0
    assert "as in the run" in capsys.readouterr().out
    assert main(["replay", str(run), "99"]) == 2
    assert "has no step 99 in its schedule" in capsys.readouterr().err


def test_a_killed_run_goes_on_and_a_learner_that_dies_starts_again(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    process = train(recipe, run)
    wait_for_step(run, 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    process = train(recipe, run, "--resume")
    wait_for_step(run, 4, process)
    learner = next(pid for pid in descendants(process.pid) if "Learner" in name_of(pid) or ":learner" in name_of(pid))
    os.kill(learner, signal.SIGKILL)
    finish(process, run)
    check_run(run)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").is_file() or not lines(run) or lines(run)[-1]["step"] < step:
        assert process.poll() is None, printed(run).read_text(encoding="utf-8")[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
