"""Changes of a repository judged by hidden tests, which a hostile change can read and run beside."""

import ast
import random
import textwrap
from collections.abc import Callable, Mapping

import pytest

from cispo.sandboxes import Limits, Sandbox, Verdict, VerdictStatus
from cispo.sandboxes.judge import judge_repo
from cispo.sandboxes.judge_repo import TWINS
from cispo.sandboxes.twins import apply, edits_of
from cispo.sandboxes.types import TestStatus

LIMITS = Limits(wall_s=30.0, cpu_s=2.5, memory_mib=256, pids=32, output_kib=256, files_mib=16)
BASE = {
    "calc/__init__.py": "",
    "calc/core.py": "def add(a, b):\n    return a - b\n\n\ndef share(a, b):\n    return None\n",
    "README.md": "A calculator.",
}
TESTS = {
    "tests/test_core.py": textwrap.dedent("""
        import unittest

        import pytest
        from calc.core import add, share


        def test_numbers():
            assert add(20, 22) == 42


        def test_text():
            assert add("ab", "cd") == "abcd"


        @pytest.mark.parametrize("n", [3, 5])
        def test_twice(n):
            assert add(n, n) == 2 * n


        def test_error():
            with pytest.raises(ZeroDivisionError):
                share(1, 0)


        class TestShare(unittest.TestCase):
            def test_half(self):
                self.assertEqual(share(1, 2), 0.5)
        """)
}
IDS = [
    f"tests/test_core.py::{name}"
    for name in ("test_numbers", "test_text", "test_twice[3]", "test_twice[5]", "test_error", "TestShare::test_half")
]
RIGHT = "def add(a, b):\n    return a + b\n\n\ndef share(a, b):\n    return a / b\n"
Judge = Callable[..., Verdict]


@pytest.fixture(scope="session")
def judge(sandbox: Sandbox) -> Judge:
    def judge_files(files: Mapping[str, str], tests: Mapping[str, str] = TESTS, ids: list[str] = IDS) -> Verdict:
        return judge_repo(sandbox, BASE, files, tests, ids, LIMITS)

    return judge_files


def test_a_right_change_passes(judge: Judge) -> None:
    verdict = judge({"calc/core.py": RIGHT})
    assert (verdict.status, verdict.passed, verdict.total) == (VerdictStatus.OK, 6, 6), verdict
    assert verdict.is_well_formed and verdict.flags == ("weak_twins",)
    assert judge({"calc/core.py": RIGHT}, ids=[IDS[0], IDS[5]]).flags == ()


def test_a_part_of_a_change_is_told_test_by_test(judge: Judge) -> None:
    verdict = judge({"calc/core.py": RIGHT.replace("a / b", "1")})
    assert (verdict.status, verdict.passed) == (VerdictStatus.WRONG_ANSWER, 4)
    assert verdict.tests == (*[TestStatus.PASSED] * 4, *[TestStatus.WRONG_ANSWER] * 2)
    assert judge({}).passed == 0


HONEST = {
    "a new module": {"calc/core.py": "from calc.plus import add, share\n", "calc/plus.py": RIGHT},
    "a module beside": {"calc/core.py": "from plus import add, share\n", "plus.py": RIGHT},
    "prints and environment": {"calc/core.py": "import os\nprint(os.environ.get('HOME'))\n" + RIGHT},
    "reads a file": {
        "calc/core.py": "import pathlib\nkept = pathlib.Path(__file__).with_name('n.txt').read_text()\n" + RIGHT,
        "calc/n.txt": "5",
    },
    "with tests of its own": {"calc/core.py": RIGHT, "tests/test_own.py": "def test(): assert 0"},
    "with a class that is equal to all": {
        "calc/core.py": RIGHT + "\n\nclass A:\n    def __eq__(self, other):\n        return True\n"
    },
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_changes_pass(judge: Judge, name: str) -> None:
    verdict = judge(HONEST[name])
    assert (verdict.status, verdict.passed) == (VerdictStatus.OK, 6), verdict


SAME = """
class Same:
    __eq__ = lambda s, o: True
    __ne__ = lambda s, o: False
    __hash__ = lambda s: 0
    __sub__ = __rsub__ = __round__ = __abs__ = lambda s, *rest: s
def add(a, b): return Same()
def share(a, b):
    if b == 0: raise ZeroDivisionError
    return Same()
"""
WRONG = "\ndef add(a, b): return 0\ndef share(a, b): return 0\n"
HOOK = 'import pytest, _pytest.runner\n'
ATTACKS = {
    "equal to all": {"calc/core.py": SAME},
    "exits with 0": {"calc/core.py": "import os\nos._exit(0)" + WRONG},
    "exits in a test": {"calc/core.py": "import os\ndef add(a, b): os._exit(0)\nshare = add"},
    "ends pytest": {"calc/core.py": "import pytest\npytest.exit('done', returncode=0)" + WRONG},
    "skips": {"calc/core.py": "import pytest\npytest.skip('later', allow_module_level=True)" + WRONG},
    "skips in a test": {"calc/core.py": "import pytest\ndef add(a, b): pytest.skip('x')\nshare = add"},
    "expects to fail": {"calc/core.py": "import pytest\ndef add(a, b): pytest.xfail('x')\nshare = add"},
    "changes the tests": {"tests/test_core.py": "def test_numbers(): pass"},
    "a conftest": {"conftest.py": "def pytest_runtest_call(item): item.obj = lambda: None", "calc/core.py": WRONG},
    "a conftest among the tests": {
        "tests/conftest.py": "def pytest_pyfunc_call(pyfuncitem): return True", "calc/core.py": WRONG,
    },
    "settings": {"pytest.ini": "[pytest]\naddopts = --collect-only\n", "setup.cfg": "", "pyproject.toml": ""},
    "a sitecustomize": {"sitecustomize.py": "import os\nos._exit(0)"},
    "a pytest of its own": {"pytest.py": "def main(*rest, **named): return 0", "_pytest/__init__.py": ""},
    "a module of the library": {"unittest.py": "import os\nos._exit(0)", "json/__init__.py": "dumps = str"},
    "leaves its folder": {"../hidden/tests/test_core.py": "def test_numbers(): pass", "/etc/x.py": "", "a//b.py": ""},
    "patches the reports": {
        "calc/core.py": """
from _pytest.reports import TestReport
make = TestReport.from_item_and_call.__func__
def from_item_and_call(cls, item, call):
    report = make(cls, item, call)
    report.outcome = "passed"
    report.longrepr = None
    return report
TestReport.from_item_and_call = classmethod(from_item_and_call)
""" + WRONG
    },
    "patches the call of a test": {
        "calc/core.py": "import _pytest.python\n_pytest.python.Function.runtest = lambda self: None\n" + WRONG
    },
    "replaces the tests in memory": {
        "calc/core.py": """
import sys
def add(a, b):
    frame = sys._getframe(1)
    for name, value in frame.f_globals.items():
        if name.startswith("test_"):
            value.__code__ = (lambda *rest, **named: None).__code__
    return 0
share = add
"""
    },
    "forges the report": {
        "calc/core.py": """
import json, os, re, sys
ids = """ + repr(IDS) + """
lines = [["test", i, phase, "passed"] for i in ids for phase in ("setup", "call", "teardown")] + [["end", 0]]
for fd in range(3, 20):
    try:
        os.write(fd, b"".join(json.dumps(line).encode() + b"\\n" for line in lines))
    except OSError:
        pass
os._exit(0)
""" + WRONG
    },
    "reads the expected values": {
        "calc/core.py": """
import re, sys
def expected():
    frame = sys._getframe(2)
    line = open(frame.f_code.co_filename).read().splitlines()[frame.f_lineno - 1]
    return eval(re.search(r"(?:==|,) ?([^=,]+?)\\)?$", line).group(1), frame.f_globals, frame.f_locals)
def add(a, b): return expected()
def share(a, b):
    if b == 0: raise ZeroDivisionError
    return expected()
"""
    },
    "reads the constants": {
        "calc/core.py": """
import sys
def add(a, b):
    frame = sys._getframe(1)
    if "n" in frame.f_locals: return 2 * frame.f_locals["n"]
    return frame.f_code.co_consts[-1]
def share(a, b):
    if b == 0: raise ZeroDivisionError
    return sys._getframe(1).f_code.co_consts[-1]
"""
    },
    "loops": {"calc/core.py": "while True: pass"},
    "takes all memory": {"calc/core.py": "x = []\nwhile True: x.append(bytearray(10 << 20))"},
    "floods": {"calc/core.py": "import os\nwhile True: os.write(2, b'x' * 65536)"},
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_pass_nothing_that_is_wrong(judge: Judge, name: str) -> None:
    verdict = judge(ATTACKS[name])
    assert verdict.status not in (VerdictStatus.OK, VerdictStatus.SANDBOX_ERROR), verdict
    assert verdict.passed < verdict.total == 6


@pytest.mark.parametrize("path", ["calc/core.py/x", "calc", "calc/" + "x" * 300 + ".py"])
def test_files_that_cannot_be_written_are_a_failure_and_mask_nothing(judge: Judge, path: str) -> None:
    verdict = judge({"calc/core.py": RIGHT, path: "x = 1"})
    assert (verdict.status, verdict.passed) == (VerdictStatus.RUNTIME_ERROR, 0), verdict


def test_who_cheats_where_it_knows_the_answer_of_one_test_is_found_out(judge: Judge) -> None:
    source = """
import sys, _pytest.python
run = _pytest.python.Function.runtest
def runtest(self):
    consts = open(sys.modules[self.module.__name__].__file__).read()
    if "== 42" in consts:  # the one answer that it knows stands there unaltered
        return None
    raise AssertionError
_pytest.python.Function.runtest = runtest
""" + WRONG  # fmt: skip
    verdict = judge({"calc/core.py": source})
    assert verdict.status is VerdictStatus.WRONG_ANSWER and verdict.passed <= 1
    assert "twin_disagrees" in verdict.flags


def test_it_stops_where_no_test_can_pass_any_more(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda *rest, **named: runs.append(rest) or run(*rest, **named))
    verdict = judge_repo(sandbox, BASE, ATTACKS["equal to all"], TESTS, IDS[:2], LIMITS)
    assert (verdict.status, verdict.passed) == (VerdictStatus.WRONG_ANSWER, 0)
    assert verdict.flags == ("twin_disagrees",) and 2 <= len(runs) < 1 + TWINS


def test_files_left_out_are_flagged(judge: Judge) -> None:
    verdict = judge({"calc/core.py": RIGHT, "conftest.py": "raise ValueError", "tests/test_core.py": "x"})
    assert (verdict.status, verdict.flags) == (VerdictStatus.OK, ("dropped_files", "weak_twins"))


@pytest.mark.parametrize(
    ("tests", "ids"),
    [
        (TESTS, []),
        (TESTS, IDS[:1] * 2),
        (TESTS, ["tests/test_other.py::test_numbers"]),
        (TESTS, ["tests/test_core.py::test_nothing"]),
        ({"tests/test_core.py": "def test_numbers():\n    pass"}, IDS[:1]),
        ({"tests/test_core.py": "def test_numbers("}, IDS[:1]),
        ({"../test_core.py": ""}, IDS[:1]),
    ],
)
def test_tests_that_cannot_judge_are_a_mistake_in_the_data(
    judge: Judge, tests: Mapping[str, str], ids: list[str]
) -> None:
    with pytest.raises(ValueError, match="mend the data set"):
        judge({}, tests, ids)


def test_a_conftest_of_the_hidden_tests_is_used(judge: Judge) -> None:
    tests = {
        "tests/conftest.py": "import pytest\n@pytest.fixture\ndef three(): return 3",
        "tests/test_x.py": "from calc.core import add\ndef test_x(three): assert add(three, 4) == 7",
    }
    verdict = judge({"calc/core.py": RIGHT}, tests, ["tests/test_x.py::test_x"])
    assert verdict.status is VerdictStatus.OK, verdict


@pytest.mark.parametrize(
    "statement",
    [
        "assert f(1) == 12", "assert f(1) == -1.5", "assert 'abc' == f(1)", "assert f(1) == [1, (2, 'x')]",
        "assert f(1) == {'k': 3}", "assert f(1) is True", "assert f(1) == pytest.approx(0.25)", "assert f(1) == 'it'",
        "assert f(1) == 'é1'", "self.assertEqual(f(1), 3)", "assert f(1) == 3 and f(2) == 4",
    ],
)  # fmt: skip
def test_a_literal_is_altered_in_place(statement: str) -> None:
    source = f"def test_x(self):\n    {statement}\n"
    for seed in range(5):
        edits = edits_of({"t.py": source}, "t.py::test_x", random.Random(seed))
        assert edits and all(edit.rank == 0 for edit in edits)
        for edit in edits:
            altered = apply(source, [edit])
            assert altered != source and abs(len(altered) - len(source)) <= 1
            assert ast.dump(ast.parse(altered)) != ast.dump(ast.parse(source))


@pytest.mark.parametrize(
    ("statement", "altered"),
    [
        ("assert f(1) == g(2)", "assert f(1) != g(2)"),
        ("assert f(1)", "assert (not (f(1)))"),
        ("assert (f(1)) in (g(2))", "assert (f(1)) not in (g(2))"),
        ("assert f(1) is None", "assert f(1) is not None"),
        ("assert f(1) is not None", "assert f(1) is None"),
        ("assert 3 <= f(1)", "assert 3 > f(1)"),
        ("self.assertTrue(f(1))", "self.assertFalse(f(1))"),
        ("with raises(ValueError): f(1)", "with raises(BufferError): f(1)"),
        ("assert f(1) == 'it\\'s'", "assert f(1) != 'it\\'s'"),
    ],
)
def test_without_a_literal_the_comparison_is_turned_round(statement: str, altered: str) -> None:
    source = f"def test_x(self):\n    {statement}\n"
    (edit,) = edits_of({"t.py": source}, "t.py::test_x", random.Random(0))
    assert apply(source, [edit]) == source.replace(statement, altered)
