"""What a step's scored groups say before any training: rewards, dead groups, lengths and stop reasons."""

import itertools
from collections.abc import Sequence

from cispo.metrics import Max, Mean, Std, StepMetrics
from cispo.types import ScoredGroup, ScoreStatus, StopReason

_ROUNDING = 1e-9
"""Rewards are sums of weighted parts, so the full reward may miss its value by rounding."""


def add_groups(metrics: StepMetrics, groups: Sequence[ScoredGroup], *, full_reward: float) -> None:
    """Add the rows reward/, group/frac_, completion/ and stop/ of the metric table.

    full_reward: the reward of a completion that is right in every way. Completions whose reward failed count in
    reward/frac_error, completion/ and stop/ only; a group in which all failed is neither solved nor mixed.
    """
    for group in groups:
        values = [score.value for score in group.scores if score.status is ScoreStatus.OK]
        metrics.add("reward/std", Std(tuple(values)))
        for value in values:
            metrics.add("reward/mean", Mean(value))
        solved = [value >= full_reward - _ROUNDING for value in values]
        metrics.add("group/frac_solved_all", Mean(bool(values) and all(solved)))
        metrics.add("group/frac_solved_none", Mean(bool(values) and not any(solved)))
        metrics.add("group/frac_mixed", Mean(bool(values) and max(values) - min(values) > _ROUNDING))
    for score in itertools.chain.from_iterable(group.scores for group in groups):
        metrics.add("reward/frac_error", Mean(score.status is not ScoreStatus.OK))
        for part, value in score.parts.items() if score.status is ScoreStatus.OK else ():
            metrics.add(f"reward/{part}/mean", Mean(value))
    for rollout in itertools.chain.from_iterable(group.rollouts for group in groups):
        metrics.add("completion/length_tokens/mean", Mean(rollout.completion_length_tokens))
        metrics.add("completion/length_tokens/max", Max(rollout.completion_length_tokens))
        metrics.add("completion/frac_truncated", Mean(rollout.is_truncated))
        metrics.add("completion/frac_interrupted", Mean(rollout.is_interrupted))
        for reason in StopReason:
            metrics.add(f"stop/{reason}", Mean(rollout.stop_reason is reason))
