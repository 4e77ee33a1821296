"""Staged limits on the length of completions: MiniMax-M1's way from 40K to 80K tokens (arXiv 2506.13585, section 5).

A run begins with the shortest limit. It takes the next one when two gates are open: perplexity on what the policy
samples has converged, and the 99th percentile of lengths is near the limit, so that it is the limit that holds them
back. The report gives the limits and the gates but no thresholds; the defaults of those are ours.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

M1_LIMITS = tuple(1024 * thousands for thousands in (40, 48, 56, 64, 72, 80))
"""Tokens of a completion at each of M1's stages."""


class LengthWindows(BaseModel):
    """The limits and when each is left for the next."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    limits: tuple[int, ...] = Field(default=M1_LIMITS, min_length=1)
    """Tokens of a completion at each stage, in rising order."""
    steps: int = Field(default=10, ge=1)
    """Training steps whose mean is compared with that of as many before; a stage lasts twice as many at least."""
    max_perplexity_change: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    """Largest relative change between the two means at which perplexity counts as converged."""
    min_p99_share: float = Field(default=0.9, gt=0, le=1)
    """Smallest share of the limit that the 99th percentile of lengths must have, in the mean of the last steps."""

    @model_validator(mode="after")
    def _limits_rise(self) -> Self:
        if self.limits[0] < 1 or any(second <= first for first, second in pairwise(self.limits)):
            raise ValueError(f"limits must be positive and rise, got {list(self.limits)}")
        return self


def next_stage(windows: LengthWindows, stage: int, perplexities: Sequence[float], p99_tokens: Sequence[float]) -> int:
    """The stage of the next step, this one or the one after it.

    stage: an index of `windows.limits`. perplexities, p99_tokens: of each step since the stage began, the perplexity
    of the completions under the policy that sampled them, and the 99th percentile of their lengths. They are all that
    it depends on, so a run that is resumed from its metrics goes on alike.
    """
    steps = windows.steps
    if stage + 1 == len(windows.limits) or len(perplexities) < 2 * steps:
        return stage
    before, last = np.mean(perplexities[-2 * steps : -steps]), np.mean(perplexities[-steps:])
    has_converged = abs(last - before) <= windows.max_perplexity_change * before
    is_near_limit = np.mean(p99_tokens[-steps:]) >= windows.min_p99_share * windows.limits[stage]
    return stage + 1 if has_converged and is_near_limit else stage
