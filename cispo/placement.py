"""Who runs where: the actors of a run, their threads and their shares of the GPUs; loads neither torch nor ray."""

import math
from dataclasses import dataclass, replace

from cispo.errors import RecipeError
from cispo.recipe.schema import TrainRecipe


@dataclass(frozen=True, slots=True)
class Placement:
    """colocated: engine and learner in one actor. learner_threads: of one rank.

    GPU shares are Ray's num_gpus, of a rollout worker and of a learner rank; 0 on a machine without. GPUs are numbered
    as the run takes them: learner ranks have the first ones, one each. rollout_places: the GPU of each rollout worker.
    links: weights go from the learner to each rollout worker directly, not through Ray's object store.
    """

    colocated: bool
    rollout_threads: int
    learner_threads: int
    rollout_gpus: float
    learner_gpus: float
    learner_ranks: int = 1
    rollout_places: tuple[int, ...] = ()
    links: bool = False

    @property
    def gpus(self) -> int:
        """How many the run takes."""
        return max(self.learner_ranks, *(place + 1 for place in self.rollout_places)) if self.rollout_places else 0

    @property
    def has_gpus_apart(self) -> bool:
        """Whether no GPU has both a learner rank and a rollout worker, so that weights may go from one to the other."""
        return bool(self.rollout_places) and min(self.rollout_places) >= self.learner_ranks


def place(recipe: TrainRecipe, *, cores: int, gpus: float) -> Placement:
    """The placement of a recipe's actors on so many CPU cores and GPUs.

    RecipeError where there are GPUs, but not one for each learner rank, or none apart for links that are asked for.
    """
    workers, ranks = recipe.rollout.workers, recipe.resources.learner_ranks
    uses_gpu = recipe.policy.device != "cpu" and gpus > 0
    colocated = _is_colocated(recipe, is_single_gpu=uses_gpu and gpus < 2)
    is_ahead = recipe.rollout.max_off_policy_steps > 0 and not colocated
    # Side by side they share the cores; in turns each has all of them.
    rollout_cores = max(1, cores // 2) if is_ahead and not uses_gpu else cores
    learner_cores = max(1, cores - rollout_cores) if is_ahead and not uses_gpu else cores
    on_gpus = _on_gpus(workers, ranks, int(gpus), colocated=colocated) if uses_gpu else (0.0, 0.0, ())
    rollout_gpus, learner_gpus, places = on_gpus
    placement = Placement(
        colocated=colocated,
        rollout_threads=max(1, rollout_cores // workers),
        learner_threads=max(1, learner_cores // ranks),
        rollout_gpus=rollout_gpus,
        learner_gpus=learner_gpus,
        learner_ranks=ranks,
        rollout_places=places,
    )
    return replace(placement, links=_has_links(recipe, placement))


def _has_links(recipe: TrainRecipe, placement: Placement) -> bool:
    wanted, is_cpu = recipe.resources.broadcast, not placement.rollout_places
    if wanted == "links" and (placement.colocated or not (is_cpu or placement.has_gpus_apart)):
        raise RecipeError(
            "resources.broadcast is links, but a rollout worker shares the GPU of the learner here; "
            "set it to auto, or give the run more GPUs"
        )
    return wanted == "links" or (wanted == "auto" and placement.has_gpus_apart)


def _is_colocated(recipe: TrainRecipe, *, is_single_gpu: bool) -> bool:
    wanted, is_one_each = recipe.resources.placement, recipe.rollout.workers == recipe.resources.learner_ranks == 1
    return wanted == "colocated" or (wanted == "auto" and is_single_gpu and is_one_each)


def _on_gpus(workers: int, ranks: int, gpus: int, *, colocated: bool) -> tuple[float, float, tuple[int, ...]]:
    """Shares of a rollout worker and of a learner rank, and the workers' GPUs: those that the learner leaves free, or,
    where it leaves none, its own.
    """
    if colocated:
        return 1.0, 1.0, (0,)
    if gpus < ranks:
        raise RecipeError(
            f"resources.learner_ranks is {ranks}, but there are {gpus} GPUs and each rank needs one of its own; "
            "lower it, or set policy.device to cpu"
        )
    own = min(gpus - ranks, workers)
    if own:
        return gpu_share(math.ceil(workers / own)), 1.0, tuple(ranks + worker % own for worker in range(workers))
    share = gpu_share(1 + math.ceil(workers / ranks))
    return share, share, tuple(worker % ranks for worker in range(workers))


def gpu_share(actors: int) -> float:
    """An equal share of one GPU, rounded down to the 1/10000 that Ray counts in: rounded up, the last would not fit."""
    return math.floor(10_000 / actors) / 10_000
