"""Who runs where: shares of GPUs that fit, threads in turns and side by side, one actor on one GPU."""

import pytest
from pydantic import ValidationError

from cispo.errors import RecipeError
from cispo.placement import place
from cispo.recipe.schema import TrainRecipe


def recipe(
    *, device: str = "auto", workers: int = 1, ahead: int = 0, placement: str = "auto", ranks: int = 1
) -> TrainRecipe:
    sections = {
        "name": "placed",
        "steps": 1,
        "policy": {"path": "unused", "device": device},
        "data": {"path": "unused"},
        "rollout": {
            "prompts_per_step": 1,
            "max_completion_tokens": 4,
            "workers": workers,
            "max_off_policy_steps": ahead,
        },
        "rewards": [{"name": "length"}],
        "learner": {"learning_rate": 1e-3},
        "resources": {"placement": placement, "learner_ranks": ranks},
    }
    return TrainRecipe.model_validate(sections)


def test_one_gpu_and_one_worker_share_a_process() -> None:
    plan = place(recipe(), cores=16, gpus=1)
    assert plan.colocated
    assert (plan.rollout_gpus, plan.learner_gpus) == (1.0, 1.0)


@pytest.mark.parametrize(("workers", "gpus"), [(1, 1), (2, 1), (3, 1), (1, 2), (3, 2), (1, 8), (7, 8), (3, 8)])
def test_what_is_split_fits_on_the_gpus(workers: int, gpus: int) -> None:
    plan = place(recipe(workers=workers, placement="split"), cores=16, gpus=gpus)
    assert not plan.colocated
    assert plan.rollout_gpus > 0
    assert plan.learner_gpus + workers * plan.rollout_gpus <= gpus
    assert gpus == 1 or plan.learner_gpus == 1.0


@pytest.mark.parametrize(
    ("workers", "ranks", "gpus", "places"),
    [
        (1, 1, 2, (1,)),
        (3, 1, 2, (1, 1, 1)),
        (3, 2, 4, (2, 3, 2)),
        (1, 2, 8, (2,)),
        (2, 2, 2, (0, 1)),
        (3, 2, 2, (0, 1, 0)),
    ],
)
def test_learner_ranks_have_a_gpu_each_and_rollout_workers_the_others(
    workers: int, ranks: int, gpus: int, places: tuple[int, ...]
) -> None:
    plan = place(recipe(workers=workers, placement="split", ranks=ranks), cores=16, gpus=gpus)
    assert plan.rollout_places == places
    assert plan.gpus <= gpus
    assert plan.has_gpus_apart is (gpus > ranks)
    for gpu in range(plan.gpus):
        assert places.count(gpu) * plan.rollout_gpus + (gpu < ranks) * plan.learner_gpus <= 1.0


def test_a_learner_rank_without_a_gpu_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"resources\.learner_ranks is 3, but there are 2 GPUs"):
        place(recipe(ranks=3), cores=16, gpus=2)
    assert place(recipe(ranks=3, device="cpu"), cores=16, gpus=2).learner_threads == 5


def test_on_cpus_all_cores_are_used_in_turns_and_shared_side_by_side() -> None:
    in_turns = place(recipe(device="cpu", workers=2), cores=8, gpus=4)
    assert (in_turns.rollout_threads, in_turns.learner_threads) == (4, 8)
    assert (in_turns.rollout_gpus, in_turns.learner_gpus, in_turns.colocated) == (0.0, 0.0, False)
    beside = place(recipe(device="cpu", workers=2, ahead=4), cores=8, gpus=0)
    assert (beside.rollout_threads, beside.learner_threads) == (2, 4)
    least = place(recipe(device="cpu", workers=2, ahead=4), cores=1, gpus=0)
    assert (least.rollout_threads, least.learner_threads) == (1, 1)


def test_several_workers_cannot_share_the_learners_process() -> None:
    with pytest.raises(ValidationError, match=r"colocated with rollout\.workers 2: .*set rollout\.workers to 1"):
        recipe(workers=2, placement="colocated")
