"""Executions a second of the sandboxes, from Ray actors with one slot each.

    python benchmarks/sandboxes.py --workers 2 --seconds 10

bubblewrap: `judge_calls` of a one-line function with one test, a fresh sandbox each. docker: the command `true` in warm
sessions, one session an actor, and the same in a container of its own each; left out with `--no-docker`. Each is the
number that ended within the time, over all actors, after a warm-up; three rounds, the median. The wanted figures are
for 2 cores. Needs bubblewrap, and for docker a daemon and the image of `python -m cispo.sandboxes.build_image`.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

from cispo.sandboxes import ExecStatus, Limits, Sandbox, VerdictStatus, open_sandbox
from cispo.sandboxes.judge import judge_calls

ROUNDS, WARM_UP = 3, 5
LIMITS = Limits(wall_s=30.0, cpu_s=5.0)
SOURCE = "def add(a, b):\n    return a + b\n"
TESTS = [{"args": [20, 22], "expected": 42}]


class Worker:
    """One sandbox with one slot, timed where it is."""

    def __init__(self, backend: str, kind: str) -> None:
        self.sandbox = open_sandbox(backend, workers=1)
        self.call = ready_call(self.sandbox, kind)
        for _ in range(WARM_UP):
            self.call()

    def count(self, seconds: float) -> int:
        done, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            self.call()
            done += 1
        return done

    def close(self) -> None:
        self.sandbox.close()


def ready_call(sandbox: Sandbox, kind: str) -> Callable[[], None]:
    """What is counted; raises AssertionError where a result is not right."""
    if kind == "function":

        def judge() -> None:
            assert judge_calls(sandbox, SOURCE, "add", TESTS, LIMITS).status is VerdictStatus.OK

        return judge
    session = sandbox.session(limits=LIMITS) if kind == "session" else None

    def run() -> None:
        where: Any = session or sandbox
        assert where.run(["true"]).status is ExecStatus.OK

    return run


def rate(backend: str, kind: str, workers: int, seconds: float) -> float:
    actor: Any = ray.remote(Worker)
    actors = [actor.remote(backend, kind) for _ in range(workers)]
    ray.get([one.__ray_ready__.remote() for one in actors])
    rates = [sum(ray.get([one.count.remote(seconds) for one in actors])) / seconds for _ in range(ROUNDS)]
    ray.get([one.close.remote() for one in actors])
    for one in actors:
        ray.kill(one)
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="Ray actors")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each of the three rounds")
    parser.add_argument("--no-docker", action="store_true")
    options = parser.parse_args()
    ray.init(address="local", num_cpus=options.workers, include_dashboard=False, log_to_driver=False)
    cases = [("bubblewrap", "function", 60.0), ("bubblewrap", "session", None)]
    cases += [] if options.no_docker else [("docker", "session", 20.0), ("docker", "fresh", None)]
    print(f"{options.workers} actors on {os.cpu_count()} cores")
    print(f"{'backend':12}{'what':12}{'a second':>10}{'wanted':>10}")
    for backend, kind, wanted in cases:
        found = rate(backend, kind, options.workers, options.seconds)
        print(f"{backend:12}{kind:12}{found:10.1f}{'' if wanted is None else f'{wanted:.0f}':>10}", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
