"""The reward `answer_format`: has the completion the form that a reasoning policy is asked for?"""

import re

from pydantic import BaseModel, ConfigDict, Field

from cispo.rewards.math_extract import extract_answer, without_thinking

THINKING = re.compile(r"\s*<think>(?P<thinking>(?:(?!</?think>).)*)</think>(?P<rest>(?:(?!</?think>).)*)", re.DOTALL)


class AnswerFormatArgs(BaseModel):
    """What `args` of the reward `answer_format` may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    thinking: bool = False
    """Ask for one <think>...</think> that is not empty, before everything else."""
    answer: bool = True
    """Ask for a final answer after the thinking, marked as the reward `math` wants it."""
    marker: str | None = Field(default=None, min_length=1)
    """The mark of the answer, as in `math`, in place of any."""


def answer_format(
    prompt: str,
    completion: str,
    *,
    is_truncated: bool,
    thinking: bool = False,
    answer: bool = True,
    marker: str | None = None,
) -> float:
    """1.0 when the completion ends by itself and has what is asked for, else 0.0."""
    if is_truncated or not without_thinking(completion).strip():
        return 0.0
    match = THINKING.fullmatch(completion)
    if thinking and (match is None or not match["thinking"].strip()):
        return 0.0
    return float(not answer or extract_answer(completion, marker) is not None)
