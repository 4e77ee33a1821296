"""Rows of the usual sets of code tasks, as what the judges take.

A row is recognised by its columns:

- `tests` with `entry_point`: our own, a list of `{"args": [...], "expected": value}`;
- `test` with `entry_point`: HumanEval, a source with a function `check(candidate)`;
- `test_list`: MBPP, a list of assert statements, with `test_setup_code` or `test_imports`;
- `public_test_cases` or `private_test_cases`: LiveCodeBench, `testtype` stdin or functional, with the function's name
  in `metadata`;
- `must_pass` with `base_files` and `hidden_tests`: a repository, whose files are texts by path;
- `input_output`, or `inputs` and `outputs`: APPS, TACO, CodeContests and what is made of them, `fn_name` for calls.

Values may be JSON text. Nothing of a row is run here. RewardError says which column is of another form.
"""

import ast
import base64
import binascii
import builtins
import io
import json
import pickle
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cispo.errors import RewardError

MAX_PACKED_BYTES = 256 << 20


@dataclass(frozen=True)
class StdinTask:
    """For judge_stdin: tests are {"stdin": text, "expected": text}."""

    tests: list[dict[str, str]]


@dataclass(frozen=True)
class CallTask:
    """For judge_calls: tests are {"args": [...], "expected": value}."""

    entry_point: str
    tests: list[dict[str, Any]]


@dataclass(frozen=True)
class AssertTask:
    """For judge_asserts. prelude: helpers that the prompt gives, which programs may use without repeating them."""

    entry_point: str
    test_source: str
    prelude: str = ""


@dataclass(frozen=True)
class RepoTask:
    """For judge_repo: files are texts by their relative path; must_pass are ids of pytest."""

    base_files: dict[str, str]
    hidden_tests: dict[str, str]
    must_pass: list[str]


CodeTask = StdinTask | CallTask | AssertTask | RepoTask
MARKS = (
    "tests", "test", "test_list", "must_pass", "public_test_cases", "private_test_cases", "input_output", "inputs",
)  # fmt: skip


def missing_column(columns: Collection[str]) -> str | None:
    """What a row with these columns lacks to be a code task, as the end of a sentence; None where it may be one."""
    if not any(mark in columns for mark in MARKS):
        return f"no column of a known set of code tasks ({', '.join(MARKS)}); map one by data.columns"
    needed = {"tests": ("entry_point",), "test": ("entry_point",), "must_pass": ("base_files", "hidden_tests")}
    first = next(mark for mark in MARKS if mark in columns)
    lacking = [name for name in needed.get(first, ()) if name not in columns]
    return f"no column {lacking[0]!r}, which {first!r} needs; map one by data.columns" if lacking else None


def task_of(prompt: str, row: Mapping[str, Any]) -> CodeTask:
    """The task of a row. `prompt` is what HumanEval's tests may need of helper functions."""
    if "tests" in row:
        return _own(row)
    if row.get("test") is not None:
        return _human_eval(prompt, row)
    if row.get("test_list") is not None:
        return _mbpp(row)
    if row.get("must_pass") is not None:
        return _repository(row)
    if row.get("public_test_cases") is not None or row.get("private_test_cases") is not None:
        return _live_code_bench(row)
    if row.get("input_output") is not None:
        return _inputs_outputs(_mapping(_decoded(row["input_output"], "input_output"), "input_output"))
    if row.get("inputs") is not None:
        return _inputs_outputs(row)
    columns = ", ".join(sorted(row)) or "none"
    raise RewardError(f"the row is of no known set of code tasks; its columns are {columns}; map them by data.columns")


def _own(row: Mapping[str, Any]) -> CallTask:
    tests = _items(_decoded(row["tests"], "tests"), "tests")
    if not all(isinstance(test, Mapping) and {"args", "expected"} <= set(test) for test in tests) or not all(
        isinstance(test["args"], list) for test in tests
    ):
        form = "{'args': [...], 'expected': value}"
        raise RewardError(f"the column tests must be a list of at least one {form}; mend the data set")
    return CallTask(_name(row.get("entry_point"), "entry_point"), [dict(test) for test in tests])


def _human_eval(prompt: str, row: Mapping[str, Any]) -> AssertTask:
    entry_point = _name(row.get("entry_point"), "entry_point")
    helpers, found, _ = prompt.partition(f"def {entry_point}(")
    source = _text(row["test"], "test")
    prelude = _compiled_part(helpers) if found else ""
    return AssertTask(entry_point, f"{prelude}\n\n{source}" if prelude else source, prelude)


def _compiled_part(source: str) -> str:
    """Source that may stand before the tests; prose of a prompt that is no Python is left out."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    return source


def _mbpp(row: Mapping[str, Any]) -> AssertTask:
    tests = [_text(test, "test_list") for test in _items(_decoded(row["test_list"], "test_list"), "test_list")]
    imports = row.get("test_imports") or []
    setup = [*([imports] if isinstance(imports, str) else imports), row.get("test_setup_code") or ""]
    entry_point = row.get("entry_point") or _tested_function(tests[0])
    source = "\n".join([_text(line, "test_setup_code") for line in setup if line] + tests)
    return AssertTask(_name(entry_point, "test_list"), source + "\n")


def _tested_function(test: str) -> str | None:
    """The first function that an assert calls and Python does not have."""
    try:
        calls = [node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    names = [function.id for function in calls if isinstance(function, ast.Name)]
    return next((name for name in names if not hasattr(builtins, name)), None)


def _live_code_bench(row: Mapping[str, Any]) -> CodeTask:
    cases: list[Any] = []
    for column in ("public_test_cases", "private_test_cases"):
        if row.get(column) is not None:
            cases += _decoded(_unpacked(row[column]), column) or []
    cases = [_mapping(case, "private_test_cases") for case in _items(cases, "private_test_cases")]
    kinds = {case.get("testtype", "stdin") for case in cases}
    if kinds == {"stdin"}:
        return StdinTask([_stdin_test(case.get("input"), case.get("output")) for case in cases])
    if kinds != {"functional"}:
        shown = ", ".join(sorted(map(str, kinds)))
        raise RewardError(f"the tests are of kinds {shown}; all must be stdin or all functional")
    metadata = _mapping(_decoded(row.get("metadata") or {}, "metadata"), "metadata")
    tests = [
        {"args": _lines_of_json(case.get("input")), "expected": _decoded(case.get("output"), "output")}
        for case in cases
    ]
    return CallTask(_name(metadata.get("func_name"), "metadata"), tests)


def _repository(row: Mapping[str, Any]) -> RepoTask:
    files = {}
    for column in ("base_files", "hidden_tests"):
        content = _mapping(_decoded(row.get(column), column), column)
        files[column] = {_text(path, column): _text(text, column) for path, text in content.items()}
    ids = [_text(test_id, "must_pass") for test_id in _items(_decoded(row["must_pass"], "must_pass"), "must_pass")]
    return RepoTask(files["base_files"], files["hidden_tests"], ids)


class _TextOnly(pickle.Unpickler):
    """Reads text, and refuses to look up anything that could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no text")


def _unpacked(value: Any) -> Any:
    """LiveCodeBench packs private tests as base64 of zlib of a pickled JSON text."""
    if not isinstance(value, str) or value.lstrip()[:1] in ("[", "{", ""):
        return value
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(value, validate=True), MAX_PACKED_BYTES)
        return _TextOnly(io.BytesIO(data)).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, ValueError, LookupError) as error:
        raise RewardError(f"the column private_test_cases is neither JSON nor packed JSON ({error})") from error


def _inputs_outputs(source: Mapping[str, Any]) -> CodeTask:
    inputs = _items(_decoded(source.get("inputs"), "inputs"), "inputs")
    outputs = _items(_decoded(source.get("outputs"), "outputs"), "outputs")
    if len(inputs) != len(outputs):
        raise RewardError(f"there are {len(inputs)} inputs and {len(outputs)} outputs; each test needs one of both")
    name = source.get("fn_name") or source.get("func_name")
    if not name:
        return StdinTask([_stdin_test(given, expected) for given, expected in zip(inputs, outputs, strict=True)])
    arguments = [_lines_of_json(given) for given in inputs]
    values = [_decoded(value, "outputs") if isinstance(value, str) and _is_json(value) else value for value in outputs]
    # These sets wrap each result in a list of one.
    if all(isinstance(value, list) and len(value) == 1 for value in values):
        values = [value[0] for value in values]
    tests = [{"args": args, "expected": value} for args, value in zip(arguments, values, strict=True)]
    return CallTask(_name(name, "fn_name"), tests)


def _stdin_test(given: Any, expected: Any) -> dict[str, str]:
    return {"stdin": _joined(given, "inputs"), "expected": _joined(expected, "outputs")}


def _joined(value: Any, column: str) -> str:
    """Text, or the lines of one as a list."""
    if isinstance(value, list):
        return "\n".join(_joined(line, column) for line in value)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RewardError(f"the column {column} must hold text, got {str(value)[:60]!r}; mend the data set")


def _lines_of_json(value: Any) -> list[Any]:
    """Arguments as a list, or as text with one JSON value a line."""
    if isinstance(value, list):
        return list(value)
    if not isinstance(value, str):
        raise RewardError(f"the arguments of a call must be a list or lines of JSON, got {str(value)[:60]!r}")
    return [_decoded(line, "inputs") for line in value.split("\n") if line.strip()]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _decoded(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"the column {column} is no JSON text ({error}); mend the data set") from error


def _items(value: Any, column: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise RewardError(f"the column {column} must be a list with at least one item, got {str(value)[:60]!r}")
    return list(value)


def _mapping(value: Any, column: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RewardError(f"the column {column} must hold an object, got {str(value)[:60]!r}; mend the data set")
    return value


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RewardError(f"the column {column} must hold text, got {str(value)[:60]!r}; mend the data set")
    return value


def _name(value: Any, column: str) -> str:
    name = str(value or "").removeprefix("Solution().")
    if not name.isidentifier():
        raise RewardError(f"the column {column} names no function, got {str(value)[:60]!r}; mend the data set")
    return name
