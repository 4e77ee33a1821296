"""The reward `answer_format`: has the completion the form that a reasoning policy is asked for?"""

import re

from pydantic import BaseModel, ConfigDict, Field

from cispo.rewards.math_extract import extract_answer, without_thinking

THINKING = re.compile(r"\s*<think>(?P<thinking>(?:(?!</?think>).)*)</think>(?P<rest>(?:(?!</?think>).)*)", re.DOTALL)
_NUMBER, _GAP = r"-?\d{1,12}", r"[ \t]{0,4}"
EQUATION = re.compile(rf"(?<![\d.]){_NUMBER}{_GAP}[-+*/\u00d7\u2212]{_GAP}{_NUMBER}{_GAP}={_GAP}{_NUMBER}")


class AnswerFormatArgs(BaseModel):
    """What `args` of the reward `answer_format` may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    thinking: bool = False
    """Ask for one <think>...</think> that is not empty, before everything else."""
    answer: bool = True
    """Ask for a final answer after the thinking, marked as the reward `math` wants it."""
    marker: str | None = Field(default=None, min_length=1)
    """The mark of the answer, as in `math`, in place of any."""
    equations: int = Field(default=0, ge=0)
    """Ask for so many different worked steps before the answer, each as `23 + 45 = 68`; also a column of the data."""


def answer_format(
    prompt: str,
    completion: str,
    *,
    is_truncated: bool,
    thinking: bool = False,
    answer: bool = True,
    marker: str | None = None,
    equations: int = 0,
) -> float:
    """1.0 when the completion ends by itself and has what is asked for, else 0.0."""
    if is_truncated or not without_thinking(completion).strip():
        return 0.0
    match = THINKING.fullmatch(completion)
    if thinking and (match is None or not match["thinking"].strip()):
        return 0.0
    if equations and len(_worked_steps(completion, marker)) < equations:
        return 0.0
    return float(not answer or extract_answer(completion, marker) is not None)


def _worked_steps(completion: str, marker: str | None) -> set[str]:
    """The different equations of two numbers before the last marker, right or wrong."""
    worked = completion.rpartition(marker)[0] if marker is not None else completion
    return {" ".join(match[0].split()) for match in EQUATION.finditer(worked)}
