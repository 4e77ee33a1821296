"""The rewards of the family of code tasks: does the program in the completion do what its hidden tests ask?

`code` reads the rows of the usual sets (code_schemas.py). `format` needs the columns `entry_point` (a function's name)
and `tests` (a list of `{"args": [...], "expected": value}`, or that list as JSON text). Programs run in the sandbox,
through the `judge` and `judge_task` that a RewardSet hands to every reward that asks for them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from cispo.errors import RewardError
from cispo.rewards.code_schemas import CallTask, CodeTask, task_of
from cispo.rewards.extract import extract_code, extract_files
from cispo.sandboxes.types import Verdict, VerdictStatus
from cispo.types import Score, ScoreStatus


class Judge(Protocol):
    """Runs a program in the sandbox, or remembers its verdict; see judge_calls."""

    def __call__(self, code: str, entry_point: str, tests: Sequence[Mapping[str, Any]]) -> Verdict: ...


class TaskJudge(Protocol):
    """Judges a completion's code by a task of any kind, or remembers the verdict."""

    def __call__(self, code: str, files: Mapping[str, str], task: CodeTask) -> Verdict: ...


class CodeArgs(BaseModel):
    """What `args` of the reward `code` may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    partial: bool = False
    """Give the share of tests passed instead of 1 or 0."""


class FormatArgs(BaseModel):
    """The reward `format` takes no args."""

    model_config = ConfigDict(extra="forbid")


def code(
    prompt: str,
    completion: str,
    *,
    judge: Judge,
    judge_task: TaskJudge | None = None,
    partial: bool = False,
    **row: Any,
) -> Score:
    """1.0 when every test passes, else 0.0; with `partial` the share of tests passed. Tests are those of the row.

    Parts: `correct` (all tests pass) and `well_formed` (the code compiles and defines the entry point), each 0 or 1.
    """
    task = task_of(prompt, row)
    if isinstance(task, CallTask):
        verdict = judge(extract_code(completion), task.entry_point, task.tests)
    elif judge_task is None:
        raise RewardError("a row of this set needs judge_task, which a RewardSet supplies")
    else:
        verdict = judge_task(extract_code(completion), extract_files(completion), task)
    is_correct = verdict.status is VerdictStatus.OK
    value = verdict.passed / verdict.total if partial else float(is_correct)
    parts = {"correct": float(is_correct), "well_formed": float(verdict.is_well_formed)}
    return verdict_score(verdict, value, parts)


def format_reward(
    prompt: str, completion: str, *, entry_point: str, tests: object = (), is_truncated: bool, judge: Judge
) -> Score:
    """1.0 when the completion ends by itself (with eos) and its code compiles and defines the entry point, else 0.0.

    The tests do not count; they are given so that the verdict is the one that the reward `code` asks for too.
    """
    cases = parse_tests(tests) if tests else []
    verdict = judge(extract_code(completion), entry_point, cases)
    return verdict_score(verdict, float(verdict.is_well_formed and not is_truncated), {})


def parse_tests(tests: object) -> list[Mapping[str, Any]]:
    """The column `tests` as a list; RewardError when it is none, or empty."""
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except json.JSONDecodeError as error:
            raise RewardError(f"the column tests is no JSON text ({error}); mend the data set") from error
    if not isinstance(tests, Sequence) or not tests or not all(isinstance(test, Mapping) for test in tests):
        raise RewardError("the column tests must be a list of at least one {'args': [...], 'expected': value}")
    return list(tests)


def verdict_score(verdict: Verdict, value: float, parts: Mapping[str, float]) -> Score:
    """A score with the verdict in its info; an error when the sandbox failed, as then nothing is known."""
    if verdict.status is VerdictStatus.SANDBOX_ERROR:
        return Score(0.0, ScoreStatus.ERROR, info={"verdict": verdict.status.value}, message=verdict.message)
    info: dict[str, Any] = {"verdict": verdict.status.value, "passed": verdict.passed, "total": verdict.total}
    info |= {"flags": list(verdict.flags)} if verdict.flags else {}
    info |= {"message": verdict.message} if verdict.message else {}
    return Score(value, parts=parts, info=info)
