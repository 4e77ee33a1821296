"""Actors that die: their groups are sampled and scored again, the same; a prompt that kills is left out and named."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cispo.crew import Crew, Roles
from cispo.errors import ActorLostError, LearnerLostError
from cispo.ray_runtime import ray_session
from cispo.recipe.schema import RaySettings, TrainRecipe
from cispo.rollout.request import GroupRequest
from cispo.sampler import DEATHS_OF_A_GROUP, Collected
from cispo.types import Prompt, ScoreStatus

PROMPTS = [Prompt(f"p{index}", "ask" * (1 + index % 3)) for index in range(12)]
REWARD = """\
import os

def reward(prompt, completion, **row):
    if prompt == "kill the reward":
        os._exit(1)
    return float(len(completion) % 3)
"""


def make_recipe(policy: Path, folder: Path, **rollout: Any) -> TrainRecipe:
    (folder / "lengths.py").write_text(REWARD, encoding="utf-8")
    sections = {
        "name": f"faults{len(list(folder.iterdir()))}-{time.monotonic_ns()}",
        "steps": 4,
        "policy": {"path": str(policy), "device": "cpu"},
        "data": {"path": "unused.jsonl"},
        "rollout": {
            "prompts_per_step": 12,
            "group_size": 4,
            "max_prompt_tokens": 32,
            "max_completion_tokens": 40,
            "max_concurrent_completions": 8,
            "workers": 2,
            **rollout,
        },
        "rewards": [{"name": f"{folder / 'lengths.py'}:reward"}],
        "sandbox": {"workers": 1},
        "learner": {"learning_rate": 1e-3},
        "base_path": folder,
    }
    return TrainRecipe.model_validate(sections)


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session(RaySettings(dashboard=False)):
        yield


def mortal_worker() -> type:
    """A rollout worker that ends its process on a prompt that says so. Made here, so that Ray carries it by value."""
    from cispo.actors import RolloutWorker

    class MortalWorker(RolloutWorker):
        def run_slice(self, requests: Any, slice_s: float) -> Any:
            if any(request.prompt.text == "kill the worker" for request in requests):
                os._exit(1)
            return super().run_slice(requests, slice_s)

        def pid(self) -> int:
            return os.getpid()

    return MortalWorker


@pytest.fixture(scope="module")
def everything_said() -> list[str]:
    return []


@pytest.fixture
def said(everything_said: list[str]) -> list[str]:
    """What is said from here on."""
    everything_said.clear()
    return everything_said


@pytest.fixture(scope="module")
def crew(
    session: None,
    everything_said: list[str],
    small_policy_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Crew]:
    recipe = make_recipe(small_policy_folder, tmp_path_factory.mktemp("faults"))
    crew = Crew(
        recipe,
        small_policy_folder,
        cores=1,
        with_learner=True,
        say=everything_said.append,
        roles=Roles(rollout=mortal_worker()),
    )
    yield crew
    crew.close()


def requests(prompts: list[Prompt]) -> list[GroupRequest]:
    return [GroupRequest(prompt, 4, stream="0") for prompt in prompts]


def tokens(found: Collected) -> dict[str, Any]:
    return {
        group.prompt.id: [(r.completion_token_ids_T.tolist(), r.logprobs_T.tolist()) for r in group.rollouts]
        for group in found.groups
    }


def test_groups_of_a_killed_rollout_worker_are_sampled_again_with_the_same_weights(
    crew: Crew, said: list[str]
) -> None:
    quiet = crew.sample_and_score(requests(PROMPTS), lambda *_: None)
    crew.train(quiet.groups, 1)
    crew.broadcast()
    expected = crew.sample_and_score(requests(PROMPTS), lambda *_: None)
    assert tokens(expected) != tokens(quiet)
    crew.counts()

    killed = []

    def kill(done: int, total: int) -> None:
        if not killed:
            killed.append(ray.get(crew._rollout[0].actor.pid.remote()))
            os.kill(killed[0], signal.SIGKILL)

    found = crew.sample_and_score(requests(PROMPTS), kill)
    assert tokens(found) == tokens(expected)
    assert found.failed == {}
    assert crew.counts().deaths == {"rollout": 1}
    assert any(text.startswith("rollout:0 died") for text in said)
    assert crew.broadcast()["broadcast/checksum_ok"] == 1.0


def test_a_prompt_that_kills_workers_is_quarantined_and_nothing_else_is_lost(crew: Crew, said: list[str]) -> None:
    poison = Prompt("poison", "kill the worker")
    found = crew.sample_and_score(requests([*PROMPTS[:5], poison, *PROMPTS[5:]]), lambda *_: None)
    assert list(found.failed) == ["poison"]
    assert found.failed["poison"].startswith("quarantined:")
    assert tokens(found) == tokens(crew.sample_and_score(requests(PROMPTS), lambda *_: None))
    assert crew.counts().deaths == {"rollout": DEATHS_OF_A_GROUP}
    assert list(crew.quarantined) == ["poison"]
    again = crew.sample_and_score(requests([poison]), lambda *_: None)
    assert again.failed == {"poison": found.failed["poison"]}
    assert crew.counts().deaths == {}
    assert sum("quarantined" in text for text in said) == 1


def test_a_reward_that_kills_its_process_is_an_error_of_that_group_alone(crew: Crew) -> None:
    found = crew.sample_and_score(requests([Prompt("bad", "kill the reward"), *PROMPTS]), lambda *_: None)
    assert [group.prompt.id for group in found.groups] == ["bad", *(prompt.id for prompt in PROMPTS)]
    bad, *good = found.groups
    assert {score.status for score in bad.scores} == {ScoreStatus.ERROR}
    assert "died 3 times" in bad.scores[0].message
    assert {score.status for group in good for score in group.scores} == {ScoreStatus.OK}
    assert crew.counts().deaths == {"reward": DEATHS_OF_A_GROUP}


def test_a_learner_that_dies_is_named_and_starts_again(crew: Crew) -> None:
    assert crew._learner is not None
    first = crew.sample_and_score(requests(PROMPTS), lambda *_: None)
    ray.kill(crew._learner.first.actor)
    with pytest.raises(LearnerLostError, match="learner to train in step 1"):
        crew.train(first.groups, 1)
    crew.restart_learner()
    assert crew.train(first.groups, 1)["policy/version"] == 1.0
    crew.broadcast()
    assert crew.sample_and_score(requests(PROMPTS[:1]), lambda *_: None).groups


def test_a_worker_that_never_starts_ends_the_run_with_its_name(
    session: None, small_policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cispo.actors import RolloutWorker

    monkeypatch.setattr("cispo.sampler.DEATHS_IN_A_ROW", 2)

    class Stillborn(RolloutWorker):
        def run_slice(self, requests: Any, slice_s: float) -> Any:
            os._exit(1)

    recipe = make_recipe(small_policy_folder, tmp_path, workers=1)
    crew = Crew(
        recipe, small_policy_folder, cores=1, with_learner=False, say=lambda _: None, roles=Roles(rollout=Stillborn)
    )
    try:
        with pytest.raises(ActorLostError, match=r"rollout:0 died \d times in a row"):
            crew.sample_and_score(requests(PROMPTS), lambda *_: None)
    finally:
        crew.close()


def test_engine_and_learner_in_one_actor_are_those_apart(
    session: None, small_policy_folder: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(small_policy_folder, tmp_path, workers=1)
    more = [GroupRequest(prompt, 4, stream="ahead") for prompt in PROMPTS]

    def run(placement: str) -> list[Any]:
        sections = {**recipe.model_dump(), "resources": {"placement": placement}, "name": f"{recipe.name}-{placement}"}
        crew = Crew(
            TrainRecipe.model_validate(sections), small_policy_folder, cores=1, with_learner=True, say=lambda _: None
        )
        try:
            assert crew.placement.colocated is (placement == "colocated")
            seen: list[Any] = []
            for step in (1, 2):
                found = crew.sample_and_score(requests(PROMPTS), lambda *_: None)
                metrics = crew.train(found.groups, step)
                assert metrics["policy/mismatch/max"] == 0.0
                crew.broadcast()
                versions = {int(v) for g in found.groups for r in g.rollouts for v in r.policy_versions_T}
                seen += [tokens(found), metrics["optim/grad_norm"], versions]
            # Weights that change while groups are under way.
            crew.submit(more)
            crew.train(found.groups, 3)
            crew.broadcast()
            ahead = crew.collect(more, lambda *_: None)
            assert {int(v) for g in ahead.groups for r in g.rollouts for v in r.policy_versions_T} <= {2, 3}
            return seen
        finally:
            crew.close()

    assert run("colocated") == run("split")
