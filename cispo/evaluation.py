"""Measuring a policy on prompts it is not trained on, and the gain between two measurements."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from cispo.crew import Crew
from cispo.data import load_prompts
from cispo.recipe.rollout_schema import RolloutSettings
from cispo.recipe.schema import FIRST_SET, EvaluationSettings, HeldoutSettings
from cispo.rollout.recipe_request import group_request
from cispo.sampler import Progress
from cispo.statistics import Estimate, PromptOutcome, evaluation_metrics, paired_gain, pass_at_1
from cispo.types import Prompt, ScoredGroup, ScoreStatus

_NO_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
"""What may not stand in the name of a metric."""


@dataclass(frozen=True, slots=True)
class HeldoutSet:
    """Prompts that are measured under one name, and how."""

    name: str
    settings: HeldoutSettings
    prompts: tuple[Prompt, ...]


def load_heldout(evaluation: EvaluationSettings | None, *, base_path: Path) -> list[HeldoutSet]:
    """Every set that a recipe measures, the first one first; none without the section. Raises as load_prompts does."""
    sets = evaluation.sets if evaluation is not None else {}
    return [
        HeldoutSet(name, settings, tuple(load_prompts(settings.data, base_path=base_path)))
        for name, settings in sets.items()
    ]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one measurement found, prompt by prompt in their order."""

    outcomes: tuple[PromptOutcome, ...]
    name: str = FIRST_SET
    """What its metrics are named by."""
    first_error: str = ""
    """What the reward said where it failed first."""
    parts: tuple[str, ...] = ()
    """The value of `evaluation.by` of each prompt; empty without that setting."""
    pass_at: tuple[int, ...] = ()
    """Further k that pass@k is given for."""

    def metrics(self) -> dict[str, float]:
        """Over all prompts as eval/NAME/..., and as eval/NAME.PART/... over those of each part."""
        metrics = evaluation_metrics(self.name, self.outcomes, pass_at=self.pass_at)
        for part in dict.fromkeys(self.parts):
            chosen = [outcome for outcome, its in zip(self.outcomes, self.parts, strict=True) if its == part]
            name = f"{self.name}.{_NO_NAME.sub('_', part)}"
            metrics |= evaluation_metrics(name, chosen, pass_at=self.pass_at)
        return metrics

    @property
    def title(self) -> str:
        """What it is called in lines for people."""
        return "held-out" if self.name == FIRST_SET else f"held-out {self.name}"

    @property
    def scored_completions(self) -> int:
        return sum(len(outcome.correct) for outcome in self.outcomes)

    @property
    def pass_at_1(self) -> Estimate:
        """ValueError where no completion could be scored."""
        return pass_at_1([outcome.correct for outcome in self.outcomes])

    @property
    def well_formed(self) -> float:
        """Share of the scored completions that are well-formed; 0 where none could be scored."""
        flags = [flag for outcome in self.outcomes for flag in outcome.well_formed]
        return sum(flags) / len(flags) if flags else 0.0

    @property
    def correct_given_form(self) -> float:
        """Share of the well-formed completions that are right; 0 where none is well-formed."""
        pairs = [p for outcome in self.outcomes for p in zip(outcome.correct, outcome.well_formed, strict=True)]
        formed = [correct for correct, is_formed in pairs if is_formed]
        return sum(formed) / len(formed) if formed else 0.0

    def __str__(self) -> str:
        errors = sum(outcome.errors for outcome in self.outcomes)
        failed = f"; the reward of {errors} more failed" if errors else ""
        reason = f"; the first: {self.first_error}" if self.first_error else ""
        if not self.scored_completions:
            prompts = len(self.outcomes)
            return f"pass@1 unknown: the reward failed on all {errors} completions of {prompts} prompts{reason}"
        return (
            f"pass@1 {self.pass_at_1} (95% interval; {len(self.outcomes)} prompts, {self.scored_completions} "
            f"completions{failed}), well-formed {self.well_formed:.3f}, "
            f"correct given form {self.correct_given_form:.3f}{reason}"
        )


def evaluate(crew: Crew, heldout: HeldoutSet, rollout: RolloutSettings, progress: Progress) -> Evaluation:
    """Sample and score completions of every prompt of a set. The same weights always give the same outcome.

    Goes before groups that are sampled for training at the same time. rollout: what ends a completion.
    """
    settings = heldout.settings
    size, temperature = settings.completions_per_prompt, settings.temperature
    stream = "evaluation" if heldout.name == FIRST_SET else f"evaluation {heldout.name}"
    requests = [
        replace(group_request(prompt, rollout, group_size=size, temperature=temperature, stream=stream), priority=1)
        for prompt in heldout.prompts
    ]
    found = crew.sample_and_score(requests, progress)
    outcomes = {group.prompt.id: _outcome(group) for group in found.groups}
    unsampled = PromptOutcome((), (), (), (), errors=size)
    failed = (score.message for group in found.groups for score in group.scores if score.status is not ScoreStatus.OK)
    parts = tuple(str(prompt.row[settings.by]) for prompt in heldout.prompts) if settings.by is not None else ()
    return Evaluation(
        tuple(outcomes.get(prompt.id, unsampled) for prompt in heldout.prompts),
        heldout.name,
        next(failed, next(iter(found.failed.values()), "")),
        parts,
        settings.pass_at,
    )


def _outcome(group: ScoredGroup) -> PromptOutcome:
    scored = [
        (rollout, score)
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
        if score.status is ScoreStatus.OK
    ]
    return PromptOutcome(
        correct=tuple(score.is_correct for _, score in scored),
        well_formed=tuple(
            score.parts.get("well_formed", 1.0) >= 1.0 and not rollout.is_truncated for rollout, score in scored
        ),
        rewards=tuple(score.value for _, score in scored),
        lengths_tokens=tuple(rollout.completion_length_tokens for rollout, _ in scored),
        errors=len(group.rollouts) - len(scored),
    )


def describe_gain(before: Evaluation, after: Evaluation) -> list[str]:
    """The gain in pass@1 with its interval, and how much of it is form and how much correctness.

    pass = form * (correct given form), so a gain splits exactly into the two: each factor's change at the mean of the
    other.
    """
    lines = [f"{before.title} before: {before}", f"{after.title} after:  {after}"]
    pairs = zip(before.outcomes, after.outcomes, strict=True)
    if sum(bool(b.correct and a.correct) for b, a in pairs) < 2:
        return [*lines, "gain unknown: it takes at least 2 prompts that were scored both before and after"]
    gain = paired_gain([o.correct for o in before.outcomes], [o.correct for o in after.outcomes])
    form = (after.well_formed - before.well_formed) * (after.correct_given_form + before.correct_given_form) / 2
    correctness = (after.correct_given_form - before.correct_given_form) * (after.well_formed + before.well_formed) / 2
    return [
        *lines,
        f"gain {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]: "
        f"{form:+.3f} by form, {correctness:+.3f} by correctness",
    ]
