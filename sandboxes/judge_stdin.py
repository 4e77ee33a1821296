"""Judging a program by what it prints: each test is a fresh sandbox, and the comparison happens outside of it.

Tests are `{"stdin": str, "expected": str}`. The limits hold for each test. A program that does not compile, or that
exceeds a limit, is not tried on the tests that follow: they are `not_run`. An exit code other than 0 fails a test, even
after the right output.

Lines are compared without white space at their ends, and without empty lines at the end of the text. Where the expected
text has a decimal number (with a point or an exponent), a number that differs in its last digits is equal to it.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal
from typing import Any

from cispo.sandboxes.attempts import END_STATUS, RETRY_PAUSES_S, FailedAttemptsError, run_patiently, unknown_verdict
from cispo.sandboxes.types import ExecResult, ExecStatus, Limits, Sandbox, TestStatus, Verdict, VerdictStatus

REJECTED_EXIT_CODE = 97
# Run by `python -c`: the program is then __main__, with `exit` and `quit`, and `random` repeats from run to run.
LAUNCHER = f"""
import sys
sys.path[0] = ""
sys.argv = ["main.py"]
__file__ = "main.py"
with open("main.py", "rb") as file:
    source = file.read()
try:
    code = compile(source, "main.py", "exec", dont_inherit=True)
except BaseException:
    sys.exit({REJECTED_EXIT_CODE})
if b"random" in source:
    import random
    random.seed(0)
    del random
del file, source
exec(code, globals())
"""
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = Decimal("1e-6"), Decimal("1e-9")
NUMBER = re.compile(r"[+-]?(\d{1,300}(\.\d{0,300})?|\.\d{1,300})([eE][+-]?\d{1,3})?", re.ASCII)
ARITHMETIC = Context(prec=60)
GOES_ON = frozenset({TestStatus.PASSED, TestStatus.WRONG_ANSWER, TestStatus.RUNTIME_ERROR})


def judge_stdin(
    sandbox: Sandbox,
    code: str,
    tests: Sequence[Mapping[str, Any]],
    limits: Limits,
    *,
    pauses_s: Sequence[float] = RETRY_PAUSES_S,
) -> Verdict:
    """Run the program `code` once a test with the test's stdin, and compare its stdout with what is expected.

    A sandbox that fails is tried again after each of the pauses; if it fails to the last the status is sandbox_error.
    Raises ValueError when there is no test, or one of another form.
    """
    _check(tests)
    # A lone surrogate cannot be written to a file; as a question mark in its place it would change the program.
    source = code.encode("utf-8", "surrogatepass")
    argv = [sandbox.capabilities().python, "-s", "-c", LAUNCHER]
    statuses: list[TestStatus] = []
    wall_s = cpu_s = 0.0
    is_rejected = False
    for test in tests:
        try:
            result = run_patiently(
                sandbox, argv, limits, stdin=test["stdin"].encode(), files={"main.py": source}, pauses_s=pauses_s
            )
        except FailedAttemptsError as error:
            return unknown_verdict(error, len(tests))
        wall_s, cpu_s = wall_s + result.wall_s, cpu_s + result.cpu_s
        is_rejected = not statuses and _is_rejected(result)
        if is_rejected:
            break
        statuses.append(_test_status(result, test["expected"]))
        if statuses[-1] not in GOES_ON:
            break
    failed = next((status for status in statuses if status is not TestStatus.PASSED), None)
    statuses += [TestStatus.NOT_RUN] * (len(tests) - len(statuses))
    return Verdict(
        status=VerdictStatus.REJECTED if is_rejected else VerdictStatus(failed.value) if failed else VerdictStatus.OK,
        passed=statuses.count(TestStatus.PASSED),
        total=len(tests),
        tests=tuple(statuses),
        is_well_formed=not is_rejected,
        message="it does not compile" if is_rejected else "",
        wall_s=wall_s,
        cpu_s=cpu_s,
    )


def _check(tests: Sequence[Mapping[str, Any]]) -> None:
    for index, test in enumerate(tests):
        if not isinstance(test.get("stdin"), str) or not isinstance(test.get("expected"), str):
            raise ValueError(f"test {index} must be {{'stdin': str, 'expected': str}}; mend the data set")
    if not tests:
        raise ValueError("there must be at least one test; mend the data set")


def _is_rejected(result: ExecResult) -> bool:
    return result.status is ExecStatus.RUNTIME_ERROR and result.exit_code == REJECTED_EXIT_CODE and not result.stdout


def _test_status(result: ExecResult, expected: str) -> TestStatus:
    if result.status is not ExecStatus.OK:
        return END_STATUS[result.status]
    return TestStatus.PASSED if is_same_output(expected, result.stdout) else TestStatus.WRONG_ANSWER


def is_same_output(expected: str, stdout: bytes) -> bool:
    """Whether all lines agree, and there are as many; bytes that are no UTF-8 are never right."""
    try:
        actual = stdout.decode()
    except UnicodeDecodeError:
        return False
    expected_lines, actual_lines = _lines(expected), _lines(actual)
    return len(expected_lines) == len(actual_lines) and all(map(_is_same_line, expected_lines, actual_lines))


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _is_same_line(expected: str, actual: str) -> bool:
    if expected == actual:
        return True
    wanted, found = expected.split(), actual.split()
    return len(wanted) == len(found) and all(map(_is_same_token, wanted, found))


def _is_same_token(expected: str, actual: str) -> bool:
    """Whole numbers and words must be equal; decimal numbers to six digits."""
    if expected == actual:
        return True
    if not NUMBER.fullmatch(expected) or not NUMBER.fullmatch(actual) or expected.lstrip("+-").isdigit():
        return False
    wanted, found = Decimal(expected), Decimal(actual)
    tolerance = max(ARITHMETIC.multiply(abs(wanted), RELATIVE_TOLERANCE), ABSOLUTE_TOLERANCE)
    return abs(ARITHMETIC.subtract(wanted, found)) <= tolerance
