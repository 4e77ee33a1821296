"""`cispo train` with a learner of two ranks: the run of one, resumed across numbers of ranks, and a rank killed."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from cispo.checkpoint import load_checkpoint
from cispo.cli import main
from cispo.crew import Crew
from cispo.errors import LearnerLostError
from cispo.placement import place
from cispo.ray_runtime import ray_session
from cispo.recipe.load import load_train_recipe
from cispo.recipe.schema import RaySettings, TrainRecipe
from cispo.recipe.show import train_plan
from cispo.rollout.request import GroupRequest
from cispo.types import Prompt

STEPS, TOLERANCE = 4, 1e-5
REWARD = "def reward(prompt, completion, **row):\n    return float(len(completion) % 3)\n"
TWO = ("resources.learner_ranks=2", "resources.expert_parallel=2")


@pytest.fixture(scope="module")
def recipe_file(small_policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner_ranks")
    (folder / "lengths.py").write_text(REWARD, encoding="utf-8")
    prompts = "".join(json.dumps({"id": f"p{i}", "prompt": "ask" * (1 + i % 3)}) + "\n" for i in range(12))
    (folder / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    settings = {
        "name": "ranks",
        "steps": STEPS,
        "policy": {"path": str(small_policy_folder), "device": "cpu"},
        "data": {"path": "prompts.jsonl"},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 4,
            "max_prompt_tokens": 16,
            "max_completion_tokens": 24,
            "max_concurrent_completions": 16,
        },
        "rewards": [{"name": "lengths.py:reward"}],
        "sandbox": {"workers": 1},
        # With M1's epsilon AdamW moves a weight whose gradient is rounding error as far as any other.
        "learner": {"learning_rate": 3e-4, "updates_per_step": 2, "eps": 1e-5, "tokens_per_micro_batch": 100},
        "checkpoint": {"keep": 9},
        "ray": {"dashboard": False, "start_timeout_s": 400},
        "logging": {"console": "lines"},
    }
    (folder / "ranks.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "ranks.yaml"


def train(recipe_file: Path, run: Path, *options: str) -> list[dict[str, Any]]:
    assert main(["train", str(recipe_file), "--run-dir", str(run), *options]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:06d}" / "policy" / "model.safetensors")


def difference(left: Path, right: Path) -> float:
    one, other = weights(left, STEPS), weights(right, STEPS)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def one_rank(recipe_file: Path) -> tuple[Path, list[dict[str, Any]]]:
    run = recipe_file.parent / "one"
    return run, train(recipe_file, run)


@pytest.fixture(scope="module")
def two_ranks(recipe_file: Path) -> tuple[Path, list[dict[str, Any]]]:
    run = recipe_file.parent / "two"
    return run, train(recipe_file, run, *TWO)


def test_a_run_with_two_ranks_is_the_run_with_one(
    one_rank: tuple[Path, list[dict[str, Any]]], two_ranks: tuple[Path, list[dict[str, Any]]]
) -> None:
    (one, of_one), (two, of_two) = one_rank, two_ranks
    assert difference(one, two) <= TOLERANCE
    before = load_checkpoint(one / "checkpoints" / "step_000001").policy_path
    moved = load_file(before / "model.safetensors")
    assert max(float((weights(one, STEPS)[name] - moved[name]).abs().max()) for name in moved) > 100 * TOLERANCE
    for alone, together in zip(of_one, of_two, strict=True):
        assert together["policy/version"] == alone["policy/version"]
        assert together["broadcast/checksum_ok"] == 1.0
        for name in ("reward/mean", "loss/policy", "optim/grad_norm", "policy/entropy"):
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    recipe_file: Path,
    one_rank: tuple[Path, list[dict[str, Any]]],
    two_ranks: tuple[Path, list[dict[str, Any]]],
    ranks: str,
) -> None:
    run = recipe_file.parent / f"{ranks}_resumed"
    shutil.copytree((one_rank if ranks == "one" else two_ranks)[0], run)
    for step in range(3, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"step_{step:06d}")
    train(recipe_file, run, "--resume", *(TWO if ranks == "one" else ()))
    assert difference(one_rank[0], run) <= TOLERANCE


def test_a_rank_that_dies_ends_all_and_they_start_again(recipe_file: Path, small_policy_folder: Path) -> None:
    recipe = load_train_recipe(recipe_file, [*TWO, "name=mortal"])
    requests = [GroupRequest(Prompt(f"p{i}", "ask"), 4, stream="0") for i in range(4)]
    checkpoint = recipe_file.parent / "mortal" / "step_000001"
    with ray_session(RaySettings(dashboard=False)):
        crew = Crew(recipe, small_policy_folder, cores=2, with_learner=True, say=lambda _: None)
        try:
            groups = crew.sample_and_score(requests, lambda *_: None).groups
            crew.train(groups, 1)
            crew.save(checkpoint, {"step": 1})
            expected = crew.train(groups, 2)["optim/grad_norm"]
            assert crew._learner is not None
            log = Path(ray.get(crew._learner.members[1].actor.log_path.remote()))
            os.kill(int(log.stem.rpartition("-")[2]), signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(LearnerLostError, match="learner:1"):
                crew.train(groups, 3)
            assert time.monotonic() - began < 60
            crew.restart_learner()
            assert crew.load(checkpoint) == {"step": 1}
            assert crew.train(groups, 2)["optim/grad_norm"] == pytest.approx(expected, rel=1e-6)
            assert crew.broadcast()["broadcast/checksum_ok"] == 1.0
        finally:
            crew.close()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resources.learner_ranks=3", "resources.expert_parallel=2"], "must divide"),
        (["resources.learner_ranks=2", "resources.placement=colocated"], "share one process"),
        (["resources.learner_ranks=3", "resources.expert_parallel=3"], "has 4 experts; choose a divisor"),
    ],
)
def test_ranks_that_make_no_learner_are_refused_in_the_recipe(
    recipe_file: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe_file), "--dry-run", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and "resources." in error and len(error.splitlines()) == 1


def test_the_plan_names_the_ranks(recipe_file: Path) -> None:
    plan = train_plan(load_train_recipe(recipe_file, list(TWO)))
    assert "1 learner of 2 ranks over which its weights are sharded, each layer's experts shared by 2" in plan
    assert "in each rank" in plan


def test_ranks_share_the_learners_cores(recipe_file: Path) -> None:
    recipe: TrainRecipe = load_train_recipe(recipe_file, list(TWO))
    assert place(recipe, cores=8, gpus=0).learner_threads == 4
    with pytest.raises(ValidationError):
        TrainRecipe.model_validate({**recipe.model_dump(), "resources": {"learner_ranks": 0}})
