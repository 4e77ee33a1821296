"""Advice while a run goes on: rules over the metrics of its last steps, each a pure function that a test holds to.

A rule takes the history (metrics of the steps so far, the newest last) and returns a finding per subject, or nothing.
Healthy ranges and remedies are those of the metric table, so the page of metrics and the advice cannot disagree.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from cispo.metric_table import Metric, find_metric

History = Sequence[Mapping[str, float]]
Findings = dict[str, str]
"""What was found, by the name of the metric it is about."""
Rule = Callable[[History], Findings]

HISTORY_STEPS = 50
PATIENCE_STEPS = 3
"""Noisy metrics are pointed out when they were outside their range this many times in a row."""


def not_finite(history: History) -> Findings:
    """NaN or infinity in any metric."""
    bad = {name: value for name, value in history[-1].items() if not math.isfinite(value)}
    remedy = "look at the rollouts of this step with `cispo view`, then lower learner.learning_rate"
    return {name: f"{name} is {value}: {remedy}" for name, value in bad.items()}


def out_of_range(history: History) -> Findings:
    """Metrics outside the healthy range of the table, with the table's remedy."""
    findings = {}
    for name, value in history[-1].items():
        metric = find_metric(name)
        if metric is None or not math.isfinite(value):
            continue
        recent = values_of(history, name)[-_patience(metric) :]
        if len(recent) == _patience(metric) and not any(map(metric.is_healthy, recent)):
            findings[name] = f"{name} is {value:.3g} (healthy: {metric.healthy}): {metric.action}"
    return findings


def grad_norm_spike(history: History) -> Findings:
    """A gradient norm more than 10 times the median of the steps before."""
    values = values_of(history, "optim/grad_norm")
    if "optim/grad_norm" not in history[-1] or len(values) < 6:
        return {}
    usual = median(values[:-1])
    if not values[-1] > 10 * usual > 0:
        return {}
    remedy = "if it lasts, lower learner.learning_rate; read this step's rollouts for something unusual"
    return {"optim/grad_norm": f"optim/grad_norm is {values[-1]:.3g}, usually {usual:.3g}: {remedy}"}


def entropy_collapse(history: History) -> Findings:
    """Entropy below a quarter of what the run began with."""
    values = values_of(history, "policy/entropy")
    if len(values) < 10 or "policy/entropy" not in history[-1]:
        return {}
    before, now = median(values[:5]), median(values[-3:])
    if not now < before / 4:
        return {}
    remedy = "exploration is ending: lower learner.learning_rate, raise objective.ratio_max, or mix in harder prompts"
    return {"policy/entropy": f"policy/entropy fell from {before:.3g} to {now:.3g}: {remedy}"}


def mismatch_rise(history: History) -> Findings:
    """A mismatch that was there and has grown tenfold."""
    name = "policy/mismatch/mean"
    values = values_of(history, name)
    if len(values) < 10 or name not in history[-1]:
        return {}
    before, now = median(values[:5]), median(values[-3:])
    if not now > 10 * before > 0:
        return {}
    return {name: f"{name} grew from {before:.3g} to {now:.3g}: check the broadcast and the precision of both sides"}


def reward_hacked(history: History) -> Findings:
    """Reward in training has risen since an evaluation that pass@1 has since fallen below, past its interval."""
    findings = {}
    for name in [name for name in history[-1] if name.startswith("eval/") and name.endswith("/pass@1")]:
        earlier = [(i, step[name]) for i, step in enumerate(history[:-1]) if name in step]
        if not earlier or f"{name}/high" not in history[-1]:
            continue
        place, best = max(earlier, key=lambda pair: pair[1])
        rewards = values_of(history[place:], "reward/mean")
        if history[-1][f"{name}/high"] < best and rewards and rewards[-1] > rewards[0]:
            remedy = "the reward may be gamed or the prompts overfitted: read high-reward rollouts with `cispo view`"
            findings[name] = f"{name} fell from {best:.3g} to {history[-1][name]:.3g} while the reward rose: {remedy}"
    return findings


RULES: tuple[Rule, ...] = (not_finite, out_of_range, grad_norm_spike, entropy_collapse, mismatch_rise, reward_hacked)


def values_of(history: History, name: str) -> list[float]:
    """The values of one metric in the steps that measured it."""
    return [metrics[name] for metrics in history if name in metrics]


def _patience(metric: Metric) -> int:
    """Bounds that admit no noise (all or nothing), and evaluations, which are rare, are pointed out at once."""
    is_exact = metric.high == 0.0 or metric.low == metric.high
    return 1 if is_exact or metric.name.startswith("eval/") else PATIENCE_STEPS


class Advisor:
    """Applies the rules after each step; the same rule speaks of the same metric once in `every_steps` steps."""

    def __init__(self, every_steps: int, rules: Sequence[Rule] = RULES) -> None:
        self._every_steps = every_steps
        self._rules = rules
        self._history: deque[Mapping[str, float]] = deque(maxlen=HISTORY_STEPS)
        self._given: dict[tuple[Rule, str], int] = {}

    def step(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The advice that is due after this step, one line each."""
        self._history.append(dict(metrics))
        history = list(self._history)
        due = []
        for rule in self._rules:
            for name, text in rule(history).items():
                if step - self._given.get((rule, name), step - self._every_steps) >= self._every_steps:
                    self._given[rule, name] = step
                    due.append(text)
        return due
