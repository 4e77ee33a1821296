"""The reward `reasoning_gym`: the score that a task of the package reasoning-gym gives to the final answer.

The scorers of that package are not made for adversaries: some run the answer as program text. So they run in the
sandbox (reasoning_gym_scorer.py), the whole group at once, as importing them takes longer than scoring. An answer that
breaks the common run is scored again in a sandbox of its own, with the others. Where a scorer would run the answer, in
the same process as the right one stands, the answer must be what such a scorer is for: a literal, or arithmetic.
"""

import ast
import json
import marshal
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cispo.errors import RewardError
from cispo.rewards import reasoning_gym_scorer
from cispo.rewards.math_extract import without_thinking
from cispo.rewards.reasoning_gym_library import library_of
from cispo.sandboxes.attempts import FailedAttemptsError, run_patiently
from cispo.sandboxes.types import ExecResult, Limits, Sandbox
from cispo.types import Score

SCORER_SOURCE = Path(reasoning_gym_scorer.__file__).read_text(encoding="utf-8")
ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
MAX_ANSWER_CHARS = 20_000
START_CPU_S, START_MEMORY_MIB = 20.0, 128
# Some scorers give up to this to any text at all.
FLOOR = 0.05
FULL_MARKS = 0.999
# Tasks whose scorers hand the answer to eval, and want a list; and those that hand it to SymPy, which does the same.
LITERAL_TASKS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
ARITHMETIC_TASKS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
ARITHMETIC = re.compile(r"(?:[\w\s+\-*/^(),=]|(?<![A-Za-z_)])\.(?![A-Za-z_]))*", re.ASCII)
FUNCTIONS = frozenset(("exp", "log", "ln", "sqrt", "pi", "Abs", "erf")) | frozenset(
    f"{inverse}{name}{hyperbolic}"
    for inverse in ("", "a")
    for name in ("sin", "cos", "tan", "cot", "sec", "csc")
    for hyperbolic in ("", "h")
)
VARIABLE = re.compile(r"[A-Za-z]\d?|\d+(?:[eE]\d+)?", re.ASCII)


class ReasoningGymArgs(BaseModel):
    """What `args` of the reward `reasoning_gym` may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    full_marks: bool = False
    """Give 1 for full marks and 0 for anything else."""
    seconds: float = Field(default=5.0, gt=0, le=600)
    """CPU seconds that scoring one answer may take."""


def reasoning_gym(
    prompt: str,
    completions: Sequence[str],
    *,
    task: str,
    entry: str,
    sandbox: Sandbox,
    limits: Limits,
    full_marks: bool = False,
    seconds: float = 5.0,
) -> list[Score | RewardError]:
    """One score for each completion: what stands in its last <answer>, 0 without one. Parts: `correct`, full marks.

    A scorer that raises, ends or takes too long over an answer gives that answer 0, if it scores the entry's own answer
    as it should; else, and where the sandbox fails, all are errors.
    """
    answers = [final_answer(completion) for completion in completions]
    refused = {answer for answer in answers if answer is not None and not is_fit(task, answer)}
    asked = [answer for answer in dict.fromkeys(answers) if answer is not None and answer not in refused]
    scoring = _Scoring(task, entry, sandbox, limits, seconds)
    outcomes: dict[str, tuple[str, Any] | RewardError] = {}
    try:
        outcomes.update(scoring.outcomes(asked))
    except RewardError as error:
        outcomes.update(dict.fromkeys(asked, error))

    def score(answer: str | None) -> Score | RewardError:
        if answer is None or answer in refused:
            return Score(0.0, parts={"correct": 0.0}, info={"scorer": "no answer" if answer is None else "refused"})
        outcome = outcomes[answer]
        return outcome if isinstance(outcome, RewardError) else _score(*outcome, full_marks)

    return [score(answer) for answer in answers]


def final_answer(completion: str) -> str | None:
    """What stands in the last <answer>...</answer> after the thinking."""
    found = ANSWER.findall(without_thinking(completion))
    return found[-1].strip()[:MAX_ANSWER_CHARS] if found else None


def is_fit(task: str, answer: str) -> bool:
    """Whether a scorer that runs answers may run this one: a literal holds no names, and arithmetic only known ones."""
    if task in LITERAL_TASKS:
        return "__" not in answer
    if task not in ARITHMETIC_TASKS:
        return True
    if not ARITHMETIC.fullmatch(answer):
        return False
    words = re.findall(r"\w+", answer, re.ASCII)
    return all(word in FUNCTIONS or VARIABLE.fullmatch(word) for word in words)


class _Scoring:
    """One entry of a task and the sandbox to score its answers in."""

    def __init__(self, task: str, entry: str, sandbox: Sandbox, limits: Limits, seconds: float) -> None:
        try:
            parsed = ast.literal_eval(entry)
            self._module, self._settings, self._item = str(parsed["module"]), parsed["settings"], parsed["item"]
            self._item["answer"]
        except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
            raise RewardError(
                f"the column entry is none of data.path reasoning_gym:... ({type(error).__name__}); make the rows anew"
            ) from error
        self._task, self._sandbox, self._limits, self._seconds = task, sandbox, limits, seconds

    def outcomes(self, answers: Sequence[str]) -> Mapping[str, tuple[str, Any]]:
        """The kind and value of each; RewardError where nothing can be told of any."""
        if not answers:
            return {}
        found = self._run(answers)
        missing = [answer for answer in answers if answer not in found]
        for answer in missing:  # one of the answers has ended what they have in common
            found |= {answer: ("died", "")} | dict(self._run([answer]))
        return found

    def _run(self, answers: Sequence[str]) -> dict[str, tuple[str, Any]]:
        """What one sandbox tells of the answers, as far as it comes."""
        capabilities = self._sandbox.capabilities()
        library = library_of(self._module, capabilities.python_version)
        request = {
            "task": self._task, "module": self._module, "settings": self._settings, "item": self._item,
            "answers": list(answers), "cpu_s": self._seconds, "wall_s": 4 * self._seconds,
            "literal_only": self._task in LITERAL_TASKS, "placeholders": list(library.placeholders),
        }  # fmt: skip
        total_s = START_CPU_S + (len(answers) + 1) * self._seconds
        limits = replace(
            self._limits, wall_s=4 * total_s, cpu_s=total_s, memory_mib=self._limits.memory_mib + START_MEMORY_MIB
        )
        argv = [capabilities.python, "-S", "-s", "-c", SCORER_SOURCE]
        files = {"gym.zip": library.gym, "libraries.zip": library.libraries}
        try:
            result = run_patiently(self._sandbox, argv, limits, stdin=marshal.dumps(request, 2), files=files)
        except FailedAttemptsError as error:
            raise RewardError(str(error)) from error
        except ValueError as error:
            raise RewardError(f"the entry of this row cannot be handed to the sandbox ({error})") from error
        own, *lines = _lines(result, len(answers))
        self._check(own, result)
        return {answers[index]: (kind, value) for index, (kind, value) in enumerate(lines)}

    def _check(self, own: tuple[str, Any], result: ExecResult) -> None:
        kind, value = own
        if kind == "score" and (self._item["answer"] is None or value >= FULL_MARKS):
            return
        told = result.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
        reasons = {
            "score": f"it gives {value}", "raised": f"it raises {value}", "late": f"it takes over {self._seconds:g} s",
            "died": f"its process ends: {told or result.status}",
        }  # fmt: skip
        raise RewardError(
            f"the task {self._task} cannot be scored in this sandbox: given the entry's own answer, {reasons[kind]}"
        )


def _lines(result: ExecResult, total: int) -> list[tuple[str, Any]]:
    """The own answer's outcome, `died` where there is none, and then as many as came in order."""
    found: list[tuple[str, Any]] = []
    for line in result.stdout.split(b"\n")[:-1]:
        try:
            index, kind, value = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            break
        is_sound = kind in ("raised", "died", "late") or (kind == "score" and math.isfinite(value))
        if index != len(found) - 1 or len(found) > total or not is_sound:
            break
        found.append((kind, value))
    return found or [("died", "")]


def _score(kind: str, value: Any, full_marks: bool) -> Score:
    if kind != "score":
        return Score(0.0, parts={"correct": 0.0}, info={"scorer": f"{kind} {value}".strip()})
    if not 0 <= value <= 1:
        return Score(0.0, parts={"correct": 0.0}, info={"scorer": f"gave {value}"})
    is_correct = float(value >= FULL_MARKS)
    earned = value if value > FLOOR else 0.0
    return Score(is_correct if full_marks else earned, parts={"correct": is_correct})
