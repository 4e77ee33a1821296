"""Doing an update of a run again from what its folder keeps: `cispo replay RUN STEP`.

The learner starts from the newest checkpoint before the step, or as the run did, and trains on the batches that were
kept. On CPU the weights come out with the checksum that the schedule has of them, or something is damaged.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cispo.actors import load_decoder, new_learner, prepare_process
from cispo.broadcast import weights_checksum
from cispo.checkpoint import list_checkpoints, load_checkpoint
from cispo.errors import RunFolderError
from cispo.recipe.load import load_train
from cispo.recipe.schema import TrainRecipe
from cispo.resources import resolve_policy
from cispo.run_folder import RECIPE, batch_path
from cispo.schedule import read_batch, read_schedule


@dataclass(frozen=True, slots=True)
class Replayed:
    """A step done again. expected: the run's checksum, or None where engine and learner shared one copy."""

    step: int
    checksum: str
    expected: str | None

    def __str__(self) -> str:
        if self.expected is None:
            return f"step {self.step}: weights {self.checksum}; the run kept no checksum of them"
        same = "as in the run" if self.checksum == self.expected else f"but {self.expected} in the run"
        return f"step {self.step}: weights {self.checksum}, {same}"


def replay(run: Path, step: int) -> Iterator[Replayed]:
    """Do the steps from the last checkpoint before `step` up to it again, one by one.

    RunFolderError where the folder holds no such run or step.
    """
    if not (run / RECIPE).is_file():
        raise RunFolderError(f"{run} is no run folder; name one, such as runs/code")
    recipe = load_train(run / RECIPE).recipe
    records = read_schedule(run)
    if step not in records:
        raise RunFolderError(f"{run} has no step {step} in its schedule; it goes from {min(records)} to {max(records)}")
    prepare_process(len(os.sched_getaffinity(0)))
    learner, done = _start(recipe, run, step)
    for again in range(done + 1, step + 1):
        learner.train(read_batch(batch_path(run, again)), again)
        yield Replayed(again, weights_checksum(learner.policy_tensors()), records[again].weights)


def _start(recipe: TrainRecipe, run: Path, step: int) -> tuple[Any, int]:
    """A learner as it was before the step, or before earlier ones, and the last step that it has done."""
    policy_path = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    learner = new_learner(recipe, policy_path, load_decoder(recipe, policy_path))
    earlier = [path for path in list_checkpoints(run / "checkpoints") if int(path.name.removeprefix("step_")) < step]
    if not earlier:
        return learner, 0
    checkpoint = load_checkpoint(earlier[-1])
    learner.load_state_dict(checkpoint.learner_state)
    return learner, checkpoint.step
