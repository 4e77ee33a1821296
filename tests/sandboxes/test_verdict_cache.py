"""Verdicts are remembered by all that decides them, in bounded memory, once for many threads."""

import threading
from typing import Any

import pytest

from cispo.sandboxes import Limits, Verdict, VerdictStatus
from cispo.sandboxes.verdict_cache import VerdictCache, verdict_key

OK = Verdict(VerdictStatus.OK, 1, 1)
TESTS = [{"args": [1], "expected": 1}]


def key(code: str = "x", entry_point: str = "f", tests: Any = TESTS, limits: Limits = Limits()) -> bytes:  # noqa: B008
    return verdict_key(code, entry_point, tests, limits)


def test_the_key_holds_all_that_decides_a_verdict() -> None:
    others = [
        key(code="y"),
        key(entry_point="g"),
        key(tests=[{"args": [1], "expected": 2}]),
        key(tests=[{"args": [1], "expected": True}]),
        key(tests=[{"args": [1], "expected": 1.0}]),
        key(tests=[]),
        key(limits=Limits(cpu_s=1.0)),
        key(code="\ud800"),
    ]
    assert len({key(), *others}) == len(others) + 1
    assert key() == key(tests=[{"args": [1], "expected": 1}])


def test_a_verdict_is_asked_for_once() -> None:
    cache = VerdictCache()
    asked = []
    for _ in range(3):
        assert cache.get_or_judge(key(), lambda: asked.append(1) or OK) is OK  # type: ignore[func-returns-value]
    assert (len(asked), cache.misses, cache.hits) == (1, 1, 2)


def test_the_least_recently_used_leaves_first() -> None:
    cache = VerdictCache(capacity=2)
    for name in ("a", "b", "a", "c", "a"):
        cache.get_or_judge(name.encode(), lambda: OK)
    assert (len(cache), cache.misses, cache.hits) == (2, 3, 2)
    cache.get_or_judge(b"b", lambda: OK)
    assert cache.misses == 4


def test_a_sandbox_error_is_not_kept() -> None:
    cache = VerdictCache()
    failed = Verdict(VerdictStatus.SANDBOX_ERROR, 0, 1)
    assert cache.get_or_judge(key(), lambda: failed) is failed
    assert cache.get_or_judge(key(), lambda: OK) is OK


def test_an_exception_is_not_kept() -> None:
    cache = VerdictCache()
    with pytest.raises(ZeroDivisionError):
        cache.get_or_judge(key(), lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    assert cache.get_or_judge(key(), lambda: OK) is OK


def test_threads_that_ask_at_a_time_cause_one_execution() -> None:
    cache = VerdictCache()
    release, asked, got = threading.Event(), [], []

    def judge() -> Verdict:
        asked.append(1)
        release.wait(20.0)
        return OK

    threads = [threading.Thread(target=lambda: got.append(cache.get_or_judge(key(), judge))) for _ in range(5)]
    for thread in threads:
        thread.start()
    while cache.hits < 4:
        pass
    release.set()
    for thread in threads:
        thread.join()
    assert (len(asked), got) == (1, [OK] * 5)


def test_capacity_must_be_positive() -> None:
    with pytest.raises(ValueError, match="capacity"):
        VerdictCache(0)
