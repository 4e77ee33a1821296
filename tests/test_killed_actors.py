"""Actors of a run killed one role after the other: the run ends as the one that nobody disturbs, and says who died."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import pytest

from tests.runs import SHORT_RUN, assert_same_run, descendants, finish, name_of, printed, records, start_training

ROLES = {"rollout": "RolloutWorker", "reward": "RewardWorker", "learner": "LearnerActor"}
QUIET = ("ray.dashboard=false", "logging.console=lines")


def actors(run: subprocess.Popen[bytes], role: str) -> list[int]:
    return [pid for pid in descendants(run.pid) if name_of(pid).startswith("ray::") and ROLES[role] in name_of(pid)]


def kill_one(run: subprocess.Popen[bytes], role: str, rng: random.Random) -> bool:
    """SIGKILL to an actor of this role; whether there was one."""
    alive = actors(run, role)
    with suppress(ProcessLookupError):
        if alive:
            os.kill(rng.choice(alive), signal.SIGKILL)
            return True
    return False


def kill_in_turn(run: subprocess.Popen[bytes], moments: Iterator[None], rng: random.Random) -> Counter[str]:
    """Kill an actor at each moment, a role after the other, until the run has ended; how many of each."""
    killed: Counter[str] = Counter()
    for role, _ in zip(cycle(ROLES), moments, strict=False):
        while run.poll() is None and not kill_one(run, role, rng):
            time.sleep(0.05)
        if run.poll() is not None:
            break
        killed[role] += 1
    return killed


def steps_done(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text(encoding="utf-8").count("\n") if file.is_file() else 0


def check(alone: Path, folder: Path, killed: Counter[str], what: str) -> None:
    """Equal numbers and rollouts, so no prompt is lost; each kind of death in the metrics and in what was printed."""
    assert_same_run(alone, folder, what)
    counted = sum((Counter(_deaths(record)) for record in records(folder / "metrics.jsonl")), Counter[str]())
    told = printed(folder).read_text(encoding="utf-8")
    print(f"killed {dict(killed)}; deaths in metrics.jsonl {dict(counted)}")
    # A step that is done again after a learner's death takes its line in the metrics along.
    assert "groups are sampled again" in told or "died while it took weights" in told
    assert "another scores prompt" in told or not counted["reward"]
    assert told.count("the learner starts again from") >= killed["learner"] - 1


def _deaths(record: dict[str, float]) -> dict[str, int]:
    return {name.removeprefix("faults/"): int(value) for name, value in record.items() if name.startswith("faults/")}


def test_a_run_whose_actors_are_killed_equals_one_left_alone(
    run_left_alone: tuple[Path, float], tmp_path: Path
) -> None:
    """The one left alone had a worker of each kind, so the numbers do not depend on how many there are either."""
    folder = tmp_path / "killed"
    run = start_training(folder, "code", SHORT_RUN)

    def after_each_step() -> Iterator[None]:
        for step in range(3):
            while steps_done(folder) <= step and run.poll() is None:
                time.sleep(0.02)
            yield

    killed = kill_in_turn(run, after_each_step(), random.Random(3))
    finish(run, folder)
    assert killed == {"rollout": 1, "reward": 1, "learner": 1}
    check(run_left_alone[0], folder, killed, "an actor killed after each step")


@pytest.mark.slow
def test_the_code_recipe_with_an_actor_killed_every_twenty_seconds(tmp_path: Path) -> None:
    """Five minutes of it, or a little more: the held-out gain is that of the run left alone, to the last bit."""
    alone, folder = tmp_path / "alone", tmp_path / "chaos"
    finish(start_training(alone, "code", QUIET), alone, timeout_s=1800)
    run = start_training(folder, "code", QUIET)
    while not steps_done(folder) and run.poll() is None:
        time.sleep(0.1)
    started = time.monotonic()

    def every_twenty_seconds() -> Iterator[None]:
        while time.monotonic() - started < 300:
            time.sleep(20)
            yield

    killed = kill_in_turn(run, every_twenty_seconds(), random.Random(5))
    ended_s = time.monotonic() - started
    finish(run, folder, timeout_s=1800)
    before, after = (records(folder / "metrics.jsonl")[index]["eval/heldout/pass@1"] for index in (0, -1))
    print(f"{sum(killed.values())} kills in {ended_s:.0f} s; held-out {before:.3f} -> {after:.3f}")
    assert sum(killed.values()) >= 9
    check(alone, folder, killed, "an actor killed every 20 s")
    assert after > before + 0.2
