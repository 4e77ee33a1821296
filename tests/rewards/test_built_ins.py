"""The built-in rewards as plain functions, with a judge that answers what the test wants."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.errors import RewardError
from cispo.rewards.code import code, format_reward
from cispo.rewards.length import length
from cispo.sandboxes import Verdict, VerdictStatus
from cispo.types import ScoreStatus

TESTS = [{"args": [1], "expected": 1}, {"args": [2], "expected": 2}]


class ScriptedJudge:
    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.asked: list[tuple[str, str, list[Mapping[str, Any]]]] = []

    def __call__(self, code: str, entry_point: str, tests: Sequence[Mapping[str, Any]]) -> Verdict:
        self.asked.append((code, entry_point, list(tests)))
        return self.verdict


def judge_of(status: VerdictStatus, passed: int = 0, *, is_well_formed: bool = True) -> ScriptedJudge:
    return ScriptedJudge(Verdict(status, passed, 2, is_well_formed=is_well_formed, message="SomeError"))


def test_code_is_1_only_when_every_test_passes() -> None:
    judge = judge_of(VerdictStatus.OK, 2)
    score = code("", "```python\nx\n```", entry_point="f", tests=TESTS, judge=judge)
    assert (score.value, score.parts) == (1.0, {"correct": 1.0, "well_formed": 1.0})
    assert judge.asked == [("x\n", "f", TESTS)]
    score = code("", "x", entry_point="f", tests=TESTS, judge=judge_of(VerdictStatus.WRONG_ANSWER, 1))
    assert (score.value, score.parts) == (0.0, {"correct": 0.0, "well_formed": 1.0})


def test_code_gives_the_share_on_request() -> None:
    score = code("", "x", entry_point="f", tests=TESTS, judge=judge_of(VerdictStatus.TIMEOUT, 1), partial=True)
    assert (score.value, score.parts["correct"]) == (0.5, 0.0)


def test_info_holds_the_verdict_and_no_test() -> None:
    secret = [{"args": ["ARGUMENT"], "expected": "EXPECTED"}]
    score = code("", "x", entry_point="f", tests=secret, judge=judge_of(VerdictStatus.RUNTIME_ERROR))
    assert score.info == {"verdict": "runtime_error", "passed": 0, "total": 2, "message": "SomeError"}


def test_a_failed_sandbox_is_an_error_and_never_0() -> None:
    for reward in (code, format_reward):
        options = {"is_truncated": False} if reward is format_reward else {}
        judge = judge_of(VerdictStatus.SANDBOX_ERROR, is_well_formed=False)
        score = reward("", "x", entry_point="f", tests=TESTS, judge=judge, **options)
        assert (score.status, score.message) == (ScoreStatus.ERROR, "SomeError")
        assert score.info == {"verdict": "sandbox_error"}


def test_tests_may_be_json_text() -> None:
    judge = judge_of(VerdictStatus.OK, 2)
    code("", "x", entry_point="f", tests=json.dumps(TESTS), judge=judge)
    assert judge.asked[0][2] == TESTS


@pytest.mark.parametrize("tests", [[], None, "[", "[]", "3", [1], {"args": []}])
def test_tests_of_another_form_are_a_mistake(tests: object) -> None:
    with pytest.raises(RewardError, match="the column tests"):
        code("", "x", entry_point="f", tests=tests, judge=judge_of(VerdictStatus.OK))


@pytest.mark.parametrize(
    ("is_truncated", "is_well_formed", "value"), [(False, True, 1.0), (True, True, 0.0), (False, False, 0.0)]
)
def test_format_wants_an_end_and_an_entry_point(is_truncated: bool, is_well_formed: bool, value: float) -> None:
    judge = judge_of(VerdictStatus.WRONG_ANSWER, is_well_formed=is_well_formed)
    score = format_reward("", "x", entry_point="f", is_truncated=is_truncated, judge=judge)
    assert score.value == value
    assert judge.asked == [("x", "f", [])]


def test_format_and_code_ask_for_one_verdict() -> None:
    judge = judge_of(VerdictStatus.OK, 2)
    code("", "x", entry_point="f", tests=TESTS, judge=judge)
    format_reward("", "x", entry_point="f", tests=TESTS, is_truncated=False, judge=judge)
    assert judge.asked[0] == judge.asked[1]


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(1, 0.0), (60, 0.0), (61, -0.025), (80, -0.5), (100, -1.0), (101, -1.0), (1000, -1.0)]
)
def test_length_follows_equation_13(tokens: int, penalty: float) -> None:
    found = length("", "", completion_length_tokens=tokens, max_completion_tokens=100, cache_tokens=40)
    assert found == pytest.approx(penalty)


def test_length_takes_a_limit_of_its_own() -> None:
    found = length("", "", completion_length_tokens=15, max_completion_tokens=100, cache_tokens=10, max_tokens=20)
    assert found == -0.5


@given(st.integers(1, 500), st.integers(1, 200), st.integers(0, 200))
def test_length_falls_and_stays_in_its_range(tokens: int, cache: int, more: int) -> None:
    def penalty(count: int) -> float:
        return length("", "", completion_length_tokens=count, max_completion_tokens=cache + more, cache_tokens=cache)

    assert -1.0 <= penalty(tokens + 1) <= penalty(tokens) <= 0.0


def test_length_refuses_a_slope_wider_than_the_limit() -> None:
    with pytest.raises(ValueError, match="cache_tokens"):
        length("", "", completion_length_tokens=1, max_completion_tokens=10, cache_tokens=11)
