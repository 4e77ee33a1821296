"""24 jobs at a time for ten minutes, while actors, wardens, bubblewrap processes and containers are killed at random.

Prints its figures; `pytest -s` shows them. CISPO_SOAK_S sets another length in seconds.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import ray

from cispo.sandboxes import Limits, Sandbox
from cispo.sandboxes.judge import judge_asserts, judge_calls, judge_stdin
from cispo.sandboxes.pool import SandboxPool
from tests.sandboxes.soak import Killer, Machine

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
DURATION_S = float(os.environ.get("CISPO_SOAK_S", "600"))
JOBS_AT_A_TIME = 24
BACKENDS = ("bubblewrap", "docker")
# Longest that a small program of the host may take to start and end meanwhile.
RESPONSE_S = 10.0
LIMITS = Limits(wall_s=120.0, cpu_s=1.0, memory_mib=96, pids=16, output_kib=64, files_mib=8)
CALLS = [{"args": [20, 22], "expected": 42}, {"args": [1, 2], "expected": 3}]
ASSERTS = "def check(candidate):\n    assert candidate(20, 22) == 42\n    assert candidate(1, 2) == 3\n"
LINES = [{"stdin": "20 22", "expected": "42"}, {"stdin": "1 2", "expected": "3"}]
FUNCTIONS = {
    "def f(a, b): return a + b": "ok",
    "def f(a, b):\n    x = [n * n for n in range(100000)]\n    return a + b": "ok",
    "def f(a, b): return a * b": "wrong_answer",
    "class A:\n    __eq__ = lambda s, o: True\ndef f(a, b): return A()": "runtime_error/wrong_answer",
    "import os\ndef f(a, b): os._exit(0)": "runtime_error",
    "def f(a, b):\n    while True: pass": "timeout",
    "def f(a, b):\n    x = []\n    while True: x.append(bytearray(4 << 20))": "memory_limit/runtime_error",
    "def f(a, b):\n    while True: print('x' * 1000)": "output_limit",
    "def f(a, b) return a + b": "rejected",
    "import os\ndef f(a, b):\n    while True:\n        try: os.fork()\n        except OSError: pass": "timeout",
    "import os\ndef f(a, b):\n    if os.fork() == 0:\n        os.setsid()\n        __import__('time').sleep(600)\n"
    "        os._exit(0)\n    return a + b": "ok",
}
PROGRAMS = {
    "print(sum(map(int, input().split())))": "ok",
    "print(input())": "wrong_answer",
    "import os\nos._exit(0)": "wrong_answer",
    "while True: pass": "timeout",
}


def judge(sandbox: Sandbox, kind: str, source: str) -> str:
    if kind == "calls":
        return judge_calls(sandbox, source, "f", CALLS, LIMITS).status.value
    if kind == "asserts":
        return judge_asserts(sandbox, source, ASSERTS, "f", LIMITS).status.value
    return judge_stdin(sandbox, source, LINES, LIMITS).status.value


def converse(sandbox: Sandbox, turns: int) -> str:
    """A session in which each command adds a line to a file."""
    with sandbox.session(files={"lines": b""}, limits=LIMITS) as session:
        for turn in range(turns):
            result = session.run(["sh", "-c", f"echo {turn} >> lines; cat lines"])
            assert result.stdout == "".join(f"{n}\n" for n in range(turn + 1)).encode(), result
    return "ok"


def jobs() -> list[tuple[str, str, str]]:
    """Kind, source and the statuses that are right."""
    functions = [(kind, *item) for kind in ("calls", "asserts") for item in FUNCTIONS.items()]
    programs = [("stdin", *item) for item in PROGRAMS.items()]
    return [*functions, *programs, ("session", "6", "ok"), ("session", "12", "ok")]


class Submitters:
    """Threads that hand a pool one random job after the other until the time is over."""

    def __init__(self, pools: list[SandboxPool], end: float) -> None:
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest_s = 0.0
        self._pools, self._end = pools, end
        self._threads = [threading.Thread(target=self._submit, args=(index,)) for index in range(JOBS_AT_A_TIME)]
        for thread in self._threads:
            thread.start()

    def _submit(self, index: int) -> None:
        chance, pool = random.Random(index), self._pools[index % len(self._pools)]
        while time.monotonic() < self._end:
            kind, source, right = chance.choice(jobs())
            started = time.monotonic()
            try:
                is_session = kind == "session"
                future = pool.submit(converse, int(source)) if is_session else pool.submit(judge, kind, source)
                status = future.result()
            except Exception as error:
                status = f"{type(error).__name__}: {error}"
            self.longest_s = max(self.longest_s, time.monotonic() - started)
            self.statuses[status[:80]] += 1
            if status not in right.split("/"):
                self.wrong.append(f"{BACKENDS[index % 2]} {kind} {source!r}: {status}, not {right}")

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


@pytest.fixture
def many_cores() -> Iterator[None]:
    """24 actors beside each other on whatever cores there are."""
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=JOBS_AT_A_TIME, **options)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.docker
def test_verdicts_are_right_and_nothing_is_left_whatever_is_killed(many_cores: None) -> None:
    folders_before = set(os.listdir(tempfile.gettempdir()))
    pools = [SandboxPool(JOBS_AT_A_TIME // 2, backend=backend, deadline_s=600.0) for backend in BACKENDS]
    started = time.monotonic()
    machine = Machine(lambda: [pid for pool in pools for pid in pool.pids])
    killer = Killer(machine, lambda: [pid for pool in pools for pid in pool.pids], seed=0)
    submitters = Submitters(pools, started + DURATION_S)
    slowest_s = 0.0
    while time.monotonic() < started + DURATION_S:
        before = time.monotonic()
        subprocess.run(["true"], check=True)
        slowest_s = max(slowest_s, time.monotonic() - before)
        time.sleep(1.0)
    killer.stop()
    submitters.join()
    counts = [asdict(pool.metrics()) for pool in pools]
    for pool in pools:
        pool.close()
    deadline = time.monotonic() + 30.0
    while (left := machine.left()) and time.monotonic() < deadline:
        time.sleep(0.2)
    folders = {name for name in set(os.listdir(tempfile.gettempdir())) - folders_before if "cispo" in name}
    figures = {
        "seconds": round(time.monotonic() - started),
        "jobs": submitters.statuses.total(),
        "statuses": dict(submitters.statuses),
        "wrong": submitters.wrong,
        "kills": dict(killer.kills),
        "pools": dict(zip(BACKENDS, counts, strict=True)),
        "longest_job_s": round(submitters.longest_s, 1),
        "slowest_host_program_s": round(slowest_s, 2),
        "processes_seen": len(machine.processes),
        "left": left,
    }
    print(json.dumps(figures, indent=1))
    assert killer.error is None
    assert set(killer.kills) == {"actor", "warden", "bwrap", "container"}
    assert submitters.wrong == []
    assert left == [] and folders == set()
    assert slowest_s < RESPONSE_S
