"""Verdicts by program and tests: a policy writes the same program often, and one execution is enough."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from cispo.sandboxes.types import Limits, Verdict, VerdictStatus


def verdict_key(code: str, entry_point: str, tests: Sequence[Mapping[str, Any]], limits: Limits) -> bytes:
    """SHA-256 over all that decides a verdict."""
    text = json.dumps([code, entry_point, list(map(dict, tests)), asdict(limits)])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class VerdictCache:
    """At most `capacity` verdicts, the least recently used leaving first. May be used by many threads.

    Two threads that ask for one program at a time cause one execution: the second waits, and counts as a hit. A
    sandbox_error is handed to those who wait but not kept, so that the next asks again.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1, got {capacity}")
        self._capacity = capacity
        self._verdicts: OrderedDict[bytes, Future[Verdict]] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def get_or_judge(self, key: bytes, judge: Callable[[], Verdict]) -> Verdict:
        """The verdict of `key`, by calling `judge` where it is not known; what `judge` raises, all who wait get."""
        with self._lock:
            found = self._verdicts.get(key)
            if found is not None:
                self.hits += 1
                self._verdicts.move_to_end(key)
            else:
                self.misses += 1
                mine = self._verdicts[key] = Future()
                if len(self._verdicts) > self._capacity:
                    self._verdicts.popitem(last=False)
        return found.result() if found is not None else self._judge(key, mine, judge)

    def _judge(self, key: bytes, mine: Future[Verdict], judge: Callable[[], Verdict]) -> Verdict:
        try:
            verdict = judge()
        except BaseException as error:
            self._forget(key, mine)
            mine.set_exception(error)
            raise
        if verdict.status is VerdictStatus.SANDBOX_ERROR:
            self._forget(key, mine)
        mine.set_result(verdict)
        return verdict

    def _forget(self, key: bytes, mine: Future[Verdict]) -> None:
        with self._lock:
            if self._verdicts.get(key) is mine:
                del self._verdicts[key]

    def __len__(self) -> int:
        return len(self._verdicts)
