"""The reward `math`: is the final answer of the completion equal to the data set's `answer`?

The answer is taken out by a rule of our own (math_extract.py), read by a parser of our own (math_tokens.py,
math_expression.py, math_answer.py), and compared as exact rational numbers where it is made of such. What is left,
roots and variables, say, goes to SymPy and Math-Verify in a process that may be killed (math_pool.py). In doubt the
answer is wrong: what can be read in two ways is not read at all.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from cispo.errors import RewardError
from cispo.rewards.math_answer import Answer, parse_answer
from cispo.rewards.math_compare import Leaves, answers_equal
from cispo.rewards.math_exact import exact_value
from cispo.rewards.math_expression import Tree
from cispo.rewards.math_extract import extract_answer, without_thinking
from cispo.rewards.math_pool import MathPool, shared_pool
from cispo.rewards.math_tokens import Token, UnparsedError, tokens_of
from cispo.types import Score, ScoreStatus

MAX_WORKER_BITS = 400
"""Bits of the largest number that SymPy is given; larger ones are compared only with each other, exactly."""


PERCENT = re.compile(r"\s*(?:\\?%|percent)\s*\.?\s*$")


class MathStatus(StrEnum):
    """Whether two answers could be compared."""

    OK = "ok"
    UNPARSED_GOLD = "unparsed_gold"
    """The data set's answer cannot be read: its sample is masked."""
    UNPARSED_PREDICTION = "unparsed_prediction"
    TIMEOUT = "timeout"
    """The prediction used up the CPU time or memory of a comparison."""
    ERROR = "error"
    """The comparison itself failed: its sample is masked."""


@dataclass(frozen=True)
class MathVerdict:
    """equal is False unless status is ok. method: what decided: text, exact or symbolic; empty where nothing did."""

    equal: bool
    status: MathStatus = MathStatus.OK
    method: str = ""
    message: str = ""


class MathArgs(BaseModel):
    """What `args` of the reward `math` may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    plain_numbers: bool = False
    """Where the answer is a number, take only a number or a fraction for it: `12 * 13` is no answer to itself."""
    optional_percent: bool = False
    """Let the percent sign be missing on one side: `50` for `50%`, as sets that ask "what percent" have it."""
    marker: str | None = Field(default=None, min_length=1)
    """Take what follows the last of these on its line, `Answer:` say, for the answer, and no box or other mark."""


class _NeedsSymbolsError(Exception):
    """A leaf is no rational number."""


def math_reward(
    prompt: str,
    completion: str,
    *,
    answer: object,
    plain_numbers: bool = False,
    optional_percent: bool = False,
    marker: str | None = None,
) -> Score:
    """1.0 when the completion's final answer equals the column `answer`, else 0.0; also where it has no answer to read.

    Parts: `correct` and `parsed` (an answer was found and could be read), each 0 or 1. The score is an error, which
    masks the sample, where the data set's answer cannot be read, or where the comparison itself fails.
    """
    gold = _gold_text(answer)
    found = extract_answer(completion, marker)
    if found is None:
        missing = MathVerdict(False, MathStatus.UNPARSED_PREDICTION, message="it has no final answer")
        verdict = _gold_mistake(gold) or missing
    else:
        verdict = is_equal(gold, rf"\boxed{{{found}}}")
        signs = [PERCENT.search(text) for text in (gold, found)]
        if optional_percent and not verdict.equal and (signs[0] is None) != (signs[1] is None):
            verdict = is_equal(PERCENT.sub("", gold), rf"\boxed{{{PERCENT.sub('', found)}}}")
        if plain_numbers and verdict.equal and _is_plain_number(gold) and not _is_plain_number(found):
            verdict = MathVerdict(False, verdict.status, verdict.method, "the answer is a sum yet to be worked out")
    info = {"math": verdict.status.value, "method": verdict.method} | (
        {"message": verdict.message} if verdict.message else {}
    )
    if verdict.status in (MathStatus.UNPARSED_GOLD, MathStatus.ERROR):
        message = f"math: {verdict.status.value}: {verdict.message}"
        return Score(0.0, ScoreStatus.ERROR, info={"math": verdict.status.value}, message=message)
    parts = {"correct": float(verdict.equal), "parsed": float(verdict.status is MathStatus.OK)}
    return Score(float(verdict.equal), parts=parts, info=info)


def _gold_text(answer: object) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise RewardError(f"the column answer must be text or a number, got {str(answer)[:60]!r}; mend the data set")
    return str(answer)


def _is_plain_number(text: str) -> bool:
    """A number as it is written down: a decimal, a fraction or a mixed number, with a sign and a unit at most."""
    try:
        tree = parse_answer(tokens_of(_answer_text(text))).tree
    except UnparsedError:
        return False
    while tree is not None and tree[0] == "*" and tree[1] == ("number", -1):
        tree = tree[2]
    parts = () if tree is None else tree[1:] if tree[0] == "/" else (tree,)
    return bool(parts) and all(part[0] == "number" for part in parts)


def is_equal(gold: str, prediction: str, *, pool: MathPool | None = None) -> MathVerdict:
    """Whether a prediction equals the gold answer. Either may be a whole text with its answer marked (math_extract.py).

    Never raises, and never evaluates either text in this process.
    """
    try:
        gold_text = _answer_text(gold)
        gold_tokens = tokens_of(gold_text)
        gold_answer = _readable(gold_tokens)
    except UnparsedError as error:
        return MathVerdict(False, MathStatus.UNPARSED_GOLD, message=f"the data set's answer cannot be read: {error}")
    try:
        found_text = _answer_text(prediction)
        found_tokens = tokens_of(found_text)
        if found_tokens == gold_tokens:
            return MathVerdict(True, method="text")
        found_answer = _checked(parse_answer(found_tokens))
    except UnparsedError as error:
        return MathVerdict(False, MathStatus.UNPARSED_PREDICTION, message=f"the answer cannot be read: {error}")
    if gold_answer is None:
        message = "the data set's answer can be compared as text only"
        return MathVerdict(False, MathStatus.UNPARSED_GOLD, message=message)
    try:
        return MathVerdict(answers_equal(gold_answer, found_answer, RATIONAL_LEAVES), method="exact")
    except _NeedsSymbolsError:
        return _symbolic(gold_text, found_text, pool or shared_pool())


def _gold_mistake(gold: str) -> MathVerdict | None:
    """What is_equal would say of the gold answer, whatever the prediction."""
    verdict = is_equal(gold, r"\text{none}")
    return verdict if verdict.status is MathStatus.UNPARSED_GOLD else None


def _symbolic(gold: str, found: str, pool: MathPool) -> MathVerdict:
    reply = pool.compare(gold, found)
    if "equal" in reply:
        return MathVerdict(bool(reply["equal"]), method="symbolic")
    message = str(reply.get("limit") or reply.get("error"))
    if "limit" in reply:
        if "equal" in pool.compare(gold, None):
            return MathVerdict(False, MathStatus.TIMEOUT, message=f"comparing with the answer: {message}")
        return MathVerdict(False, MathStatus.UNPARSED_GOLD, message=f"evaluating the data set's answer: {message}")
    return MathVerdict(False, MathStatus.ERROR, message=message)


def _answer_text(text: str) -> str:
    found = extract_answer(text)
    if found is None and "\\boxed" in text:
        raise UnparsedError("its box is never closed")
    return without_thinking(text) if found is None else found


def _readable(tokens: list[Token]) -> Answer | None:
    """The gold answer; None where it can only be compared as text, as it has two readings or is too large."""
    if any(kind in ("word", "text") and str(value).lower() == "nan" for kind, value in tokens):
        raise UnparsedError("nan is no value")
    try:
        return _checked(parse_answer(tokens))
    except UnparsedError:
        return None


def _checked(answer: Answer) -> Answer:
    """The answer, whose numbers are all small enough to compute with."""
    for tree in _trees(answer):
        if exact_value(tree) is None:
            _check_small(tree)
    return answer


def _trees(answer: Answer) -> Iterator[Tree]:
    if answer.tree is not None:
        yield answer.tree
    for item in answer.items:
        yield from _trees(item)


def _check_small(tree: Tree) -> None:
    kind = tree[0]
    if kind in ("symbol", "constant"):
        return
    value = exact_value(tree)
    if value is not None:
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_WORKER_BITS:
            raise UnparsedError("a number is too large beside roots or variables")
        return
    for part in tree[2:] if kind == "call" else tree[1:]:
        _check_small(part)
    if kind == "^":
        exponent = exact_value(tree[2])
        if exponent is not None and abs(exponent) > 100:
            raise UnparsedError("an exponent is beyond 100")
    if kind == "!":
        raise UnparsedError("a factorial of something that is no number")


def _same_rationals(one: Tree, other: Tree) -> bool:
    if one == other:
        return True
    first, second = exact_value(one), exact_value(other)
    if first is None or second is None:
        raise _NeedsSymbolsError
    return first == second


def _never(one: Tree, other: Tree) -> bool:
    raise _NeedsSymbolsError


RATIONAL_LEAVES = Leaves(_same_rationals, _never)
