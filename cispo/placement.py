"""Who runs where: the actors of a run, their threads and their shares of the GPUs; loads neither torch nor ray."""

import math
from dataclasses import dataclass

from cispo.recipe.schema import TrainRecipe


@dataclass(frozen=True, slots=True)
class Placement:
    """colocated: engine and learner in one actor. GPU shares are Ray's num_gpus, 0 on a machine without."""

    colocated: bool
    rollout_threads: int
    learner_threads: int
    rollout_gpus: float
    learner_gpus: float


def place(recipe: TrainRecipe, *, cores: int, gpus: float) -> Placement:
    """The placement of a recipe's actors on so many CPU cores and GPUs."""
    workers = recipe.rollout.workers
    uses_gpu = recipe.policy.device != "cpu" and gpus > 0
    colocated = _is_colocated(recipe, is_single_gpu=uses_gpu and gpus < 2)
    is_ahead = recipe.rollout.max_off_policy_steps > 0 and not colocated
    # Side by side they share the cores; in turns each has all of them.
    rollout_cores = max(1, cores // 2) if is_ahead and not uses_gpu else cores
    learner_cores = max(1, cores - rollout_cores) if is_ahead and not uses_gpu else cores
    rollout_gpus, learner_gpus = _gpu_shares(workers, gpus, colocated=colocated) if uses_gpu else (0.0, 0.0)
    return Placement(
        colocated=colocated,
        rollout_threads=max(1, rollout_cores // workers),
        learner_threads=learner_cores,
        rollout_gpus=rollout_gpus,
        learner_gpus=learner_gpus,
    )


def _is_colocated(recipe: TrainRecipe, *, is_single_gpu: bool) -> bool:
    wanted = recipe.resources.placement
    return wanted == "colocated" or (wanted == "auto" and is_single_gpu and recipe.rollout.workers == 1)


def _gpu_shares(workers: int, gpus: float, *, colocated: bool) -> tuple[float, float]:
    """Of a rollout worker and of the learner. With several GPUs the learner has one to itself."""
    if colocated:
        return 1.0, 1.0
    if gpus < 2:
        share = gpu_share(1 + workers)
        return share, share
    each = (gpus - 1) / workers
    return (float(math.floor(each)) if each >= 1 else gpu_share(math.ceil(workers / (gpus - 1)))), 1.0


def gpu_share(actors: int) -> float:
    """An equal share of one GPU, rounded down to the 1/10000 that Ray counts in: rounded up, the last would not fit."""
    return math.floor(10_000 / actors) / 10_000
