"""Verdicts on honest, wrong and hostile programs. A hostile program may get no test that an honest one would not."""

import json
import random
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cispo.errors import SandboxError
from cispo.sandboxes import Capabilities, ExecResult, Limits, Sandbox, Verdict, VerdictStatus
from cispo.sandboxes.judge import RETRY_PAUSES_S, judge_calls
from cispo.sandboxes.types import ExecStatus, TestStatus

LIMITS = Limits(wall_s=20.0, cpu_s=1.0, memory_mib=96, pids=16, output_kib=64, files_mib=8)
SUM_TESTS = [{"args": [1, 2], "expected": 3}, {"args": [-4, 4], "expected": 0}, {"args": [10, 5], "expected": 15}]
Judge = Callable[..., Verdict]


@pytest.fixture(scope="session")
def judge(sandbox: Sandbox) -> Judge:
    def judge_source(source: str, tests: Sequence[Mapping[str, Any]] = SUM_TESTS, entry_point: str = "f") -> Verdict:
        return judge_calls(sandbox, textwrap.dedent(source), entry_point, tests, LIMITS)

    return judge_source


def test_a_right_program_passes_every_test(judge: Judge) -> None:
    verdict = judge("def f(a, b):\n    return a + b")
    assert (verdict.status, verdict.passed, verdict.total) == (VerdictStatus.OK, 3, 3)
    assert verdict.tests == (TestStatus.PASSED,) * 3
    assert verdict.is_well_formed and not verdict.flags


def test_a_wrong_program_is_told_test_by_test(judge: Judge) -> None:
    verdict = judge("def f(a, b):\n    if b == 4: raise ValueError\n    return a + b if a > 5 else a * b")
    assert (verdict.status, verdict.passed, verdict.total) == (VerdictStatus.WRONG_ANSWER, 1, 3)
    assert verdict.tests == (TestStatus.WRONG_ANSWER, TestStatus.RUNTIME_ERROR, TestStatus.PASSED)


@pytest.mark.parametrize(
    ("source", "status", "message"),
    [
        ("def f(a, b) return a", VerdictStatus.REJECTED, "SyntaxError"),
        ("x = '\0'", VerdictStatus.REJECTED, None),
        ("x = '\ud800'", VerdictStatus.REJECTED, "UnicodeEncodeError"),
        ("(" * 5000, VerdictStatus.REJECTED, None),
        ("-" * 100_000 + "1", VerdictStatus.REJECTED, None),
        ("", VerdictStatus.REJECTED, "no entry point"),
        ("def g(a, b): return a + b", VerdictStatus.REJECTED, "no entry point"),
        ("f = 3", VerdictStatus.REJECTED, "no entry point"),
        ("def f(a, b): return a + b\n1 / 0", VerdictStatus.RUNTIME_ERROR, "ZeroDivisionError"),
        ("import os\nos._exit(0)", VerdictStatus.RUNTIME_ERROR, ""),
        ("import sys\nsys.exit(0)", VerdictStatus.RUNTIME_ERROR, "SystemExit"),
        ("while True: pass", VerdictStatus.TIMEOUT, ""),
        ("x = bytearray(1 << 30)", VerdictStatus.MEMORY_LIMIT, "MemoryError"),
        ("while True: print('x' * 10000)", VerdictStatus.OUTPUT_LIMIT, ""),
    ],
)
def test_a_module_that_gives_no_function_is_not_well_formed(
    judge: Judge, source: str, status: VerdictStatus, message: str | None
) -> None:
    verdict = judge(source)
    assert verdict.status is status
    assert message is None or verdict.message == message
    assert not verdict.is_well_formed and verdict.passed == 0
    if status is VerdictStatus.REJECTED:
        assert verdict.tests == (TestStatus.NOT_RUN,) * 3


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("os._exit(0)", VerdictStatus.RUNTIME_ERROR, ""),
        ("sys.exit(0)", VerdictStatus.RUNTIME_ERROR, "SystemExit"),
        ("exit()", VerdictStatus.RUNTIME_ERROR, "SystemExit"),
        ("raise KeyboardInterrupt", VerdictStatus.RUNTIME_ERROR, "KeyboardInterrupt"),
        ("os.kill(os.getpid(), 9)", VerdictStatus.RUNTIME_ERROR, ""),
        ("return f(a, b)", VerdictStatus.RUNTIME_ERROR, "RecursionError"),
        ("return input()", VerdictStatus.RUNTIME_ERROR, "EOFError"),
        ("while True: pass", VerdictStatus.TIMEOUT, ""),
        ("return bytearray(1 << 30)", VerdictStatus.MEMORY_LIMIT, "MemoryError"),
        ("return 'x' * 100_000", VerdictStatus.OUTPUT_LIMIT, ""),
        ("return None", VerdictStatus.WRONG_ANSWER, ""),
        ("return (a + b,)", VerdictStatus.WRONG_ANSWER, "tuple"),
        ("yield a + b", VerdictStatus.WRONG_ANSWER, "generator"),
        ("return float('nan')", VerdictStatus.WRONG_ANSWER, "a float that is not finite"),
        ("return {1: 2}", VerdictStatus.WRONG_ANSWER, "a dict with keys that are not all str"),
        ("x = []; x.append(x); return x", VerdictStatus.WRONG_ANSWER, "too deep"),
        ("x = [0]\n    for _ in range(50): x = [x, x]\n    return x", VerdictStatus.WRONG_ANSWER, "too large"),
        ("return 10 ** 5000", VerdictStatus.RUNTIME_ERROR, "ValueError"),
    ],
)
def test_how_a_call_ends_is_the_verdict(judge: Judge, body: str, status: VerdictStatus, message: str) -> None:
    verdict = judge(f"import os, sys\ndef f(a, b):\n    {body}")
    assert (verdict.status, verdict.message) == (status, message)
    assert verdict.is_well_formed and verdict.passed == 0


def test_tests_after_the_end_were_not_run(judge: Judge) -> None:
    verdict = judge("def f(a, b):\n    while a < 0: pass\n    return a + b")
    assert verdict.tests == (TestStatus.PASSED, TestStatus.TIMEOUT, TestStatus.NOT_RUN)
    assert (verdict.status, verdict.passed) == (VerdictStatus.TIMEOUT, 1)


HONEST_ODDITIES = {
    "prints": "def f(a, b):\n    print('hello', a)\n    return a + b\nprint('loading')",
    "writes to stderr": "import sys\ndef f(a, b):\n    sys.stderr.write('x')\n    return a + b",
    "closes stdout": "import sys\ndef f(a, b):\n    sys.stdout.close()\n    return a + b",
    "leaves a thread": (
        "import threading, time\n"
        "def f(a, b):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n    return a + b"
    ),
    "main guard": "def f(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(f(int(input()), 2))",
    "uses a dataclass": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
        "def f(a, b):\n    return P(a).x + b"
    ),
    "is a class with call": "class F:\n    def __call__(self, a, b):\n        return a + b\nf = F()",
    "defines eq": "class A:\n    def __eq__(self, other):\n        return True\ndef f(a, b):\n    return a + b",
    "shadows names": "def len(x): return 0\ndef f(list, dict):\n    return list + dict",
    "imports much": (
        "import collections, heapq, itertools, json, math, re, random, statistics, string, typing\n"
        "def f(a, b):\n    return json.loads(json.dumps(a + b))"
    ),
    "windows line ends": "def f(a, b):\r\n    return a + b\r\n",
    "exit after": "import atexit, os\natexit.register(os._exit, 3)\ndef f(a, b):\n    return a + b",
}


@pytest.mark.parametrize("name", HONEST_ODDITIES)
def test_honest_oddities_pass(judge: Judge, name: str) -> None:
    verdict = judge(HONEST_ODDITIES[name])
    assert verdict.status is VerdictStatus.OK, verdict


FORGER = """
import json, os
def forge():
    lines = {lines}
    for fd in range(3, 64):
        try:
            os.write(fd, b"".join(json.dumps(line).encode() + b"\\n" for line in lines))
        except OSError:
            pass
def f(a, b):
    return 0
"""
ATTACKS = {
    "always equal": """
        class Same(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
            def __repr__(self): return "3"
        def f(a, b): return Same()
        """,
    "always equal without a base": "class Same:\n    __eq__ = lambda s, o: True\ndef f(a, b): return Same()",
    "exits with 0": "import os\ndef f(a, b): os._exit(0)",
    "forged passes": FORGER.format(lines='[["loaded"], ["passed", 0], ["passed", 1], ["passed", 2]]') + "forge()",
    "forged before loading": (
        FORGER.format(lines='[["loaded"]] + [["value", i, 0] for i in range(3)]') + "forge(); os._exit(0)"
    ),
    "forged status": FORGER.format(lines='[{"status": "ok", "passed": 3, "total": 3}]') + "forge()",
    "forged early": "import os\n" + FORGER.format(lines='[["value", 2, 0]]') + "forge()",
    "forged nan": FORGER.format(lines='[["value", 0, float("nan")]]') + "forge()",
    "forged boolean index": FORGER.format(lines='[["loaded"], ["value", False, 0]]') + "forge()",
    "forged depth": FORGER.replace("json.dumps(line).encode()", "b'[' * 60000").format(lines="[0]") + "forge()",
    "forged junk": FORGER.replace("json.dumps(line).encode()", "bytes(range(256))").format(lines="[0]") + "forge()",
    "reads its frames": """
        import gc, sys
        def f(a, b):
            found = [o for o in gc.get_objects() if isinstance(o, dict) and "expected" in o]
            frame = sys._getframe()
            while frame:
                found += [v for k, v in frame.f_locals.items() if "expected" in k]
                frame = frame.f_back
            return found[0] if found else 0
        """,
    "searches memory and files": """
        import glob
        def f(a, b):
            for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline") + glob.glob("/task/*"):
                try:
                    if b"expected" in open(path, "rb").read():
                        return "leak"
                except OSError:
                    pass
            return 0
        """,
    "reads standard input again": """
        import os, marshal
        def f(a, b):
            for path in ("/proc/self/fd/0", "/dev/stdin"):
                try:
                    fd = os.open(path, os.O_RDONLY)
                    data = os.read(fd, 1 << 20)
                    if data:
                        return marshal.loads(data)
                except (OSError, EOFError, ValueError):
                    pass
            return 0
        """,
    "patches the driver": """
        import builtins, json, sys
        main = sys.modules["__main__"]
        main.call = lambda *rest: '["passed", 0]'
        main.encode = lambda value: "3"
        def f(a, b): return 0
        """,
    "forks and answers twice": "import os\ndef f(a, b):\n    os.fork()\n    return 0",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_passes_no_test_it_does_not_answer(judge: Judge, name: str) -> None:
    tests = [{"args": [n, n + 1], "expected": f"a value nobody guesses {n}"} for n in range(3)]
    verdict = judge(ATTACKS[name], tests)
    assert verdict.status not in (VerdictStatus.OK, VerdictStatus.SANDBOX_ERROR)
    assert verdict.passed == 0 and verdict.total == 3


@pytest.mark.parametrize("name", ["forged passes", "forged junk", "forks and answers twice"])
def test_answers_that_are_not_the_drivers_are_flagged(judge: Judge, name: str) -> None:
    assert judge(ATTACKS[name]).flags == ("malformed_frames",)


def test_expected_values_never_enter_the_sandbox() -> None:
    sandbox = ScriptedSandbox([b'["loaded"]\n'])
    tests = [{"args": ["an argument"], "expected": "EXPECTED-VALUE"}]
    judge_calls(sandbox, "def f(x): return x", "f", tests, LIMITS)
    sent = repr(sandbox.calls)
    assert "an argument" in sent and "EXPECTED-VALUE" not in sent


def test_names_with_control_characters_reach_no_log(judge: Judge) -> None:
    verdict = judge("def f(a, b):\n    raise type('\\x1b[2J\\n', (Exception,), {})")
    assert verdict.passed == 0 and verdict.message == ""
    for line in (b'["rejected", "\\u001b[2J"]\n', b'["failed", ["x"]]\n', b'["anything", "\\u001b[2J"]\n'):
        verdict = judge_calls(ScriptedSandbox([line]), "", "f", SUM_TESTS, LIMITS)
        assert (verdict.status, verdict.message) == (VerdictStatus.RUNTIME_ERROR, "")
        assert verdict.flags == ("malformed_frames",)


def test_arguments_are_fresh_for_each_call(judge: Judge) -> None:
    shared = [3, 1, 2]
    tests = [{"args": [shared], "expected": [1, 2, 3]}, {"args": [shared], "expected": [1, 2, 3]}]
    assert judge("def f(x):\n    x.sort()\n    y = x[:]\n    x.clear()\n    return y", tests).status is VerdictStatus.OK
    assert shared == [3, 1, 2]


def test_a_verdict_does_not_change_between_runs(judge: Judge, run_python: Callable[..., ExecResult]) -> None:
    expected = int(random.Random(0).random() * 1e9)
    verdict = judge("import random\ndef f(): return int(random.random() * 1e9)", [{"args": [], "expected": expected}])
    assert verdict.status is VerdictStatus.OK
    orders = {run_python("print(list({str(i) for i in range(99)}))").stdout for _ in range(3)}
    assert len(orders) == 1


def test_without_tests_the_form_alone_is_judged(judge: Judge) -> None:
    assert judge("def f(): pass", []).is_well_formed
    assert judge("def f(): pass", []).status is VerdictStatus.OK
    assert judge("def g(): pass", []).status is VerdictStatus.REJECTED


@pytest.mark.parametrize(
    "test", [{"args": [1]}, {"expected": 1}, {"args": 1, "expected": 1}, {"args": [object()], "expected": 1}]
)
def test_tests_of_another_form_are_a_mistake_in_the_data(judge: Judge, test: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="mend the data set"):
        judge("def f(x): return x", [test])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.lists(JSON_VALUES, min_size=1, max_size=8))
def test_every_json_value_survives_the_way_through_the_sandbox(judge: Judge, values: list[Any]) -> None:
    tests = [{"args": [value], "expected": json.loads(json.dumps(value))} for value in values]
    verdict = judge("def f(x): return x", tests)
    assert verdict.status is VerdictStatus.OK, (values, verdict)


class ScriptedSandbox:
    """Stands for a sandbox whose programs write what the test wants, or which fails itself."""

    def __init__(self, outputs: Sequence[bytes | SandboxError]) -> None:
        self.outputs = list(outputs)
        self.calls: list[object] = []

    def run(self, argv: Sequence[str], **options: Any) -> ExecResult:
        self.calls.append((argv, options))
        output = self.outputs.pop(0)
        if isinstance(output, SandboxError):
            raise output
        return ExecResult(ExecStatus.OK, 0, None, output, b"", False, 0.1, 0.1, None)

    def capabilities(self) -> Capabilities:
        return Capabilities("scripted", False, False, False, False, False, "python3", "3.11.0")

    def close(self) -> None: ...

    def __enter__(self) -> "ScriptedSandbox":
        return self

    def __exit__(self, *error: object) -> None: ...


GOOD = b'["loaded"]\n["value", 0, 3]\n["value", 1, 0]\n["value", 2, 15]\n'


def test_a_sandbox_that_fails_once_is_tried_again() -> None:
    sandbox = ScriptedSandbox([SandboxError("hiccup"), GOOD])
    assert judge_calls(sandbox, "", "f", SUM_TESTS, LIMITS).status is VerdictStatus.OK
    assert len(sandbox.calls) == 2


def test_a_sandbox_that_fails_for_seconds_still_gives_the_programs_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("cispo.sandboxes.attempts.time.sleep", slept.append)
    sandbox = ScriptedSandbox([SandboxError("fork: Resource temporarily unavailable")] * 5 + [GOOD])
    assert judge_calls(sandbox, "", "f", SUM_TESTS, LIMITS).status is VerdictStatus.OK
    assert slept == [0.0, *RETRY_PAUSES_S] and sum(slept) > 10.0


def test_a_sandbox_that_fails_to_the_last_is_no_verdict_on_the_program() -> None:
    sandbox = ScriptedSandbox([SandboxError("first"), SandboxError("second"), SandboxError("third"), GOOD])
    verdict = judge_calls(sandbox, "", "f", SUM_TESTS, LIMITS, pauses_s=(0.0, 0.01))
    assert (verdict.status, verdict.passed) == (VerdictStatus.SANDBOX_ERROR, 0)
    assert verdict.message == "the sandbox failed (attempts: 3, in 0 s): third" and len(sandbox.calls) == 3


def test_a_slow_failure_is_not_repeated_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr("cispo.sandboxes.attempts.time.monotonic", lambda: float(next(clock)))
    sandbox = ScriptedSandbox([SandboxError("no core")] * 6)
    assert judge_calls(sandbox, "", "f", SUM_TESTS, LIMITS).status is VerdictStatus.SANDBOX_ERROR
    assert len(sandbox.calls) == 2


def test_a_program_over_its_time_has_not_passed_although_it_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = ExecResult(ExecStatus.TIMEOUT, None, None, GOOD, b"", False, 1.0, 1.1, None)
    sandbox = ScriptedSandbox([])
    monkeypatch.setattr(sandbox, "run", lambda argv, **options: answered)
    verdict = judge_calls(sandbox, "", "f", SUM_TESTS, LIMITS)
    assert (verdict.status, verdict.passed) == (VerdictStatus.TIMEOUT, 2)
    assert judge_calls(sandbox, "", "f", [], LIMITS).is_well_formed


@settings(max_examples=200, deadline=None)
@given(junk=st.binary(max_size=200), at=st.integers(0, len(GOOD)))
def test_no_output_makes_the_judge_fail_or_pass_too_much(junk: bytes, at: int) -> None:
    verdict = judge_calls(ScriptedSandbox([GOOD[:at] + junk]), "", "f", SUM_TESTS, LIMITS)
    assert verdict.passed <= GOOD[:at].count(b"\n") + junk.count(b"\n")
    assert len(verdict.tests) == verdict.total == 3
    assert (verdict.status is VerdictStatus.OK) == (verdict.passed == 3)
