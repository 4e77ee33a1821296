"""What the actors hold, on a GPU: the settings of a run's processes, two steps with a broadcast between, repeated."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.actors import ColocatedActor, LearnerActor, RolloutWorker
from cispo.broadcast import verify_receipt
from cispo.recipe.schema import TrainRecipe
from cispo.rollout.request import GroupRequest
from cispo.types import Group, Prompt, Score, ScoredGroup


@pytest.fixture
def settings_restored() -> Iterator[None]:
    memory: Any = torch.utils.deterministic
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])
    memory.fill_uninitialized_memory = before[2]


def sample(worker: RolloutWorker, prompts: tuple[Prompt, ...], stream: str) -> list[ScoredGroup]:
    """A group of six completions of each prompt, scored by their lengths."""
    requests = tuple(GroupRequest(prompt, 6, stream=stream) for prompt in prompts)
    sampled: dict[str, Group] = {}
    while len(sampled) < len(prompts):
        done = worker.run_slice(requests, 0.25)
        assert not done.failures
        sampled |= {group.prompt.id: group for group in done.groups}
        requests = ()
    return [
        ScoredGroup(g.prompt, g.rollouts, tuple(Score(float(len(r.text) % 3)) for r in g.rollouts))
        for g in (sampled[prompt.id] for prompt in prompts)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_steps_repeat_bit_for_bit(settings_restored: None, small_policy_folder: Path, dtype: str) -> None:
    sections = {
        "name": "gpu",
        "steps": 2,
        "policy": {"path": str(small_policy_folder), "device": "cuda", "dtype": dtype},
        "data": {"path": "unused.jsonl"},
        "rollout": {"prompts_per_step": 4, "group_size": 6, "max_prompt_tokens": 64, "max_completion_tokens": 70},
        "rewards": [{"name": "length"}],
        "learner": {"learning_rate": 1e-3, "updates_per_step": 2},
    }
    recipe = TrainRecipe.model_validate(sections)
    prompts = tuple(Prompt(f"p{length}", "x" * length) for length in (1, 30, 61, 62))

    def run() -> tuple[list[Any], str]:
        worker = RolloutWorker(recipe, small_policy_folder, 1, "rollout:0")
        learner = LearnerActor(recipe, small_policy_folder, 1)
        seen: list[Any] = []
        for step in (1, 2):
            groups = sample(worker, prompts, str(step))
            metrics = learner.train(groups, step)
            seen += [rollout.logprobs_T.tolist() for group in groups for rollout in group.rollouts]
            seen.append({name: v for name, v in metrics.items() if not name.startswith(("time_s/", "perf/"))})
            weights = learner.weights()
            verify_receipt("rollout:0", weights.proof, *worker.update_weights(weights))
        return seen, weights.checksum

    def run_colocated() -> tuple[list[Any], str]:
        actor = ColocatedActor(recipe, small_policy_folder, 1, "rollout:0")
        seen: list[Any] = []
        for step in (1, 2):
            groups = sample(actor, prompts, str(step))
            metrics = actor.train(groups, step)
            seen += [rollout.logprobs_T.tolist() for group in groups for rollout in group.rollouts]
            seen.append({name: v for name, v in metrics.items() if not name.startswith(("time_s/", "perf/"))})
            assert actor.share_weights() == step
        return seen, actor.weights().checksum

    assert run() == run() == run_colocated()
