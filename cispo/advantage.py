"""Advantages relative to the group: what a completion's score says beside those of its siblings. Loads no torch.

MiniMax-M1 eq. 2: `A_i = (R_i - mean{R_j}) / std{R_j}`, one number a completion, the same for all its tokens. A score
whose status is ERROR takes no part in mean or std and its completion gets no gradient. A group whose scores are all
equal says nothing; it is dropped and counted (DAPO's dynamic sampling, without sampling again).

Shape suffix: G group size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from cispo.types import BoolArray, ScoredGroup, ScoreStatus

Float64Array = npt.NDArray[np.float64]

EQUAL_SCORES_TOLERANCE = 1e-12
"""Scores that differ by less than this part of the largest are one score whose parts were rounded differently."""


class AdvantageSettings(BaseModel):
    """How scores become advantages."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    baseline: Literal["group_mean"] = "group_mean"
    """What is subtracted from a score: the mean of its group."""
    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """What the difference is divided by: its group's std (eq. 2), the std of all differences trained on, or nothing."""
    epsilon: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    """Added to the std."""
    drop_zero_variance: bool = True
    """Leave out groups whose scores are all equal, so that they weigh nothing in the means over a mini batch."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupAdvantages:
    """Advantages of one group; `group` is its index in the batch.

    advantage_G is 0 where the sample is masked or the group's scores are all equal.
    """

    group: int
    advantage_G: Float64Array
    is_scored_G: BoolArray
    is_zero_variance: bool


@dataclass(frozen=True, slots=True, eq=False)
class AdvantageBatch:
    """All groups' advantages in the batch's order, and the indices of those that are trained on."""

    groups: tuple[GroupAdvantages, ...]
    kept: tuple[int, ...]

    @property
    def dropped(self) -> int:
        """Groups left out: their scores are all equal, or none of them is a score."""
        return len(self.groups) - len(self.kept)


def group_advantages(groups: Sequence[ScoredGroup], settings: AdvantageSettings) -> AdvantageBatch:
    """Advantages of a generation batch, in float64.

    The std is the population's (divided by the count, not the count less one). `batch_std` is taken over the samples of
    the groups that are kept.
    """
    centred = [_centre(index, group, settings) for index, group in enumerate(groups)]
    kept = tuple(
        group.group
        for group in centred
        if group.is_scored_G.any() and not (group.is_zero_variance and settings.drop_zero_variance)
    )
    if settings.scale == "batch_std" and kept:
        differences = np.concatenate([centred[index].advantage_G[centred[index].is_scored_G] for index in kept])
        spread = float(differences.std())
        # When every kept group has equal scores (nothing was dropped), all differences are 0 and stay so.
        centred = [_divide(group, spread + settings.epsilon) if spread > 0 else group for group in centred]
    return AdvantageBatch(groups=tuple(centred), kept=kept)


def _centre(index: int, group: ScoredGroup, settings: AdvantageSettings) -> GroupAdvantages:
    is_scored_G = np.array([score.status is ScoreStatus.OK for score in group.scores], dtype=np.bool_)
    score_G = np.array([score.value for score in group.scores], dtype=np.float64)
    advantage_G = np.zeros(len(group.scores), dtype=np.float64)
    scored = score_G[is_scored_G]
    is_zero_variance = _all_equal(scored)
    if not is_zero_variance:
        advantage_G[is_scored_G] = scored - scored.mean()
        if settings.scale == "group_std":
            advantage_G /= scored.std() + settings.epsilon
    return GroupAdvantages(index, advantage_G, is_scored_G, is_zero_variance)


def _all_equal(scores: Float64Array) -> bool:
    # Never asked of the std: the mean of n equal floats need not be that float, so theirs need not be 0.
    if len(scores) < 2:
        return True
    return bool(np.ptp(scores) <= EQUAL_SCORES_TOLERANCE * np.abs(scores).max())


def _divide(group: GroupAdvantages, divisor: float) -> GroupAdvantages:
    return GroupAdvantages(group.group, group.advantage_G / divisor, group.is_scored_G, group.is_zero_variance)
