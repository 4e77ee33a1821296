"""Judging a program by test source with assertions, as HumanEval's `check(candidate)` and MBPP's asserts are.

The test source is trusted and runs in a sandbox of its own (grader.py); the program runs in another, beside driver.py.
They meet in rounds through the judge: the grader asks for calls, the driver makes them, the grader runs again with the
answers. The program never sees an expected value, and of what it returns only plain values reach the assertions: an
object that is equal to everything is none. Whoever forges answers must still know them.

Both start afresh in every round, and the program makes all calls so far again, in order. The test source may call the
program under its name or as `candidate`; helpers that it needs must stand in it, since the program's own may lie.
"""

import json
import marshal
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cispo.sandboxes import grader
from cispo.sandboxes.attempts import END_STATUS, RETRY_PAUSES_S, FailedAttemptsError, run_patiently, unknown_verdict
from cispo.sandboxes.judge_calls import DRIVER_SOURCE, Answers, unloaded_status
from cispo.sandboxes.types import ExecResult, ExecStatus, Limits, Sandbox, TestStatus, Verdict, VerdictStatus

GRADER_SOURCE = Path(grader.__file__).read_text(encoding="utf-8")
MAX_ROUNDS = 64
# The program's CPU seconds over all rounds, in times of its limit.
ROUNDS_CPU_FACTOR = 10
# The calls that test sources ask for first, which do not depend on the program: many are judged by the same tests.
FIRST_CALLS: OrderedDict[tuple[str, str], list[tuple[int, bytes]]] = OrderedDict()
FIRST_CALLS_LOCK = threading.Lock()
MAX_FIRST_CALLS = 256
MAX_FIRST_CALL_BYTES = 1 << 16


@dataclass
class _Match:
    """What is known so far: calls with their answers, in order."""

    calls: list[bytes] = field(default_factory=list)
    answers: list[list[Any]] = field(default_factory=list)
    is_well_formed: bool = False
    flags: tuple[str, ...] = ()
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def verdict(self, status: VerdictStatus, message: str = "") -> Verdict:
        is_ok = status is VerdictStatus.OK
        was_run = status not in (VerdictStatus.REJECTED, VerdictStatus.SANDBOX_ERROR)
        test = TestStatus(status.value) if was_run and not is_ok else TestStatus.NOT_RUN
        return Verdict(
            status=status,
            passed=int(is_ok),
            total=1,
            tests=(TestStatus.PASSED if is_ok else test,),
            flags=self.flags,
            is_well_formed=self.is_well_formed,
            message=message,
            wall_s=self.wall_s,
            cpu_s=self.cpu_s,
        )


def judge_asserts(
    sandbox: Sandbox,
    code: str,
    test_source: str,
    entry_point: str,
    limits: Limits,
    *,
    pauses_s: Sequence[float] = RETRY_PAUSES_S,
) -> Verdict:
    """Run `test_source` (and its function `check`, if it has one) against the function `entry_point` of `code`.

    There is one test: it passes when nothing is raised. The limits hold for every run of either side. Answers may hold
    what Python literals can. A sandbox that fails is tried again after each of the pauses; if it fails to the last, or
    when the tests pass something to the program that is no literal, the status is sandbox_error. Raises ValueError when
    the test source fails, or ends, without a call.
    """
    match = _Match()
    try:
        for _ in range(MAX_ROUNDS):
            kept = None if match.calls else _first_calls(test_source, entry_point)
            graded = kept or _grade(sandbox, test_source, entry_point, match, limits, pauses_s)
            if isinstance(graded, Verdict):
                return graded
            verdict = _answer(sandbox, code, entry_point, match, graded, limits, pauses_s)
            if verdict is not None:
                return verdict
            if match.cpu_s > ROUNDS_CPU_FACTOR * limits.cpu_s:
                return match.verdict(VerdictStatus.TIMEOUT, "all rounds together took too long")
    except FailedAttemptsError as error:
        return unknown_verdict(error, 1)
    return match.verdict(VerdictStatus.TIMEOUT, f"the tests were not done after {MAX_ROUNDS} rounds of calls")


def _grade(
    sandbox: Sandbox, source: str, entry_point: str, match: _Match, limits: Limits, pauses_s: Sequence[float]
) -> Verdict | list[tuple[int, bytes]]:
    """One run of the tests: a verdict, or the calls to make with their places."""
    try:
        known = list(zip(match.calls, match.answers, strict=True))
        request = marshal.dumps((source, entry_point, known), 2)
    except ValueError:  # too deep: no driver wrote that
        return match.verdict(VerdictStatus.WRONG_ANSWER)
    argv = [sandbox.capabilities().python, "-S", "-s", "-c", GRADER_SOURCE]
    result = run_patiently(sandbox, argv, limits, stdin=request, pauses_s=pauses_s)
    frames = [json.loads(line) for line in result.stdout.split(b"\n")[:-1]]
    asked = [(frame[1], bytes.fromhex(frame[2])) for frame in frames if frame[0] == "ask"]
    if asked:
        if not match.calls:
            _keep_first_calls(source, entry_point, asked)
        return asked
    last = frames[-1] if frames else ["none"]
    if last[0] == "unsupported":
        return match.verdict(VerdictStatus.SANDBOX_ERROR, "the tests call with an argument that is no plain value")
    if last[0] in ("passed", "failed") and last[-1] == 0:
        how = "pass" if last[0] == "passed" else f"fail by {last[1]}"
        raise ValueError(f"the test source does not call {entry_point}: its tests {how} without; mend the data set")
    if last[0] == "passed" and result.status is ExecStatus.OK:
        return match.verdict(VerdictStatus.OK)
    if last[0] == "failed":
        return match.verdict(_failure(last[1], match), "" if last[1] == "AssertionError" else str(last[1])[:80])
    return match.verdict(VerdictStatus(END_STATUS[result.status].value))


def _first_calls(source: str, entry_point: str) -> list[tuple[int, bytes]] | None:
    with FIRST_CALLS_LOCK:
        if (source, entry_point) not in FIRST_CALLS:
            return None
        FIRST_CALLS.move_to_end((source, entry_point))
        return FIRST_CALLS[source, entry_point]


def _keep_first_calls(source: str, entry_point: str, asked: list[tuple[int, bytes]]) -> None:
    """Tests that would ask for others the next time ask again: the grader checks each call that it is answered."""
    if len(source) + sum(len(call) for _, call in asked) > MAX_FIRST_CALL_BYTES:
        return
    with FIRST_CALLS_LOCK:
        FIRST_CALLS[source, entry_point] = asked
        if len(FIRST_CALLS) > MAX_FIRST_CALLS:
            FIRST_CALLS.popitem(last=False)


def _failure(error_type: str, match: _Match) -> VerdictStatus:
    """An error that the program raised and no test caught is its own; any other way to fail is a wrong answer."""
    raised = {content for kind, content in match.answers if kind == "error"}
    return VerdictStatus.RUNTIME_ERROR if error_type in raised | {"RuntimeError"} else VerdictStatus.WRONG_ANSWER


def _answer(
    sandbox: Sandbox,
    code: str,
    entry_point: str,
    match: _Match,
    asked: Sequence[tuple[int, bytes]],
    limits: Limits,
    pauses_s: Sequence[float],
) -> Verdict | None:
    """One run of the program with all calls, which adds at least one answer; else the verdict that it earned."""
    first = asked[0][0]
    calls = match.calls[:first] + [call for _, call in asked]
    request = marshal.dumps((code, entry_point, [marshal.loads(call) for call in calls], True), 2)
    argv = [sandbox.capabilities().python, "-S", "-s", "-c", DRIVER_SOURCE]
    result = run_patiently(sandbox, argv, limits, stdin=request, pauses_s=pauses_s)
    answers = Answers(result.stdout, len(calls))
    match.wall_s, match.cpu_s = match.wall_s + result.wall_s, match.cpu_s + result.cpu_s
    match.is_well_formed = answers.loaded == ["loaded"]
    match.flags = ("malformed_frames",) if answers.is_malformed else match.flags
    if not match.is_well_formed:
        return match.verdict(*unloaded_status(answers, result))
    new = [[kind, content] for kind, _, content in _in_time(answers.tests, len(calls), result)[first:]]
    if not new:
        return match.verdict(VerdictStatus(END_STATUS[result.status].value))
    match.answers = match.answers[:first] + new
    match.calls = calls[: first + len(new)]
    return None


def _in_time(answers: list[list[Any]], total: int, result: ExecResult) -> list[list[Any]]:
    """Without the last, where that one came after the time was over but before anybody could stop the program."""
    is_late = result.status is ExecStatus.TIMEOUT and len(answers) == total
    return answers[:-1] if is_late else answers
