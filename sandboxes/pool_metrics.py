"""What a pool of sandboxes does, as counts and as metrics of Ray, which are on the Ray dashboard and for Prometheus."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge

RATE_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Since the pool was opened, but for queued (now) and executions_per_s (over the last ten seconds).

    errors: attempts that were lost with an actor, to a sandbox that failed, or at a deadline. timeouts: the latter.
    busy_s: seconds of all executions together.
    """

    queued: int
    executions: int
    executions_per_s: float
    timeouts: int
    errors: int
    busy_s: float


class PoolMetrics:
    """Many threads may count. Ray calls the metrics ray_cispo_sandbox_queued, _executions_per_s and so on."""

    def __init__(self, queued: Callable[[], int]) -> None:
        self._queued = queued
        self._lock = threading.Lock()
        self._opened = time.monotonic()
        self._ends: deque[float] = deque()
        self._executions = self._timeouts = self._errors = 0
        self._busy_s = 0.0
        self._gauges = {
            "queued": Gauge("cispo_sandbox_queued", "jobs that wait for an actor of the pool"),
            "executions_per_s": Gauge("cispo_sandbox_executions_per_s", "executions a second, over ten seconds"),
        }
        self._counters = {
            "executions": Counter("cispo_sandbox_executions", "jobs that were executed to their end"),
            "timeouts": Counter("cispo_sandbox_timeouts", "attempts that passed their deadline"),
            "errors": Counter("cispo_sandbox_errors", "attempts lost to the sandbox, an actor or a deadline"),
        }

    def add_execution(self, busy_s: float) -> None:
        with self._lock:
            self._executions += 1
            self._busy_s += busy_s
            self._ends.append(time.monotonic())
        self._counters["executions"].inc()
        self.report()

    def add_error(self, is_timeout: bool) -> None:
        with self._lock:
            self._errors += 1
            self._timeouts += is_timeout
        self._counters["errors"].inc()
        if is_timeout:
            self._counters["timeouts"].inc()
        self.report()

    def counts(self) -> PoolCounts:
        with self._lock:
            now = time.monotonic()
            while self._ends and self._ends[0] < now - RATE_WINDOW_S:
                self._ends.popleft()
            rate = len(self._ends) / max(1e-3, min(RATE_WINDOW_S, now - self._opened))
            return PoolCounts(
                self._queued(), self._executions, rate, self._timeouts, self._errors, self._busy_s
            )

    def report(self) -> None:
        """Set the gauges."""
        counts = self.counts()
        self._gauges["queued"].set(counts.queued)
        self._gauges["executions_per_s"].set(counts.executions_per_s)
