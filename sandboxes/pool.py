"""A pool of Ray actors with a sandbox each, for scripts that judge many programs; a run's reward workers have their own.

One thread an actor hands it one job at a time, so that a job's deadline counts from the start of its execution and not
from its place in the queue. The queue is bounded: `submit` waits when it is full. What the pool itself may get wrong (an
actor killed, an execution past its deadline) is tried again on whichever actor is free next; what a job raises or
returns is its result.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ray

from cispo.errors import SandboxClosedError, SandboxError
from cispo.sandboxes.backends import open_sandbox

ATTEMPTS = 3
START_TIMEOUT_S = 120.0


class SandboxWorker:
    """The actor: one sandbox with one slot."""

    def __init__(self, backend: str, settings: dict[str, Any]) -> None:
        self._sandbox = open_sandbox(backend, workers=1, **settings)

    def execute(self, function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return function(self._sandbox, *args, **named)

    def close(self) -> None:
        self._sandbox.close()


@dataclass
class PoolMetrics:
    """Counts since the pool was opened. errors: attempts lost to a killed actor or a deadline, and tried again or not.

    timeouts: the part of them that passed their deadline. busy_s: seconds of all executions together.
    """

    queued: int = 0
    executions: int = 0
    executions_per_s: float = 0.0
    timeouts: int = 0
    errors: int = 0
    busy_s: float = 0.0


@dataclass
class _Job:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    named: dict[str, Any]
    deadline_s: float
    future: "Future[Any]" = field(default_factory=Future)
    attempts: int = 0


class SandboxPool:
    """Opens when all actors have a sandbox. Ray must run. Any number of threads may submit; close it, or use `with`."""

    def __init__(
        self, workers: int, *, backend: str = "auto", max_queued: int = 1024, deadline_s: float = 600.0, **settings: Any
    ) -> None:
        """workers: actors, one core each. settings: as for open_sandbox. Raises SandboxError without a sandbox."""
        self._backend, self._settings, self._deadline_s = backend, settings, deadline_s
        self._jobs: queue.Queue[_Job | None] = queue.Queue(max_queued)
        self._again: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._metrics = PoolMetrics()
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._is_closed = False
        actors = [self._start_actor() for _ in range(workers)]
        self.actors = dict(enumerate(actors))
        self._threads = [threading.Thread(target=self._serve, args=(index,), daemon=True) for index in self.actors]
        for thread in self._threads:
            thread.start()

    def submit(
        self, function: Callable[..., Any], *args: Any, deadline_s: float | None = None, **named: Any
    ) -> "Future[Any]":
        """Call `function(sandbox, *args, **named)`, such as a judge, in an actor; waits while the queue is full.

        The future raises what the function raises, and SandboxError when the pool failed ATTEMPTS times.
        """
        if self._is_closed:
            raise SandboxClosedError("the pool is closed; open another")
        job = _Job(function, args, named, deadline_s or self._deadline_s)
        self._jobs.put(job)
        return job.future

    def metrics(self) -> PoolMetrics:
        with self._lock:
            elapsed_s = time.monotonic() - self._started
            counts = self._metrics
            rate = counts.executions / elapsed_s
            return PoolMetrics(
                self._jobs.qsize(), counts.executions, rate, counts.timeouts, counts.errors, counts.busy_s
            )

    def _start_actor(self) -> Any:
        actor = ray.remote(num_cpus=1)(SandboxWorker).remote(self._backend, self._settings)
        return actor

    def _serve(self, index: int) -> None:
        while True:
            try:
                job: _Job | None = self._again.get_nowait()
            except queue.Empty:
                job = self._jobs.get()
            if job is None:
                return
            self._execute(index, job)

    def _execute(self, index: int, job: _Job) -> None:
        job.attempts += 1
        started = time.monotonic()
        try:
            actor = self.actors[index]
            result = ray.get(actor.execute.remote(job.function, job.args, job.named), timeout=job.deadline_s)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            self._lose(index, job, error)
            return
        except ray.exceptions.RayTaskError as error:
            job.future.set_exception(error.cause if isinstance(error.cause, Exception) else error)
        except Exception as error:  # Ray itself: the job's owner must hear of it
            job.future.set_exception(SandboxError(f"the pool cannot reach Ray: {error}"))
        else:
            job.future.set_result(result)
        with self._lock:
            self._metrics.executions += 1
            self._metrics.busy_s += time.monotonic() - started

    def _lose(self, index: int, job: _Job, error: Exception) -> None:
        """An actor is gone, or must go since nobody can stop what it does; another is started for it."""
        with self._lock:
            self._metrics.errors += 1
            self._metrics.timeouts += isinstance(error, ray.exceptions.GetTimeoutError)
        ray.kill(self.actors[index])
        self.actors[index] = self._start_actor()
        if job.attempts < ATTEMPTS and not self._is_closed:
            self._again.put(job)
        else:
            job.future.set_exception(SandboxError(f"a job was lost {job.attempts} times: {str(error)[:200]}"))

    def close(self) -> None:
        """Wait for what is queued, then end the actors; calling it again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for actor in self.actors.values():
            try:
                ray.get(actor.close.remote(), timeout=START_TIMEOUT_S)
            except ray.exceptions.RayError:
                continue  # it is gone already
            finally:
                ray.kill(actor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
