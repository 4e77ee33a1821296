"""What scoring costs, and how its verdicts fall.

Two kinds, because a step's metrics must repeat bit for bit: shares of verdicts follow from the scores of the step alone
(`verdict_shares`); counts of what a reward set did also depend on what it remembers and on the clock, so they are
under perf/ and time_s/ (`Counters`), and add up over reward workers.
"""

import threading
from collections import Counter
from collections.abc import Iterable

from cispo.sandboxes.types import Verdict, VerdictStatus
from cispo.types import Score


def verdict_shares(scores: Iterable[Score]) -> dict[str, float]:
    """Shares of verdicts, by metric name: sandbox/frac_timeout, sandbox/frac_error. Empty without verdicts."""
    verdicts = Counter(score.info["verdict"] for score in scores if "verdict" in score.info)
    if not verdicts:
        return {}
    return {
        "sandbox/frac_timeout": verdicts[VerdictStatus.TIMEOUT.value] / verdicts.total(),
        "sandbox/frac_error": verdicts[VerdictStatus.SANDBOX_ERROR.value] / verdicts.total(),
    }


class Counters:
    """Counts that many threads add to and one takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._verdicts = 0
        self._executions = 0
        self._exec_s = 0.0

    def count_verdict(self) -> None:
        with self._lock:
            self._verdicts += 1

    def count_execution(self, verdict: Verdict) -> None:
        with self._lock:
            self._executions += 1
            self._exec_s += verdict.wall_s

    def take(self) -> dict[str, float]:
        """The counts since the last call, by metric name; empty when nothing was judged."""
        with self._lock:
            verdicts, executions, exec_s = self._verdicts, self._executions, self._exec_s
            self._verdicts, self._executions, self._exec_s = 0, 0, 0.0
        if not verdicts:
            return {}
        return {
            "perf/sandbox_executions": float(executions),
            "perf/sandbox_cache_hits": float(verdicts - executions),
            "time_s/sandbox": exec_s,
        }
