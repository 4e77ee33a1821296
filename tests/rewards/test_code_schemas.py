"""Rows as the usual sets have them, and the tasks they mean."""

import base64
import json
import os
import pickle
import zlib
from typing import Any

import pytest

from cispo.errors import RewardError
from cispo.rewards.code_schemas import AssertTask, CallTask, CodeTask, StdinTask, task_of

CALLS = CallTask("add", [{"args": [1, 2], "expected": 3}])
LINES = StdinTask([{"stdin": "1 2\n", "expected": "3\n"}])
STDIN_CASES = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
FUNCTIONAL_CASES = [{"input": "1\n2", "output": "3", "testtype": "functional"}]


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"entry_point": "add", "tests": CALLS.tests}, CALLS),
        ({"entry_point": "add", "tests": json.dumps(CALLS.tests)}, CALLS),
        ({"inputs": ["1 2\n"], "outputs": ["3\n"]}, LINES),
        ({"inputs": [["1", "2"]], "outputs": [["3"]]}, StdinTask([{"stdin": "1\n2", "expected": "3"}])),
        ({"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}, CALLS),
        ({"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}, CALLS),
        ({"inputs": ["1\n2"], "outputs": ["3"], "fn_name": "Solution().add"}, CALLS),
        ({"input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})}, LINES),
        ({"input_output": {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}}, CALLS),
        (
            {"inputs": [[[1]], [[2, 3]]], "outputs": [[1], [2, 3]], "fn_name": "same"},
            CallTask("same", [{"args": [[1]], "expected": [1]}, {"args": [[2, 3]], "expected": [2, 3]}]),
        ),
        ({"public_test_cases": json.dumps(STDIN_CASES), "private_test_cases": "[]"}, LINES),
        (
            {"public_test_cases": STDIN_CASES, "private_test_cases": packed(json.dumps(STDIN_CASES))},
            StdinTask(LINES.tests * 2),
        ),
        ({"public_test_cases": json.dumps(FUNCTIONAL_CASES), "metadata": json.dumps({"func_name": "add"})}, CALLS),
        (
            {"test_list": ["assert set(add(1)) == {2}"], "test_setup_code": "x = 1", "test_imports": ["import math"]},
            AssertTask("add", "import math\nx = 1\nassert set(add(1)) == {2}\n"),
        ),
        ({"test_list": ["assert m.close(add(1, 2), 3)"]}, AssertTask("add", "assert m.close(add(1, 2), 3)\n")),
    ],
)
def test_rows(row: dict[str, Any], task: CodeTask) -> None:
    assert task_of("Add two numbers.", row) == task


def test_human_eval_has_the_prompts_helpers() -> None:
    prompt = "import math\n\ndef helper(x):\n    return x\n\ndef f(x):\n    '''doc'''\n"
    row = {"entry_point": "f", "test": "def check(candidate):\n    assert candidate(1) == helper(1)\n"}
    task = task_of(prompt, row)
    assert isinstance(task, AssertTask) and task.entry_point == "f"
    assert task.prelude == "import math\n\ndef helper(x):\n    return x\n\n"
    assert task.test_source == f"{task.prelude}\n\n{row['test']}"
    assert task_of("Write in Python: def f(x)", row) == AssertTask("f", row["test"])
    assert task_of("no such function", row) == AssertTask("f", row["test"])


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no known set of code tasks; its columns are none"),
        ({"answer": 1, "id": 2}, "its columns are answer, id"),
        ({"tests": []}, "column tests must be a list with at least one item"),
        ({"tests": [{"args": 1}]}, "column tests must be a list of at least one"),
        ({"tests": CALLS.tests, "entry_point": "a b"}, "column entry_point names no function, got 'a b'"),
        ({"inputs": ["1"], "outputs": []}, "column outputs must be a list"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "1 inputs and 2 outputs"),
        ({"inputs": [None], "outputs": ["1"]}, "column inputs must hold text"),
        ({"input_output": "{"}, "column input_output is no JSON text"),
        ({"input_output": "[]"}, "column input_output must hold an object"),
        ({"test_list": ["assert True"]}, "column test_list names no function"),
        ({"public_test_cases": "[]"}, "column private_test_cases must be a list with at least one item"),
        ({"public_test_cases": FUNCTIONAL_CASES + STDIN_CASES}, "kinds functional, stdin"),
        ({"public_test_cases": FUNCTIONAL_CASES}, "column metadata names no function"),
        ({"private_test_cases": packed(Harmful())}, "neither JSON nor packed JSON"),
        ({"private_test_cases": "AAAA"}, "neither JSON nor packed JSON"),
    ],
)
def test_mistakes_name_the_column(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError) as caught:
        task_of("", row)
    assert message in str(caught.value) and "\n" not in str(caught.value)
