"""Programs judged by their output: what counts as equal, and what no program gets away with."""

import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.sandboxes import Limits, Sandbox, VerdictStatus
from cispo.sandboxes.judge import judge_stdin
from cispo.sandboxes.judge_stdin import is_same_output
from cispo.sandboxes.types import TestStatus

LIMITS = Limits(wall_s=20.0, cpu_s=1.0, memory_mib=96, pids=16, output_kib=64, files_mib=8)
SUMS = [{"stdin": "1 2\n", "expected": "3\n"}, {"stdin": "-4 4", "expected": "0"}, {"stdin": "5 5", "expected": "10"}]
SECRETS = [{"stdin": f"{n}\n", "expected": f"nobody guesses {n * 7919 % 1009}\n"} for n in range(3)]


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ("3\n", "3"), ("3", "3 \r\n\n\n"), ("a  b", "a b"), ("0.5", "0.50000001"), ("1e3", "1000"), ("", "\n"),
        ("0.333333", "0.3333333333"), ("-0.0", "0.0"), ("x 1.5 y", "x 1.4999999 y"),
    ],
)  # fmt: skip
def test_equal_output(expected: str, actual: str) -> None:
    assert is_same_output(expected, actual.encode())


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ("1\n2\n3", "1"), ("1", "1\n2"), ("1\n2", "1 2"), ("3", "3.0"), ("10", "10.0000001"), ("0.5", "nan"),
        ("nan", "NaN"), ("1.5", "inf"), ("0.5", "0.6"), ("Yes", "yes"), ("", "0"), ("0", ""), ("a", "\na"),
        ("1.0", "1_0e-1"), ("1.0", "\u0661.0"), ("1.5", "1.5" + "0" * 400), ("1e10", "1e9999999999"),
        ("0.0000001", "0.0"), ("12", "1 2"),
    ],
)  # fmt: skip
def test_different_output(expected: str, actual: str) -> None:
    assert not is_same_output(expected, actual.encode())


@given(st.text(), st.binary(max_size=40))
def test_no_output_makes_the_comparison_fail(expected: str, stdout: bytes) -> None:
    assert is_same_output(expected, stdout) in (True, False)


HONEST = {
    "reads input": "a, b = map(int, input().split())\nprint(a + b)",
    "reads all": "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
    "main guard": "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    "exits with 0": "import sys\nprint(sum(map(int, input().split())))\nsys.exit(0)",
    "quits": "print(sum(map(int, input().split())))\nexit()",
    "writes bytes": "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, input().split())))",
    "warns on stderr": "import sys\nprint(sum(map(int, input().split())))\nprint('done', file=sys.stderr)",
    "uses a thread": (
        "import threading\ndef go():\n    print(sum(map(int, input().split())))\n"
        "t = threading.Thread(target=go)\nt.start()\nt.join()"
    ),
    "recurses": "import sys\nsys.setrecursionlimit(5000)\ndef f(n): return n and f(n - 1)\nf(3000)\n"
    "print(sum(map(int, input().split())))",
    "uses a file": "open('x', 'w').write(input())\nprint(sum(map(int, open('x').read().split())))",
    "windows line ends": "print(sum(map(int, input().split())))\r\n",
    "a class that is equal to all": (
        "class A:\n    def __eq__(self, o): return True\nprint(sum(map(int, input().split())))"
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(sandbox: Sandbox, name: str) -> None:
    verdict = judge_stdin(sandbox, HONEST[name], SUMS, LIMITS)
    assert (verdict.status, verdict.passed, verdict.total) == (VerdictStatus.OK, 3, 3), verdict
    assert verdict.is_well_formed


def test_a_wrong_program_is_told_test_by_test(sandbox: Sandbox) -> None:
    source = "a, b = map(int, input().split())\nif a < 0: raise ValueError\nprint(a + b if a == 1 else a * b)"
    verdict = judge_stdin(sandbox, source, SUMS, LIMITS)
    assert verdict.tests == (TestStatus.PASSED, TestStatus.RUNTIME_ERROR, TestStatus.WRONG_ANSWER)
    assert (verdict.status, verdict.passed) == (VerdictStatus.RUNTIME_ERROR, 1)


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("print(", VerdictStatus.REJECTED),
        ("x = '\ud800'", VerdictStatus.REJECTED),
        ("x = '\0'", VerdictStatus.REJECTED),
        ("(" * 5000, VerdictStatus.REJECTED),
        ("1 / 0", VerdictStatus.RUNTIME_ERROR),
        ("print(3); raise SystemExit(1)", VerdictStatus.RUNTIME_ERROR),
        ("import os; print(3, flush=True); os.kill(os.getpid(), 9)", VerdictStatus.RUNTIME_ERROR),
        ("", VerdictStatus.WRONG_ANSWER),
        ("import os; os._exit(0)", VerdictStatus.WRONG_ANSWER),
        ("while True: pass", VerdictStatus.TIMEOUT),
        ("import time; time.sleep(600)", VerdictStatus.TIMEOUT),
        ("while True: print('3' * 1000)", VerdictStatus.OUTPUT_LIMIT),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", VerdictStatus.TIMEOUT),
        ("print(3)\nprint(3)", VerdictStatus.WRONG_ANSWER),
        ("print('3\\x00')", VerdictStatus.WRONG_ANSWER),
        ("import sys; sys.stdout.buffer.write(b'3\\xff')", VerdictStatus.WRONG_ANSWER),
    ],
)
def test_how_a_program_ends_is_the_verdict(sandbox: Sandbox, source: str, status: VerdictStatus) -> None:
    limits = Limits(wall_s=2.0, cpu_s=0.5, memory_mib=96, pids=16, output_kib=64, files_mib=8)
    verdict = judge_stdin(sandbox, source, SUMS, limits)
    assert verdict.status is status and verdict.passed == 0
    assert verdict.is_well_formed == (status is not VerdictStatus.REJECTED)
    assert len(verdict.tests) == 3


ATTACKS = {
    "prints every line it can find": """
        import glob, os
        for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline") + glob.glob("/task/*"):
            try:
                data = open(path, "rb").read()
            except OSError:
                continue
            if b"guesses" in data:
                print(data.decode(errors="replace"))
    """,
    "forges a verdict": """
        import json, os
        for fd in range(1, 64):
            try:
                os.write(fd, b'{"status": "ok", "passed": 3}\\n["value", 0, 1]\\nPASSED\\n')
            except OSError:
                pass
    """,
    "remembers the last test": """
        import os
        for folder in ("/task", "/tmp", "/dev/shm", "/var/tmp"):
            try:
                print(open(folder + "/seen").read())
            except OSError:
                pass
            try:
                open(folder + "/seen", "w").write(input())
            except (OSError, EOFError):
                pass
    """,
    "leaves a daemon that answers later": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1)
                print("nobody guesses 0")
            os._exit(0)
    """,
    "prints an object equal to all": """
        class Same(str):
            def __eq__(self, other): return True
            __hash__ = str.__hash__
        print(Same())
    """,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_pass_nothing(sandbox: Sandbox, name: str) -> None:
    verdict = judge_stdin(sandbox, textwrap.dedent(ATTACKS[name]), SECRETS[1:], LIMITS)
    assert verdict.status not in (VerdictStatus.OK, VerdictStatus.SANDBOX_ERROR)
    assert (verdict.passed, verdict.total) == (0, 2)


@pytest.mark.parametrize("tests", [[], [{"stdin": "1"}], [{"stdin": 1, "expected": "1"}]])
def test_tests_of_another_form_are_a_mistake_in_the_data(sandbox: Sandbox, tests: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match="mend the data set"):
        judge_stdin(sandbox, "print(1)", tests, LIMITS)
