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
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cispo.errors import SandboxClosedError, SandboxError
from cispo.sandboxes import driver
from cispo.sandboxes.compare import is_equal
from cispo.sandboxes.types import ExecResult, ExecStatus, Limits, Sandbox, TestStatus, Verdict, VerdictStatus

DRIVER_SOURCE = Path(driver.__file__).read_text(encoding="utf-8")
MAX_NAME_CHARS = 80
# Pauses before the attempts after the first. A machine short of processes or memory has them again within seconds.
RETRY_PAUSES_S = (0.05, 0.2, 1.0, 3.0, 8.0)
# For a sandbox that has just failed at all of those: each program of a step would wait for nothing.
IMPATIENT_PAUSES_S = (0.2,)
# Attempts begin no later than this; one that waits for a core in vain is slow by itself.
RETRY_TIME_S = 120.0
# Signals by which processes end each other, as exit codes: a program does not come by them through its own mistakes.
KILLED_EXIT_CODES = frozenset(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM))
KILLED_RUNS = 3

# How the end of the whole program reads as the status of the test that was running.
_END_STATUS = {
    ExecStatus.OK: TestStatus.RUNTIME_ERROR,
    ExecStatus.RUNTIME_ERROR: TestStatus.RUNTIME_ERROR,
    ExecStatus.TIMEOUT: TestStatus.TIMEOUT,
    ExecStatus.MEMORY_LIMIT: TestStatus.MEMORY_LIMIT,
    ExecStatus.OUTPUT_LIMIT: TestStatus.OUTPUT_LIMIT,
}


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
    started, attempts, message = time.monotonic(), 0, ""
    for pause_s in (0.0, *pauses_s):
        if time.monotonic() - started + pause_s > RETRY_TIME_S:
            break
        time.sleep(pause_s)
        attempts += 1
        try:
            result = _run(sandbox, argv, request, limits)
        except SandboxError as error:
            message = str(error)
            if isinstance(error, SandboxClosedError):
                break
            continue
        return _verdict(result, [test["expected"] for test in tests])
    return Verdict(
        status=VerdictStatus.SANDBOX_ERROR,
        passed=0,
        total=len(tests),
        tests=(TestStatus.NOT_RUN,) * len(tests),
        message=f"the sandbox failed (attempts: {attempts}, in {time.monotonic() - started:.0f} s): {message}",
    )


def _run(sandbox: Sandbox, argv: Sequence[str], request: bytes, limits: Limits) -> ExecResult:
    """Run a program; one that was killed though it met no limit is run again, since the shot may have been a stray one.

    The kernel kills for others' want of memory, and who kills by a process number may hit whoever has it by then; on a
    busy machine numbers come round within seconds. Who kills itself does so every time, and that is then its result.
    """
    for _ in range(KILLED_RUNS - 1):
        result = sandbox.run(argv, stdin=request, limits=limits)
        if result.status is not ExecStatus.RUNTIME_ERROR or result.exit_code not in KILLED_EXIT_CODES:
            return result
    return sandbox.run(argv, stdin=request, limits=limits)


def _request(code: str, entry_point: str, tests: Sequence[Mapping[str, Any]]) -> bytes:
    for index, test in enumerate(tests):
        if "expected" not in test or not isinstance(test.get("args"), list):
            raise ValueError(f"test {index} must be {{'args': [...], 'expected': value}}; mend the data set")
    try:
        # Version 2 has no references, so that tests which share an object do not share it inside.
        return marshal.dumps((code, entry_point, [test["args"] for test in tests]), 2)
    except ValueError as error:
        raise ValueError("a test's args hold something else than JSON values; mend the data set") from error


class _Answers:
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
    answers = _Answers(result.stdout, len(expected))
    loaded = answers.loaded or []
    is_well_formed = loaded == ["loaded"]
    total = len(expected)
    tests = [_test_status(answer, value) for answer, value in zip(answers.tests, expected, strict=False)]
    flags = ("malformed_frames",) if answers.is_malformed else ()
    status, message = VerdictStatus.OK, ""
    if is_well_formed:
        if len(tests) < total:
            tests.append(_END_STATUS[result.status])
        elif tests and result.status is ExecStatus.TIMEOUT and tests[-1] is TestStatus.PASSED:
            tests[-1] = TestStatus.TIMEOUT  # its last answer came before anybody could stop it
        first_failed = next((test for test in tests if test is not TestStatus.PASSED), None)
        status = VerdictStatus.OK if first_failed is None else VerdictStatus(first_failed.value)
        message = _message(answers, tests)
    elif loaded[:1] == ["rejected"]:
        status, message = VerdictStatus.REJECTED, str(loaded[1])
    else:
        error_type = str(loaded[1]) if len(loaded) == 2 else ""
        end = TestStatus.MEMORY_LIMIT if error_type == "MemoryError" else _END_STATUS[result.status]
        status, message = VerdictStatus(end.value), error_type
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


def _test_status(answer: list[Any], expected: Any) -> TestStatus:
    kind, _, content = answer
    if kind == "error":
        return TestStatus.MEMORY_LIMIT if content == "MemoryError" else TestStatus.RUNTIME_ERROR
    is_right = kind == "value" and is_equal(expected, content)
    return TestStatus.PASSED if is_right else TestStatus.WRONG_ANSWER


def _message(answers: _Answers, tests: Sequence[TestStatus]) -> str:
    """The type of the error, or of the value that is none of JSON's, at the first test not passed."""
    for answer, test in zip(answers.tests, tests, strict=False):
        if test is not TestStatus.PASSED:
            return "" if answer[0] == "value" else str(answer[2])
    return ""
