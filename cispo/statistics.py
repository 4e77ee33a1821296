"""Success rates with honest intervals: pass@1, pass@k, and the gain between two evaluations.

An evaluation has P prompts with k completions each, and completions of one prompt are alike, so P * k is not the number
of independent trials. The 95% interval of pass@1 is Wilson's score interval (Wilson 1927) at the effective number of
trials n = P p (1 - p) / var(rate of a prompt), as survey statistics do for clustered samples (Korn and Graubard 1998).
With k = 1 it is Wilson's interval itself. It never leaves [0, 1], never has width 0, and needs no random numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
"""The normal distribution's 97.5% point."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class PromptOutcome:
    """What evaluation found for the completions of one prompt, in order; those whose reward failed are only counted."""

    correct: tuple[bool, ...]
    well_formed: tuple[bool, ...]
    rewards: tuple[float, ...]
    lengths_tokens: tuple[int, ...]
    errors: int = 0


def pass_at_1(correct: Sequence[Sequence[bool]]) -> Estimate:
    """Mean over prompts of the mean over their completions; prompts without any are left out.

    Raises ValueError when no prompt has a completion.
    """
    rates = [sum(completions) / len(completions) for completions in correct if completions]
    if not rates:
        raise ValueError("pass@1 of no completions at all; evaluate at least one prompt")
    return _mean_of_rates(rates, sum(map(len, correct)))


def mean_pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> Estimate:
    """Mean over prompts of the unbiased pass@k; prompts without completions are left out.

    The interval is that of pass@1, over the prompts' estimates. ValueError when a prompt has fewer than k completions,
    or none has any.
    """
    rates = [pass_at_k(len(completions), sum(completions), k) for completions in correct if completions]
    if not rates:
        raise ValueError(f"pass@{k} of no completions at all; evaluate at least one prompt")
    return _mean_of_rates(rates, sum(map(len, correct)))


def mean_reward(rewards: Sequence[Sequence[float]]) -> Estimate:
    """Mean over prompts of the mean reward of their completions; prompts without any are left out.

    Normal interval over the prompts (sample variance), as rewards have no bounds; of one prompt it is the value alone.
    ValueError when no prompt has a completion.
    """
    means = [math.fsum(values) / len(values) for values in rewards if values]
    if not means:
        raise ValueError("the mean reward of no completions at all; evaluate at least one prompt")
    mean = math.fsum(means) / len(means)
    if len(means) == 1:
        return Estimate(mean, mean, mean)
    variance = math.fsum((value - mean) ** 2 for value in means) / (len(means) - 1)
    half = Z95 * math.sqrt(variance / len(means))
    return Estimate(mean, mean - half, mean + half)


def _mean_of_rates(rates: Sequence[float], completions: int) -> Estimate:
    """The mean of the prompts' rates, each in [0, 1], out of so many completions in all."""
    mean = min(1.0, math.fsum(rates) / len(rates))
    variance = math.fsum((rate - mean) ** 2 for rate in rates) / len(rates)
    # var <= p (1 - p), so the effective number lies between prompts and completions; at p = 0 or 1 nothing is known of
    # the likeness within a prompt, and the lower number is the safe one.
    trials = float(len(rates))
    if 0.0 < mean < 1.0:
        spread = mean * (1.0 - mean)
        trials = float(completions) if variance * completions <= spread * len(rates) else len(rates) * spread / variance
    return Estimate(mean, *wilson_interval(mean, trials))


def wilson_interval(rate: float, trials: float) -> tuple[float, float]:
    """Wilson's 95% score interval of a success rate in [0, 1] over a number of trials > 0."""
    centre = rate + Z95**2 / (2 * trials)
    half = Z95 * math.sqrt(rate * (1 - rate) / trials + Z95**2 / (4 * trials**2))
    scale = 1 + Z95**2 / trials
    # At rate 0 or 1 an end of the interval is the rate itself, which rounding must not push past it.
    return min(rate, max(0.0, (centre - half) / scale)), max(rate, min(1.0, (centre + half) / scale))


def pass_at_k(completions: int, correct: int, k: int) -> float:
    """Unbiased probability that at least one of k completions, drawn without replacement, is right.

    1 - C(n - c, k) / C(n, k), Chen et al. 2021 (Codex) equation 1. ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= completions or not 0 <= correct <= completions:
        raise ValueError(f"pass@{k} of {correct} right in {completions}; need 1 <= k and right, k <= completions")
    return 1.0 - math.comb(completions - correct, k) / math.comb(completions, k)


def paired_gain(before: Sequence[Sequence[bool]], after: Sequence[Sequence[bool]]) -> Estimate:
    """Gain in pass@1 between two evaluations of the same prompts in the same order.

    Normal interval over the prompts' differences (sample variance), which pairing makes narrow; clipped to [-1, 1].
    Meant for some 30 prompts and more: with few, or with no difference that varies, it is too narrow.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} prompts before, {len(after)} after; a gain is paired: take the same prompts")
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b and a]
    if len(pairs) < 2:
        raise ValueError(f"a gain over {len(pairs)} prompts has no interval; evaluate at least 2 prompts")
    differences = [sum(a) / len(a) - sum(b) / len(b) for b, a in pairs]
    mean = math.fsum(differences) / len(differences)
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    half = Z95 * math.sqrt(variance / len(differences))
    return Estimate(mean, max(-1.0, mean - half), min(1.0, mean + half))


def evaluation_metrics(
    name: str, outcomes: Sequence[PromptOutcome], *, pass_at: Sequence[int] = ()
) -> dict[str, float]:
    """The rows eval/{name}/... of the metric table.

    avg@k and the last pass@k are over the smallest number of completions that a prompt has; `pass_at` are further k,
    of which larger ones are left out. Raises ValueError when there is no outcome at all; when every reward failed only
    eval/{name}/frac_error is given.
    """
    usable = [outcome for outcome in outcomes if outcome.correct]
    completions = sum(len(outcome.correct) for outcome in usable)
    errors = sum(outcome.errors for outcome in outcomes)
    if completions + errors == 0:
        raise ValueError(f"evaluation {name!r} has no completions; evaluate at least one prompt")
    metrics = {"frac_error": errors / (completions + errors)}
    if usable:
        least = min(len(outcome.correct) for outcome in usable)
        correct = [outcome.correct for outcome in usable]
        estimates = {"pass@1": pass_at_1(correct)}
        for k in sorted({least, *pass_at} - {1}):
            if k <= least:
                estimates[f"pass@{k}"] = mean_pass_at_k(correct, k)
        estimates[f"avg@{least}"] = mean_reward([outcome.rewards for outcome in usable])
        for key, estimate in estimates.items():
            metrics |= {key: estimate.value, f"{key}/low": estimate.low, f"{key}/high": estimate.high}
        formed = [(c, w) for outcome in usable for c, w in zip(outcome.correct, outcome.well_formed, strict=True)]
        metrics["well_formed"] = sum(w for _, w in formed) / completions
        if any(w for _, w in formed):
            metrics["correct_given_form"] = sum(c for c, w in formed if w) / sum(w for _, w in formed)
        metrics["completion_length_tokens/mean"] = sum(sum(outcome.lengths_tokens) for outcome in usable) / completions
    return {f"eval/{name}/{key}": float(value) for key, value in metrics.items()}
