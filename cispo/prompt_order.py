"""Which prompts a step trains on: a function of the seed and the step alone, so resuming needs no cursor."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cispo.types import Prompt


@dataclass(frozen=True, slots=True)
class StepPrompts:
    """The prompts of one step, in order, and the pass over the data that the step begins in."""

    prompts: tuple[Prompt, ...]
    epoch: int


def prompts_of_step(prompts: Sequence[Prompt], per_step: int, *, seed: int, step: int) -> StepPrompts:
    """Prompts of step 1, 2, ...: each pass over the data is shuffled anew, and a pass ends with its last whole step.

    No prompt comes twice in a step, nor in a pass. Raises ValueError when there are fewer prompts than a step takes.
    """
    steps_per_epoch = len(prompts) // per_step
    if steps_per_epoch < 1:
        raise ValueError(f"{len(prompts)} prompts are fewer than the {per_step} of one step; lower prompts_per_step")
    epoch, at = divmod(step - 1, steps_per_epoch)
    return StepPrompts(tuple(epoch_order(prompts, seed=seed, epoch=epoch)[at * per_step : (at + 1) * per_step]), epoch)


def epoch_order(prompts: Sequence[Prompt], *, seed: int, epoch: int) -> list[Prompt]:
    """All prompts in the order of one pass over the data, counted from 0."""
    order = list(range(len(prompts)))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return [prompts[index] for index in order]
