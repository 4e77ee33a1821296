"""The pool of Ray actors: its own failures are tried again; deadlines belong to executions; the queue is bounded."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
import ray

from cispo.errors import SandboxClosedError, SandboxError
from cispo.ray_runtime import ray_session
from cispo.recipe.schema import RaySettings
from cispo.sandboxes import Limits, Sandbox, Verdict, VerdictStatus, pool_metrics
from cispo.sandboxes.bounded_queue import BoundedQueue
from cispo.sandboxes.judge import judge_calls
from cispo.sandboxes.pool import ATTEMPTS, SandboxPool

# Actors cannot import a file of tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
TESTS = [{"args": [2, 3], "expected": 5}]
LIMITS = Limits(wall_s=20.0, cpu_s=2.0, memory_mib=128)


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    with ray_session(RaySettings(dashboard=False)), SandboxPool(2, cores_per_worker=0.5) as opened:
        yield opened


def note_and_sleep(sandbox: Sandbox, notes: Path, seconds: float) -> str:
    """Leaves a file named after this attempt's process; only the first attempt sleeps."""
    is_first = not list(notes.iterdir())
    (notes / str(os.getpid())).touch()
    if is_first:
        time.sleep(seconds)
    return sandbox.run([sandbox.capabilities().python, "-S", "-c", "print('done')"]).stdout.decode().strip()


def fail(sandbox: Sandbox, notes: Path, error: Exception) -> None:
    (notes / f"{len(list(notes.iterdir()))}").touch()
    raise error


def sleep(sandbox: Sandbox, seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_judges_run_in_it_and_their_verdicts_come_back(pool: SandboxPool) -> None:
    before = pool.metrics().executions
    sources = [f"def f(a, b): return a + b + {wrong}" for wrong in (0, 1, 0, 1)]
    futures = [pool.submit(judge_calls, source, "f", TESTS, LIMITS) for source in sources]
    verdicts: list[Verdict] = [future.result(60) for future in futures]
    assert [verdict.status is VerdictStatus.OK for verdict in verdicts] == [True, False, True, False]
    counts = pool.metrics()
    assert (counts.executions - before, counts.queued) == (4, 0)
    assert counts.executions_per_s > 0 and counts.busy_s > 0


def test_a_killed_actor_is_a_retry_elsewhere_and_is_replaced(pool: SandboxPool, tmp_path: Path) -> None:
    errors = pool.metrics().errors
    future = pool.submit(note_and_sleep, tmp_path, 600.0)
    deadline = time.monotonic() + 60.0
    while not (notes := list(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.01)
    first = int(notes[0].name)
    os.kill(first, signal.SIGKILL)
    assert future.result(120) == "done"
    assert len(list(tmp_path.iterdir())) == 2
    assert pool.metrics().errors == errors + 1
    assert [other.result(60) for other in [pool.submit(sleep, 0.2) for _ in range(4)]] == [0.2] * 4
    assert not Path(f"/proc/{first}/cmdline").exists()


def test_what_a_job_raises_is_its_result_and_is_not_tried_again(pool: SandboxPool, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="lost"):
        pool.submit(fail, tmp_path, KeyError("lost")).result(60)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failing_sandbox_is_tried_again_so_many_times(pool: SandboxPool, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=f"lost {ATTEMPTS} times, at last: no cores"):
        pool.submit(fail, tmp_path, SandboxError("no cores")).result(60)
    assert len(list(tmp_path.iterdir())) == ATTEMPTS


def test_a_deadline_counts_from_the_start_of_the_execution(pool: SandboxPool) -> None:
    timeouts = pool.metrics().timeouts
    futures = [pool.submit(sleep, 0.5, deadline_s=2.0) for _ in range(12)]  # 3 s on two actors
    assert [future.result(60) for future in futures] == [0.5] * 12
    assert pool.metrics().timeouts == timeouts


def test_an_execution_past_its_deadline_is_ended_and_tried_again(pool: SandboxPool, tmp_path: Path) -> None:
    timeouts = pool.metrics().timeouts
    assert pool.submit(note_and_sleep, tmp_path, 600.0, deadline_s=2.0).result(120) == "done"
    assert pool.metrics().timeouts == timeouts + 1


def test_the_queue_is_bounded_and_closing_waits_for_what_is_in_it(pool: SandboxPool) -> None:
    with SandboxPool(1, cores_per_worker=0.1, max_queued=2) as small:
        done: list[Future[Any]] = []
        thread = threading.Thread(target=lambda: done.extend(small.submit(sleep, 0.5) for _ in range(6)))
        thread.start()
        time.sleep(0.7)
        assert small.metrics().queued == 2
        assert len(done) < 6
        thread.join()
    assert len(done) == 6 and not wait(done, timeout=0).not_done
    with pytest.raises(SandboxClosedError):
        small.submit(sleep, 0.0)


def test_a_pool_without_a_sandbox_is_an_error(pool: SandboxPool) -> None:
    with pytest.raises(SandboxError, match=r"no-such-image|no Docker daemon"):
        SandboxPool(1, backend="docker", image="no-such-image", cores_per_worker=0.1)


def test_counts_are_metrics_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, float] = {}

    class Recorded:
        def __init__(self, name: str, description: str) -> None:
            self.name = name

        def set(self, value: float) -> None:
            values[self.name] = value

        def inc(self) -> None:
            values[self.name] = values.get(self.name, 0.0) + 1

    monkeypatch.setattr(pool_metrics, "Gauge", Recorded)
    monkeypatch.setattr(pool_metrics, "Counter", Recorded)
    metrics = pool_metrics.PoolMetrics(lambda: 3)
    metrics.add_execution(0.5)
    metrics.add_error(is_timeout=True)
    metrics.add_error(is_timeout=False)
    assert values.pop("cispo_sandbox_executions_per_s") > 0
    assert {name.removeprefix("cispo_sandbox_"): value for name, value in values.items()} == {
        "queued": 3, "executions": 1, "timeouts": 1, "errors": 2
    }  # fmt: skip


def test_a_closed_queue_takes_nothing_but_gives_what_is_left() -> None:
    jobs: BoundedQueue[int] = BoundedQueue(1)
    assert jobs.put(1)
    jobs.put_back(0)
    assert jobs.close() and not jobs.close()
    assert not jobs.put(2)
    assert [jobs.get(), jobs.get(), jobs.get()] == [0, 1, None]
    with pytest.raises(ValueError, match="max_queued"):
        BoundedQueue[int](0)
