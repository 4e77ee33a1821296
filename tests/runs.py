"""Runs of the command line as processes that tests start, kill and compare."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Record = dict[str, Any]
SHORT_RUN = (
    "steps=4", "rollout.prompts_per_step=8", "rollout.group_size=4", "learner.updates_per_step=4", "evaluation=null",
    "ray.dashboard=false", "logging.console=lines",
)  # fmt: skip

LIMITS = ("timeout", "memory_limit")


def start_training(folder: Path, recipe: str | Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """`cispo train` into this run folder; what it prints is added to a file beside it."""
    command = [sys.executable, "-m", "cispo.cli", "train", str(recipe), "--run-dir", str(folder), *options]
    with printed(folder).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder.parent)


def printed(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"


def finish(process: subprocess.Popen[bytes], folder: Path, *, timeout_s: float = 240) -> None:
    code = process.wait(timeout=timeout_s)
    assert code == 0, printed(folder).read_text(encoding="utf-8")[-3000:]


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


def name_of(pid: int) -> str:
    """The command line of a process, which Ray makes the name of its actor; empty when it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    return ""


def records(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(record: Record) -> Record:
    """The record less what may differ between equal runs: times, who died, and which limit ended a program.

    A program that runs away with time and memory at once meets one of its limits first, by the load of the machine. Its
    score is the same.
    """
    kept = {name: value for name, value in record.items() if not name.startswith(("time_s/", "perf/", "faults/"))}
    kept.pop("sandbox/frac_timeout", None)
    info = kept.get("info", {})
    if info.get("verdict") in LIMITS:
        kept["info"] = {**info, "verdict": "a limit"}
    return kept


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of what must be equal: metrics less their times, rollouts, weights, optimiser and policy version."""
    steps = [record["step"] for record in records(folder / "metrics.jsonl") if record["step"]]
    assert steps == list(range(1, len(steps) + 1))
    last = folder / "checkpoints" / f"step_{steps[-1]:06d}"
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _tensor_files(folder, last)}
    rollouts = {file.name: _hash_of(records(file)) for file in sorted((folder / "rollouts").iterdir())}
    return {"metrics": _hash_of(records(folder / "metrics.jsonl")), **rollouts, **hashes}


def _tensor_files(folder: Path, checkpoint: Path) -> list[str]:
    """Files of a checkpoint's policy and learner, named from the run's folder."""
    learner = sorted(checkpoint.glob("learner-*.safetensors"))
    assert learner
    return [str(file.relative_to(folder)) for file in (checkpoint / "policy" / "model.safetensors", *learner)]


def _hash_of(lines: list[Record]) -> str:
    return hashlib.sha256(json.dumps([without_times(line) for line in lines]).encode()).hexdigest()


def first_difference(expected: Path, actual: Path) -> str:
    """Where two runs part: the first file, in the order in which a run writes them, with both sides of its record."""
    steps = max(record["step"] for record in records(expected / "metrics.jsonl"))
    for step in range(steps + 1):
        name = f"rollouts/step_{step:06d}.jsonl"
        identity = ("prompt_id", "completion_index")
        sampled = (records(run / name) if step else [] for run in (expected, actual))
        found = _differing_record(*(list(map(without_times, side)) for side in sampled), identity)
        if found:
            return f"{name}: {found}"
        lines = ([r for r in records(run / "metrics.jsonl") if r["step"] == step] for run in (expected, actual))
        found = _differing_record(*(list(map(without_times, side)) for side in lines), ("step",))
        if found:
            return f"metrics.jsonl: {found}"
    for name in _tensor_files(expected, expected / "checkpoints" / f"step_{steps:06d}"):
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


def assert_same_run(alone: Path, folder: Path, what: str) -> None:
    if fingerprint(folder) != fingerprint(alone):
        pytest.fail(f"{what}: {first_difference(alone, folder)}")
