"""The whole run from the command line: repeatable bit for bit, killed at any moment and resumed to equal numbers."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Record = dict[str, Any]
STEPS = 4
ARGUMENTS = [
    f"steps={STEPS}", "rollout.prompts_per_step=8", "rollout.group_size=4", "rollout.workers=1", "sandbox.workers=1",
    "learner.updates_per_step=4", "evaluation=null", "ray.dashboard=false", "logging.console=lines",
]  # fmt: skip


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cispo.cli", "train", "code", *ARGUMENTS, "--run-dir", str(folder), *options]
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder.parent)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    code = process.wait(timeout=240)
    assert code == 0, (folder.parent / f"{folder.name}.log").read_text(encoding="utf-8")[-3000:]


def kill_everything(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the driver, its process group and every actor it started, all at once."""
    family = descendants(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=30)
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """Pids of all processes below this one."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, own in parents.items() if own == parent]
    return found[1:]


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of what must be equal: metrics less their times, rollouts, weights, optimiser and policy version."""
    lines = [without_times(record) for record in records(folder / "metrics.jsonl")]
    assert [record["step"] for record in lines] == list(range(1, STEPS + 1))
    last = folder / "checkpoints" / f"step_{STEPS:06d}"
    files = [
        *sorted((folder / "rollouts").iterdir()),
        last / "policy" / "model.safetensors",
        last / "learner.safetensors",
    ]
    hashes = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"metrics": hashlib.sha256(json.dumps(lines).encode()).hexdigest(), **hashes}


def first_difference(expected: Path, actual: Path) -> str:
    """Where two runs part: the first file, in the order in which a run writes them, with both sides of its record."""
    for step in range(1, STEPS + 1):
        name = f"rollouts/step_{step:06d}.jsonl"
        found = _differing_record(records(expected / name), records(actual / name), ("prompt_id", "completion_index"))
        if found:
            return f"{name}: {found}"
        lines = ([r for r in records(run / "metrics.jsonl") if r["step"] == step] for run in (expected, actual))
        found = _differing_record(*(list(map(without_times, side)) for side in lines), ("step",))
        if found:
            return f"metrics.jsonl: {found}"
    last = f"checkpoints/step_{STEPS:06d}"
    for name in (f"{last}/policy/model.safetensors", f"{last}/learner.safetensors"):
        before, after = load_file(expected / name), load_file(actual / name)
        for tensor in sorted(before.keys() | after.keys()):
            if tensor not in before or tensor not in after:
                return f"{name}: only one of them holds {tensor}"
            if not torch.equal(before[tensor], after[tensor]):
                return f"{name}: {tensor} differs by up to {(before[tensor] - after[tensor]).abs().max()}"
    return "no record differs, only bytes: names, order or white space"


def _differing_record(expected: list[Record], actual: list[Record], identity: tuple[str, ...]) -> str:
    for before, after in zip(expected, actual, strict=False):
        if before != after:
            who = ", ".join(f"{name} {before.get(name)!r}" for name in identity)
            sides = (
                f"\n  {name}\n    left alone: {before.get(name)!r}\n    resumed:    {after.get(name)!r}"
                for name in sorted(before.keys() | after.keys())
                if before.get(name) != after.get(name)
            )
            return f"{who} differs in{''.join(sides)}"
    return "" if len(expected) == len(actual) else f"{len(expected)} records left alone, {len(actual)} resumed"


def records(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(record: Record) -> Record:
    return {name: value for name, value in record.items() if not name.startswith(("time_s/", "perf/"))}


def assert_same_run(alone: Path, folder: Path, what: str) -> None:
    if fingerprint(folder) != fingerprint(alone):
        pytest.fail(f"{what}: {first_difference(alone, folder)}")


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that nobody disturbs, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    started = time.monotonic()
    finish(start(folder), folder)
    return folder, time.monotonic() - started


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


def test_a_killed_and_resumed_run_equals_one_left_alone(left_alone: tuple[Path, float], tmp_path: Path) -> None:
    """The killed run is a second run with the same seed up to the kill, so this shows repeatability too."""
    alone, seconds = left_alone
    delay_s = random.uniform(0.3, 0.8) * seconds
    print(f"killed {delay_s:.2f} s after the run folder appeared")
    kill_after(tmp_path / "killed", delay_s)
    finish(start(tmp_path / "killed", "--resume"), tmp_path / "killed")
    assert_same_run(alone, tmp_path / "killed", f"killed {delay_s:.2f} s after the folder appeared")


@pytest.mark.slow
def test_twenty_kills_at_any_time(left_alone: tuple[Path, float], tmp_path: Path) -> None:
    alone, seconds = left_alone
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
