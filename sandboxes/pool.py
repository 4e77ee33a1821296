"""A pool of Ray actors with a sandbox each, for scripts that judge many programs; a run's reward workers are its own.

One thread an actor hands it one job at a time, so a job's deadline counts from the start of its execution and not from
its place in the queue. The queue is bounded: `submit` waits while it is full. What the sandboxes or the pool get wrong
(an actor killed, a deadline passed, SandboxError, a verdict sandbox_error) is tried again on whichever actor is free
next; what else a job raises or returns is its result. An actor that is lost is replaced. Kills from outside, of the
actor or of what a job had in its sandbox, are counted apart and may be many more than failures.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ray

from cispo.errors import SandboxClosedError, SandboxError, SandboxLostError
from cispo.sandboxes.backends import open_sandbox
from cispo.sandboxes.bounded_queue import BoundedQueue
from cispo.sandboxes.pool_metrics import PoolCounts, PoolMetrics
from cispo.sandboxes.types import Verdict, VerdictStatus

ATTEMPTS = 4
LOST_ATTEMPTS = 16
START_ATTEMPTS = 3
START_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 60.0


class SandboxWorker:
    """The actor: one sandbox with one slot."""

    def open(self, backend: str, settings: dict[str, Any]) -> int:
        """The id of this process."""
        self._sandbox = open_sandbox(backend, workers=1, **settings)
        return os.getpid()

    def execute(self, function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return function(self._sandbox, *args, **named)

    def close(self) -> None:
        self._sandbox.close()


@dataclass
class Job:
    """A call with its future; deadline_s is of one attempt."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    named: dict[str, Any]
    deadline_s: float
    future: "Future[Any]" = field(default_factory=Future)
    failures: int = 0
    losses: int = 0


class SandboxPool:
    """Open when all actors have a sandbox. Ray must run. Any number of threads may submit; close it, or use `with`."""

    def __init__(
        self,
        workers: int,
        *,
        backend: str = "auto",
        cores_per_worker: float = 1.0,
        max_queued: int = 1024,
        deadline_s: float = 600.0,
        **settings: Any,
    ) -> None:
        """workers: actors, each with one program at a time. settings: as for open_sandbox. SandboxError without one.

        `pids` are the processes of the actors, each on its node.
        """
        self._backend, self._settings = backend, settings
        self._cores_per_worker, self._deadline_s = cores_per_worker, deadline_s
        self._jobs: BoundedQueue[Job] = BoundedQueue(max_queued)
        self._metrics = PoolMetrics(self._jobs.__len__)
        self.actors: list[Any] = [self._start_actor() for _ in range(workers)]
        try:
            self.pids = [self._open_actor(actor) for actor in self.actors]
        except BaseException:
            for actor in self.actors:
                ray.kill(actor)
            raise
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._serve, args=(index,), daemon=True, name=f"sandbox-pool-{index}")
            for index in range(workers)
        ]
        self._serving = workers
        self._is_closed = False
        for thread in self._threads:
            thread.start()

    def submit(
        self, function: Callable[..., Any], *args: Any, deadline_s: float | None = None, **named: Any
    ) -> "Future[Any]":
        """Call `function(sandbox, *args, **named)`, such as a judge, in an actor; waits while the queue is full.

        The future raises what the function raises; SandboxError when ATTEMPTS failed, SandboxLostError when
        LOST_ATTEMPTS were killed from outside. SandboxClosedError when the pool is closed.
        """
        job = Job(function, args, named, deadline_s or self._deadline_s)
        if not self._jobs.put(job):
            raise SandboxClosedError("the pool is closed, or all of its actors are lost; open another")
        self._metrics.report()
        return job.future

    def metrics(self) -> PoolCounts:
        return self._metrics.counts()

    def _start_actor(self) -> Any:
        actor: Any = ray.remote(SandboxWorker)
        return actor.options(num_cpus=self._cores_per_worker).remote()

    def _open_actor(self, actor: Any) -> int:
        try:
            return int(ray.get(actor.open.remote(self._backend, self._settings), timeout=START_TIMEOUT_S))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, SandboxError) else error from error
        except ray.exceptions.RayError as error:
            raise SandboxError(f"an actor of the pool does not start: {str(error)[:200]}") from error

    def _serve(self, index: int) -> None:
        reason = "the pool is closed"
        try:
            while (job := self._jobs.get()) is not None:
                if not self._execute(index, job):
                    self._replace(index)
        except SandboxError as error:  # no actor can be started in this one's place
            reason = str(error)
        with self._lock:
            self._serving -= 1
            is_last = not self._serving
        if is_last:
            self._jobs.close()
            for job in self._jobs.take_all():
                job.future.set_exception(SandboxError(f"all actors of the pool are lost: {reason}"))

    def _execute(self, index: int, job: Job) -> bool:
        """Whether the actor can go on."""
        started = time.monotonic()
        try:
            actor = self.actors[index]
            result = ray.get(actor.execute.remote(job.function, job.args, job.named), timeout=job.deadline_s)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, SandboxError):
                self._lose(job, str(cause), is_loss=isinstance(cause, SandboxLostError))
            else:
                job.future.set_exception(cause)
        except ray.exceptions.GetTimeoutError:
            self._lose(job, f"it did not end within {job.deadline_s:g} s", is_timeout=True)
            return False
        except ray.exceptions.RayError as error:
            self._lose(job, str(error), is_loss=True)
            return False
        except Exception as error:  # the job cannot be pickled: its owner must hear of it
            job.future.set_exception(error)
        else:
            is_unknown = isinstance(result, Verdict) and result.status is VerdictStatus.SANDBOX_ERROR
            if is_unknown and job.failures < ATTEMPTS - 1:
                self._lose(job, result.message)
            else:
                self._metrics.add_execution(time.monotonic() - started)
                job.future.set_result(result)
        return True

    def _lose(self, job: Job, reason: str, *, is_timeout: bool = False, is_loss: bool = False) -> None:
        self._metrics.add_error(is_timeout)
        job.losses, job.failures = job.losses + is_loss, job.failures + (not is_loss)
        if job.losses < LOST_ATTEMPTS and job.failures < ATTEMPTS:
            self._jobs.put_back(job)
        else:
            error = SandboxLostError if is_loss else SandboxError
            count = job.losses + job.failures
            job.future.set_exception(error(f"a job was lost {count} times, at last: {reason[:200]}"))

    def _replace(self, index: int) -> None:
        """Nobody can stop what an actor does but by ending it; SandboxError where no other can be started."""
        for attempt in range(START_ATTEMPTS):
            ray.kill(self.actors[index])
            self.actors[index] = self._start_actor()
            try:
                self.pids[index] = self._open_actor(self.actors[index])
                return
            except SandboxError:
                if attempt == START_ATTEMPTS - 1:
                    raise

    def close(self) -> None:
        """Wait for what is queued, then end the actors; calling it again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._jobs.close()
        for thread in self._threads:
            thread.join()
        closing = [actor.close.remote() for actor in self.actors]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for actor in self.actors:
            ray.kill(actor)
        self._metrics.report()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
