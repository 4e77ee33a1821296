"""A verdict depends on the program and its tests: not on how busy the machine is, nor on what else it kills."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cispo.errors import SandboxError
from cispo.sandboxes import ExecStatus, Limits, Sandbox, Verdict, VerdictStatus, open_sandbox, supervisor
from cispo.sandboxes.judge import judge_calls
from cispo.sandboxes.process_tree import TreeUsage

LIMITS = Limits(wall_s=30.0, cpu_s=5.0, memory_mib=96)
TESTS = [{"args": [n], "expected": n} for n in range(3)]
PID_MAX = int(Path("/proc/sys/kernel/pid_max").read_text())
SLEEPER = "import time\ndef f(n):\n    time.sleep(0.5)\n    return n"


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def own_sandbox() -> Iterator[tuple[Sandbox, int]]:
    """A sandbox of one slot, and its warden: what this process has for a child once it is open, and had not before."""
    before = set(children_of(os.getpid()))
    with open_sandbox("bubblewrap", workers=1) as opened:
        (warden,) = set(children_of(os.getpid())) - before
        yield opened, warden


def last_pid() -> int:
    return int(Path("/proc/loadavg").read_text().split()[-1])


def chain_below(warden: int) -> list[int]:
    """bubblewrap, its first process inside, and the program, as far as they run."""
    chain: list[int] = []
    while below := children_of(chain[-1] if chain else warden):
        chain.append(below[0])
    return chain


@pytest.mark.parametrize(
    ("level", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGTERM)]
)
def test_a_program_that_the_machine_kills_is_run_again(
    own_sandbox: tuple[Sandbox, int], level: int, number: int
) -> None:
    """The kernel does when memory ends for others, and so does who signals a process number that has come round."""
    opened, warden = own_sandbox
    killed: list[int] = []

    def kill_once() -> None:
        deadline = time.monotonic() + 20.0
        while not killed and time.monotonic() < deadline:
            chain = chain_below(warden)
            if len(chain) == 3:
                os.kill(chain[level], number)
                killed.append(chain[level])

    killer = threading.Thread(target=kill_once)
    killer.start()
    verdict = judge_calls(opened, SLEEPER, "f", TESTS, LIMITS)
    killer.join()
    assert killed
    assert (verdict.status, verdict.passed) == (VerdictStatus.OK, 3)


def test_a_program_that_kills_itself_has_failed(sandbox: Sandbox) -> None:
    code = "import os\ndef f(n):\n    if n == 1:\n        os.kill(os.getpid(), 9)\n    return n"
    verdict = judge_calls(sandbox, code, "f", TESTS, LIMITS)
    assert (verdict.status, verdict.passed) == (VerdictStatus.RUNTIME_ERROR, 1)


def test_cpu_seconds_count_also_where_nobody_looked_in_time(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine delays the looks; the program must not gain by it."""
    monkeypatch.setattr(supervisor, "TICK_S", 60.0)
    code = "import time\ndef f(n):\n    while n == 2 and time.process_time() < 0.5:\n        pass\n    return n"
    verdict = judge_calls(sandbox, code, "f", TESTS, Limits(wall_s=30.0, cpu_s=0.3))
    assert (verdict.status, verdict.passed) == (VerdictStatus.TIMEOUT, 2)
    assert judge_calls(sandbox, code, "f", TESTS, Limits(wall_s=30.0, cpu_s=3.0)).status is VerdictStatus.OK


def test_a_starved_program_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times its limit by the clock go by while others have the core; its own CPU seconds decide."""
    monkeypatch.setattr(supervisor, "tree_usage", lambda pid: TreeUsage(starved_s=100.0, is_runnable=True))
    watch = supervisor.Watch(Limits(wall_s=10.0), None, os.getpid())
    watch._start -= 200.0
    assert watch.look() is None
    watch._start -= 200.0
    with pytest.raises(SandboxError, match=r"waited 100\.0 of 400"):
        watch.look()


def test_a_program_meets_the_same_addresses_every_time(own_sandbox: tuple[Sandbox, int]) -> None:
    """Sets of objects are in the order of their addresses, and so is what a program makes of them."""
    opened, _ = own_sandbox
    python = opened.capabilities().python
    source = "import sys\nprint([id(x) for x in (None, object(), [], lambda: 0, sys)])"
    results = [opened.run([python, "-S", "-s", "-c", source]) for _ in range(4)]
    assert all(result.status is ExecStatus.OK for result in results)
    assert len({result.stdout for result in results}) == 1


def test_a_bomb_of_threads_does_not_use_up_the_machines_process_numbers(sandbox: Sandbox) -> None:
    """Else they come round, and whoever signals a process by its number may hit somebody else's program."""
    source = """
import threading, time
def f(n):
    while True:
        try:
            threading.Thread(target=time.sleep, args=(60,)).start()
        except RuntimeError:
            pass
"""
    used, before, is_over = 0, last_pid(), threading.Event()

    def count() -> None:
        nonlocal used, before
        while not is_over.wait(0.002):
            now = last_pid()
            used, before = used + (now - before) % PID_MAX, now

    counter = threading.Thread(target=count)
    counter.start()
    try:
        verdict = judge_calls(sandbox, source, "f", TESTS, Limits(wall_s=60.0, cpu_s=1.0, pids=16))
    finally:
        is_over.set()
        counter.join()
    assert verdict.status is VerdictStatus.TIMEOUT
    # Only a user id of its own has a limit that refuses before a number is taken; the group's takes one each time.
    if sandbox.capabilities().separate_user:
        assert used < 15_000, "at the group's limit it were more than 50 000"


NEIGHBOURS = {
    "quick": ("def f(n): return n", VerdictStatus.OK),
    "wrong": ("def f(n): return n + 1", VerdictStatus.WRONG_ANSWER),
    "loop": ("def f(n):\n    while n == 1: pass\n    return n", VerdictStatus.TIMEOUT),
    "deep": ("def f(n): return f(n)", VerdictStatus.RUNTIME_ERROR),
    "memory": ("def f(n): return len(bytearray(400 << 20))", VerdictStatus.MEMORY_LIMIT),
    # A bomb goes on when it is refused: that is what makes it one.
    "bomb": (
        "import os\ndef f(n):\n    while True:\n        try: os.fork()\n        except OSError: pass",
        VerdictStatus.TIMEOUT,
    ),
    "flood": ("def f(n):\n    while True: print('x' * 99)", VerdictStatus.OUTPUT_LIMIT),
}


def test_verdicts_do_not_depend_on_neighbours() -> None:
    """Two sandboxes, as of two runs of one machine, judge what harms most and what must not be harmed side by side."""
    limits = Limits(wall_s=30.0, cpu_s=0.5, memory_mib=96, pids=16, output_kib=64, files_mib=8)

    def judge_all(opened: Sandbox) -> dict[str, Verdict]:
        return {name: judge_calls(opened, code, "f", TESTS, limits) for name, (code, _) in NEIGHBOURS.items()}

    work: list[Callable[[], dict[str, Verdict]]] = []
    with open_sandbox(workers=2) as one, open_sandbox(workers=2) as other, ThreadPoolExecutor(8) as pool:
        work += [lambda: judge_all(one), lambda: judge_all(other)] * 4
        outcomes = [run.result() for run in [pool.submit(task) for task in work]]
    for verdicts in outcomes:
        found = {name: verdict.status for name, verdict in verdicts.items()}
        assert found == {name: status for name, (_, status) in NEIGHBOURS.items()}, verdicts
    assert all(verdicts["loop"].passed == 1 for verdicts in outcomes)
