"""Judging a program by calling its entry point: one sandbox a program, the verdict computed outside of it.

The program gets arguments and never an expected value; driver.py runs beside it and sends back what it returned. Here
the answers are decoded with care (they are the program's to forge) and compared (compare.py). Forging gains nothing:
whoever writes the answers still has to know them.

Tests are JSON values, `{"args": [...], "expected": value}`. All tests of a program share its limits, in one process,
in order; each call gets fresh arguments. The verdict's status is that of the first test not passed. A test that the
program did not live to answer has the status of the program's end, and those after it are `not_run`.
"""

import json
import marshal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cispo.sandboxes import driver
from cispo.sandboxes.attempts import (
    END_STATUS,
    RETRY_PAUSES_S,
    FailedAttemptsError,
    run_patiently,
    unknown_verdict,
)
from cispo.sandboxes.compare import is_equal
from cispo.sandboxes.types import ExecResult, ExecStatus, Limits, Sandbox, TestStatus, Verdict, VerdictStatus

DRIVER_SOURCE = Path(driver.__file__).read_text(encoding="utf-8")
MAX_NAME_CHARS = 80


def judge_calls(
    sandbox: Sandbox,
    code: str,
    entry_point: str,
    tests: Sequence[Mapping[str, Any]],
    limits: Limits,
    *,
    pauses_s: Sequence[float] = RETRY_PAUSES_S,
) -> Verdict:
    """Call `entry_point` of the program `code` once a test and compare what it returns with what is expected.

    Without tests the verdict says only whether the program is well formed. A sandbox that fails is tried again after
    each of the pauses; if it fails to the last the status is sandbox_error. Raises ValueError when a test is not a JSON
    value of the form above.
    """
    request = _request(code, entry_point, tests)
    argv = [sandbox.capabilities().python, "-S", "-s", "-c", DRIVER_SOURCE]
    try:
        result = run_patiently(sandbox, argv, limits, stdin=request, pauses_s=pauses_s)
    except FailedAttemptsError as error:
        return unknown_verdict(error, len(tests))
    return _verdict(result, [test["expected"] for test in tests])


def _request(code: str, entry_point: str, tests: Sequence[Mapping[str, Any]]) -> bytes:
    for index, test in enumerate(tests):
        if "expected" not in test or not isinstance(test.get("args"), list):
            raise ValueError(f"test {index} must be {{'args': [...], 'expected': value}}; mend the data set")
    try:
        # Version 2 has no references, so that tests which share an object do not share it inside.
        return marshal.dumps((code, entry_point, [(test["args"], {}) for test in tests], False), 2)
    except ValueError as error:
        raise ValueError("a test's args hold something else than JSON values; mend the data set") from error


class Answers:
    """The lines of a program's answers that are what the driver would write, up to the first that is not."""

    def __init__(self, stdout: bytes, total: int) -> None:
        self.loaded: list[Any] | None = None
        self.tests: list[list[Any]] = []
        self.is_malformed = False
        for line in stdout.split(b"\n")[:-1]:  # what follows the last line end was cut short
            is_late = self.loaded is not None and len(self.tests) == total
            if is_late or not self._take(line):
                self.is_malformed = True
                break

    def _take(self, line: bytes) -> bool:
        try:
            frame = json.loads(line.decode("ascii"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return False
        if not isinstance(frame, list) or not frame:
            return False
        if self.loaded is None:
            is_end = len(frame) == 2 and frame[0] in ("rejected", "failed") and _is_name(frame[1])
            self.loaded = frame if is_end or frame == ["loaded"] else None
            return self.loaded is not None
        is_answer = len(frame) == 3 and frame[0] in ("value", "other", "error")
        is_due = is_answer and type(frame[1]) is int and frame[1] == len(self.tests) and self.loaded == ["loaded"]
        if not is_due or (frame[0] != "value" and not _is_name(frame[2])):
            return False
        self.tests.append(frame)
        return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _is_name(text: object) -> bool:
    """Names go to logs and terminals, where control characters would be orders."""
    return isinstance(text, str) and len(text) <= MAX_NAME_CHARS and text.isascii() and text.isprintable()


def _verdict(result: ExecResult, expected: Sequence[Any]) -> Verdict:
    answers = Answers(result.stdout, len(expected))
    is_well_formed = answers.loaded == ["loaded"]
    total = len(expected)
    tests = [_test_status(answer, value) for answer, value in zip(answers.tests, expected, strict=False)]
    flags = ("malformed_frames",) if answers.is_malformed else ()
    status, message = VerdictStatus.OK, ""
    if is_well_formed:
        if len(tests) < total:
            tests.append(END_STATUS[result.status])
        elif tests and result.status is ExecStatus.TIMEOUT and tests[-1] is TestStatus.PASSED:
            tests[-1] = TestStatus.TIMEOUT  # its last answer came before anybody could stop it
        first_failed = next((test for test in tests if test is not TestStatus.PASSED), None)
        status = VerdictStatus.OK if first_failed is None else VerdictStatus(first_failed.value)
        message = _message(answers, tests)
    else:
        status, message = unloaded_status(answers, result)
    tests += [TestStatus.NOT_RUN] * (total - len(tests))
    return Verdict(
        status=status,
        passed=tests.count(TestStatus.PASSED),
        total=total,
        tests=tuple(tests),
        flags=flags,
        is_well_formed=is_well_formed,
        message=message,
        wall_s=result.wall_s,
        cpu_s=result.cpu_s,
    )


def unloaded_status(answers: Answers, result: ExecResult) -> tuple[VerdictStatus, str]:
    """Status and message of a program that did not come to define its entry point."""
    loaded = answers.loaded or []
    error_type = str(loaded[1]) if len(loaded) == 2 else ""
    if loaded[:1] == ["rejected"]:
        return VerdictStatus.REJECTED, error_type
    end = _error_status(error_type) if result.status is ExecStatus.OK else END_STATUS[result.status]
    return VerdictStatus(end.value), error_type


def _error_status(error_type: str) -> TestStatus:
    """The limit that an error told of by driver.py stands for, if any."""
    if error_type == "MemoryError":
        return TestStatus.MEMORY_LIMIT
    refused = {" no space": TestStatus.DISK_LIMIT, " no process": TestStatus.PROCESS_LIMIT}
    return refused.get(error_type.partition(":")[2], TestStatus.RUNTIME_ERROR)


def _test_status(answer: list[Any], expected: Any) -> TestStatus:
    kind, _, content = answer
    if kind == "error":
        return _error_status(content)
    is_right = kind == "value" and is_equal(expected, content)
    return TestStatus.PASSED if is_right else TestStatus.WRONG_ANSWER


def _message(answers: Answers, tests: Sequence[TestStatus]) -> str:
    """The type of the error, or of the value that is none of JSON's, at the first test not passed."""
    for answer, test in zip(answers.tests, tests, strict=False):
        if test is not TestStatus.PASSED:
            return "" if answer[0] == "value" else str(answer[2])
    return ""
