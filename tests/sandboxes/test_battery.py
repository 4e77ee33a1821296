"""Hostile and honest programs of many kinds, through every judge on both backends, all at once.

The programs are in battery/*.txt, each behind a line `### name | status | limit=value`: the statuses of the verdict
that are right for it (with `/` between), and limits that differ. What is honest has no status, and must pass. Programs
run beside each other, so that what one does to another shows, while the machine is watched. At the end nothing may be
left.
"""

import dataclasses
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cispo.sandboxes import Limits, Sandbox, Verdict, VerdictStatus, open_sandbox
from cispo.sandboxes.docker_client import OWNER_LABEL, connect, owner_mark
from cispo.sandboxes.judge import judge_asserts, judge_calls, judge_repo, judge_stdin

FOLDER = Path(__file__).with_name("battery")
SMALL = Limits(wall_s=30.0, cpu_s=0.8, memory_mib=96, pids=16, output_kib=64, files_mib=8)
LARGE = Limits(wall_s=60.0, cpu_s=5.0, memory_mib=160, pids=32, output_kib=256, files_mib=16)
CALLS = [
    {"args": [20, 22], "expected": 42},
    {"args": ["ab", "cd"], "expected": "abcd"},
    {"args": [[1], [2]], "expected": [1, 2]},
]
CHECK = """
def check(candidate):
    assert candidate(20, 22) == 42
    assert candidate("ab", "cd") == "abcd"
    assert candidate([1], [2]) == [1, 2]
"""
LINES = [{"stdin": "20 22\n", "expected": "42\n"}, {"stdin": "-3 -4\n", "expected": "-7\n"}]
BASE = {"README.md": "A calculator.", "calc/__init__.py": "", "calc/core.py": "def add(a, b): ...\nshare = add\n"}
PYTEST = {
    "tests/test_core.py": "from calc.core import add, share\n\ndef test_numbers():\n    assert add(20, 22) == 42\n\n"
    "def test_text():\n    assert add('ab', 'cd') == 'abcd'\n\ndef test_share():\n    assert share(1, 2) == 0.5\n"
}
IDS = [f"tests/test_core.py::test_{name}" for name in ("numbers", "text", "share")]
# Longest that another program of the machine may take to start and end beside the battery.
RESPONSE_S = 10.0


@dataclass(frozen=True)
class Program:
    """statuses: the verdicts that are right for it."""

    kind: str
    name: str
    text: str
    statuses: frozenset[VerdictStatus]
    limits: Limits


def read_programs(kind: str, is_hostile: bool) -> Iterator[Program]:
    text = (FOLDER / f"{kind}_{'hostile' if is_hostile else 'honest'}.txt").read_text()
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        head, _, source = part.partition("\n")
        name, *rest = head.split(" | ")
        statuses = rest[0].split("/") if is_hostile else ["ok"]
        changes: dict[str, Any] = {}
        for setting in rest[1:]:
            key, _, value = setting.partition("=")
            changes[key] = float(value)
        limits = dataclasses.replace(LARGE if kind == "repo" else SMALL, **changes)
        yield Program(kind, name, source.rstrip("\n") + "\n", frozenset(map(VerdictStatus, statuses)), limits)


PROGRAMS = [
    program
    for kind in ("function", "stdin", "repo")
    for is_hostile in (True, False)
    for program in read_programs(kind, is_hostile)
]
JUDGES = {"function": ("calls", "asserts"), "stdin": ("stdin",), "repo": ("repo",)}
CASES = [(program, judge) for program in PROGRAMS for judge in JUDGES[program.kind]]


def judge_case(sandbox: Sandbox, program: Program, judge: str) -> Verdict:
    if judge == "calls":
        return judge_calls(sandbox, program.text, "f", CALLS, program.limits)
    if judge == "asserts":
        return judge_asserts(sandbox, program.text, CHECK, "f", program.limits)
    if judge == "stdin":
        return judge_stdin(sandbox, program.text, LINES, program.limits)
    parts = re.split(r"^--- (.*)\n", program.text, flags=re.MULTILINE)[1:]
    files = dict(zip(parts[::2], parts[1::2], strict=True))
    return judge_repo(sandbox, BASE, files, PYTEST, IDS, program.limits)


class Heartbeat:
    """Starts a small program of the host again and again, and keeps the longest that one took."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat)
        self._thread.start()

    def _beat(self) -> None:
        while not self._is_over.wait(0.5):
            started = time.monotonic()
            subprocess.run(["true"], check=True)
            self.longest_s = max(self.longest_s, time.monotonic() - started)

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()


class Match:
    """One backend with the verdicts of all cases that this test run asks for, begun before the first is waited for."""

    def __init__(self, backend: str, cases: list[int]) -> None:
        self.backend = backend
        self.sandbox = open_sandbox(backend, workers=3)
        self.heartbeat = Heartbeat()
        self._pool = ThreadPoolExecutor(3)
        self._verdicts: dict[int, Future[Verdict]] = {
            index: self._pool.submit(judge_case, self.sandbox, *CASES[index]) for index in cases
        }

    def verdict(self, index: int) -> Verdict:
        return self._verdicts[index].result()

    def finish(self) -> None:
        self._pool.shutdown()
        self.heartbeat.stop()


@pytest.fixture(scope="module", params=["bubblewrap", pytest.param("docker", marks=pytest.mark.docker)])
def match(request: pytest.FixtureRequest) -> Iterator[Match]:
    chosen = [item.callspec.params for item in request.session.items if getattr(item, "callspec", None)]
    cases = [params["index"] for params in chosen if params.get("match") == request.param and "index" in params]
    opened = Match(request.param, cases)
    try:
        yield opened
    finally:
        opened.finish()
        opened.sandbox.close()


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{judge}: {program.name}" for program, judge in CASES])
def test_the_verdict_is_right(match: Match, index: int) -> None:
    verdict = match.verdict(index)
    program = CASES[index][0]
    assert verdict.status in program.statuses, verdict
    assert (verdict.passed == verdict.total) == (verdict.status is VerdictStatus.OK), verdict


def test_the_battery_is_large_enough() -> None:
    hostile = [program for program in PROGRAMS if VerdictStatus.OK not in program.statuses]
    assert len(hostile) >= 120 and len(PROGRAMS) - len(hostile) >= 40
    assert len({(program.kind, program.text) for program in PROGRAMS}) == len(PROGRAMS)


def test_nothing_is_left_and_the_machine_stayed_responsive(match: Match) -> None:
    match.finish()
    if match.backend == "bubblewrap":
        assert processes_left(match.sandbox) == []
    groups = slot_groups(match.sandbox) if match.backend == "bubblewrap" else []
    match.sandbox.close()
    assert wait_until_empty(lambda: [group for group in groups if group.exists()]) == []
    if match.backend == "docker":
        assert wait_until_empty(own_containers) == []
        assert wait_until_empty(orphaned_groups) == []
    assert match.heartbeat.longest_s < RESPONSE_S


def processes_left(sandbox: Any) -> list[str]:
    """What runs below the wardens of a bubblewrap sandbox, or under one of its user ids, while it is idle."""
    supervisors = [item for item in sandbox._idle.queue if item is not None]
    wardens = {item._warden.pid for item in supervisors}
    uids = {item.slot.uid for item in supervisors} - {None}
    assert len(wardens) == 3
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit():
                status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines()[:12])
                if int(status["PPid"]) in wardens or int(status["Uid"].split()[0]) in uids:
                    found.append(status["Name"])
        except (OSError, ValueError):
            continue
    return found


def slot_groups(sandbox: Any) -> list[Path]:
    """The control groups that a bubblewrap sandbox has made."""
    groups = [item.cgroup for item in sandbox._idle.queue if item is not None and item.cgroup is not None]
    return [folder for group in groups for folder in group.folders]


def own_containers() -> list[str]:
    client = connect()
    try:
        label = f"{OWNER_LABEL}={owner_mark()}"
        found = client.containers.list(all=True, filters={"label": label}, ignore_removed=True)
        return [container.id for container in found]
    finally:
        client.close()


def orphaned_groups() -> list[Path]:
    """Control groups of containers that the daemon of this machine no longer knows."""
    client = connect()
    try:
        groups = [*Path("/sys/fs/cgroup").glob("docker/*/"), *Path("/sys/fs/cgroup").glob("*/docker/*/")]
        known = {container.id for container in client.containers.list(all=True, ignore_removed=True)}
        return [group for group in groups if group.name not in known]
    finally:
        client.close()


def wait_until_empty(look: Callable[[], list[Any]]) -> list[Any]:
    deadline = time.monotonic() + 20.0
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
