"""Which prompts a step trains on when solved ones are left out for good: ScaleRL's no-positive-resampling.

ScaleRL (arXiv 2510.13786) keeps the pass rate of every prompt, and one that is solved at a rate of 0.9 is not sampled
again in later passes over the data: its groups would be all right, and teach nothing. Which prompts a pass has is
settled when its first step is asked for, so within a pass each comes once at most, whatever is learned meanwhile. The
table is part of a checkpoint; with it, a resumed run goes on with the same prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cispo.errors import CheckpointError
from cispo.prompt_order import StepPrompts, epoch_order
from cispo.types import Prompt, ScoredGroup, ScoreStatus


@dataclass(frozen=True, slots=True)
class _Pass:
    """A pass over the data: its first step and the prompts that it leaves out."""

    first_step: int
    without: frozenset[str]


class UnsolvedPrompts:
    """The prompts of each step; `record` tells what was solved. Until something is, they are those of prompts_of_step.

    solved_at: the pass rate, in (0, 1], of a prompt's newest group from which on it is left out. As many prompts stay
    as a step takes: of more that are solved, those solved best go. ValueError when there are fewer prompts than that.
    """

    def __init__(self, prompts: Sequence[Prompt], per_step: int, *, seed: int, solved_at: float) -> None:
        if len(prompts) < per_step:
            raise ValueError(f"{len(prompts)} prompts are fewer than {per_step} of a step; lower prompts_per_step")
        self._prompts = list(prompts)
        self._per_step = per_step
        self._seed = seed
        self._solved_at = solved_at
        self._rates: dict[str, float] = {}
        self._passes = [_Pass(1, frozenset())]

    def prompts_of_step(self, step: int) -> StepPrompts:
        """The prompts of a step, counted from 1. A step of a pass to come settles what that pass leaves out."""
        while step >= self._end(self._passes[-1]):
            self._passes.append(_Pass(self._end(self._passes[-1]), self._solved()))
        epoch = max(index for index, its in enumerate(self._passes) if its.first_step <= step)
        its = self._passes[epoch]
        order = [p for p in epoch_order(self._prompts, seed=self._seed, epoch=epoch) if p.id not in its.without]
        start = (step - its.first_step) * self._per_step
        return StepPrompts(tuple(order[start : start + self._per_step]), epoch)

    def record(self, groups: Iterable[ScoredGroup]) -> None:
        """Take the pass rates of a step's groups; completions whose reward failed count for nothing."""
        for group in groups:
            right = [score.is_correct for score in group.scores if score.status is ScoreStatus.OK]
            if right:
                self._rates[group.prompt.id] = sum(right) / len(right)

    def left_out(self, step: int) -> int:
        """How many prompts the pass of a step that was asked for leaves out."""
        return len(max((its for its in self._passes if its.first_step <= step), key=lambda its: its.first_step).without)

    def state_dict(self) -> dict[str, Any]:
        """The table of pass rates and what each pass leaves out, as JSON takes it."""
        passes = [{"first_step": its.first_step, "without": sorted(its.without)} for its in self._passes]
        return {"pass_rates": dict(self._rates), "passes": passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. CheckpointError where it is none, or names prompts that are not there."""
        try:
            rates = {str(name): float(rate) for name, rate in state["pass_rates"].items()}
            passes = [_Pass(int(its["first_step"]), frozenset(its["without"])) for its in state["passes"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint has no table of pass rates ({type(error).__name__}: {error}); it is of a run that "
                "left no solved prompts out: resume it with the same recipe"
            ) from error
        strange = {name for its in passes for name in its.without} - {prompt.id for prompt in self._prompts}
        if strange or not passes:
            raise CheckpointError(
                f"the checkpoint leaves out the prompt {min(strange, default='')!r}, which the data lack; "
                "resume the run with the data it was started with"
            )
        self._rates, self._passes = rates, passes

    def _end(self, its: _Pass) -> int:
        """The first step after a pass."""
        return its.first_step + (len(self._prompts) - len(its.without)) // self._per_step

    def _solved(self) -> frozenset[str]:
        """The prompts solved by now, the best solved first where not all may go; in ties by their place in the data."""
        solved = [prompt.id for prompt in self._prompts if self._rates.get(prompt.id, 0.0) >= self._solved_at]
        solved.sort(key=lambda name: -self._rates[name])
        return frozenset(solved[: len(self._prompts) - self._per_step])
