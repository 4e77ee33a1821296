"""What a reward function returned or raised, as a Score; an error says why it is no finite number or sound Score."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from cispo.errors import DeadlineError, RewardError
from cispo.rewards.loaded import LoadedReward
from cispo.rewards.resolve import describe_error, one_line
from cispo.types import Rollout, Score, ScoreStatus

PART_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
SHOWN_CHARS = 60


def as_score(reward: LoadedReward, prompt_id: str, rollout: Rollout, outcome: object) -> Score:
    """Never raises; the message of an error names the reward, its file and the completion."""
    try:
        return _checked(outcome, reward.file)
    except RewardError as error:
        file = f" ({reward.file})" if reward.file else ""
        where = f"prompt {prompt_id!r}, completion {rollout.completion_index}"
        message = one_line(f"reward {reward.label!r}{file}: {error}; {where}")
        return Score(0.0, ScoreStatus.ERROR, info=_info_of_error(outcome), message=message)


def add_scores(rewards: Sequence[LoadedReward], scores: Sequence[Score]) -> Score:
    """The weighted sum, with each reward's value under its label beside its own parts; an error when one of them is."""
    value = 0.0
    info: dict[str, Any] = {}
    messages: list[str] = []
    parts = {reward.label: score.value for reward, score in zip(rewards, scores, strict=True)}
    for reward, score in zip(rewards, scores, strict=True):
        for name, detail in score.info.items():
            if info.get(name, detail) != detail:
                name = f"{reward.label}.{name}"
            info[name] = detail
        if score.status is not ScoreStatus.OK:
            messages.append(score.message)
            del parts[reward.label]
            continue
        value += reward.settings.weight * score.value
        parts |= {name if name not in parts else f"{reward.label}.{name}": part for name, part in score.parts.items()}
    if not messages and not math.isfinite(value):
        messages.append(f"the weighted sum of the rewards is {value}; lower a weight")
    if messages:
        return Score(0.0, ScoreStatus.ERROR, parts, info, " | ".join(messages))
    return Score(value, ScoreStatus.OK, parts, info)


def _checked(outcome: object, file: str | None) -> Score:
    if isinstance(outcome, RewardError | DeadlineError):
        raise RewardError(one_line(outcome))
    if isinstance(outcome, BaseException):
        raise RewardError(f"raised {describe_error(outcome, file)}")
    if not isinstance(outcome, Score):
        return Score(_finite(outcome, ""))
    if outcome.status is not ScoreStatus.OK:
        raise RewardError(outcome.message or "returned a Score with status error and no message")
    value = _finite(outcome.value, "a Score whose value is ")
    return Score(value, ScoreStatus.OK, _checked_parts(outcome.parts), _checked_info(outcome.info))


def _checked_parts(parts: object) -> dict[str, float]:
    if not isinstance(parts, Mapping):
        raise RewardError(f"returned a Score whose parts are {_shown(parts)}; give a dict of floats by name")
    for name in parts:
        if not isinstance(name, str) or not PART_NAME.fullmatch(name):
            raise RewardError(f"returned a Score with a part named {_shown(name)}; use letters, digits and _ . -")
    return {name: _finite(value, f"a Score whose part {name!r} is ") for name, value in parts.items()}


def _checked_info(info: object) -> dict[str, Any]:
    """Info goes to the rollout log, which is JSON; better an error here than one when the step is written."""
    try:
        if not isinstance(info, Mapping):
            raise TypeError("it is no dict")
        json.dumps(dict(info), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(f"returned a Score whose info is no JSON object ({one_line(error)})") from error
    return dict(info)


def _info_of_error(outcome: object) -> dict[str, Any]:
    try:
        return _checked_info(outcome.info) if isinstance(outcome, Score) else {}
    except RewardError:
        return {}


def _finite(value: object, what: str) -> float:
    """Booleans are refused: as a rule they are a comparison that somebody forgot to turn into a reward."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RewardError(f"returned {what}{_shown(value)}; return a float")
    try:
        number = float(value)
    except (OverflowError, ValueError, TypeError) as error:
        raise RewardError(f"returned {what}{_shown(value)} ({one_line(error)}); return a float") from error
    if not math.isfinite(number):
        raise RewardError(f"returned {what}{number}; return a finite number")
    return number


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # the value is a user's own, and its __repr__ may raise anything
        text = "something"
    return f"{one_line(text)[:SHOWN_CHARS]} of type {type(value).__name__}"
