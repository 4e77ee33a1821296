"""A crew whose weights go through links: the run that the object store gives, and deaths at either end of a link."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cispo.crew import Crew, Roles
from cispo.errors import LearnerLostError, RecipeError
from cispo.placement import place
from cispo.ray_runtime import await_result, ray_session
from cispo.recipe.schema import RaySettings, TrainRecipe
from cispo.rollout.request import GroupRequest
from cispo.types import Prompt, ScoredGroup

PROMPTS = [Prompt(f"p{index}", "ask" * (1 + index % 3)) for index in range(8)]
REWARD = "def reward(prompt, completion, **row):\n    return float(len(completion) % 3)\n"


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session(RaySettings(dashboard=False)):
        yield


def make_recipe(policy: Path, folder: Path, **resources: Any) -> TrainRecipe:
    (folder / "lengths.py").write_text(REWARD, encoding="utf-8")
    sections = {
        "name": f"links-{time.monotonic_ns()}",
        "steps": 4,
        "policy": {"path": str(policy), "device": "cpu"},
        "data": {"path": "unused.jsonl"},
        "rollout": {
            "prompts_per_step": 8,
            "group_size": 4,
            "max_prompt_tokens": 16,
            "max_completion_tokens": 12,
            "max_concurrent_completions": 8,
            "workers": 2,
        },
        "rewards": [{"name": f"{folder / 'lengths.py'}:reward"}],
        "sandbox": {"workers": 1},
        "learner": {"learning_rate": 1e-2},
        "base_path": folder,
        "resources": resources,
    }
    return TrainRecipe.model_validate(sections)


class Watched:
    """Roles whose processes can be asked for their ids, and told to end when they are about to do something."""

    def __init__(self) -> None:
        from cispo.actors import LearnerActor, RolloutWorker

        class Worker(RolloutWorker):
            dies = False

            def pid(self) -> int:
                return os.getpid()

            def die_next_time(self) -> None:
                self.dies = True

            def receive_weights(self, address: str, timeout_s: float, link: str) -> tuple[int, str]:
                if self.dies:
                    os._exit(1)
                return super().receive_weights(address, timeout_s, link)

        class Learner(LearnerActor):
            dies = False

            def die_next_time(self) -> None:
                self.dies = True

            def send_weights(self, address: str, timeout_s: float, links: Any) -> Any:
                if self.dies:
                    os._exit(1)
                return super().send_weights(address, timeout_s, links)

        self.roles = Roles(rollout=Worker, learner=Learner)


@pytest.fixture
def new_crew(
    session: None, small_policy_folder: Path, tmp_path: Path
) -> Iterator[Callable[..., Crew]]:
    crews = []

    def start(said: list[str] | None = None, **resources: Any) -> Crew:
        recipe = make_recipe(small_policy_folder, tmp_path, **resources)
        say = (said if said is not None else []).append
        crews.append(
            Crew(recipe, small_policy_folder, cores=2, with_learner=True, say=say, roles=Watched().roles)
        )
        return crews[-1]

    yield start
    for crew in crews:
        crew.close()


def sample(crew: Crew, stream: str) -> list[ScoredGroup]:
    requests = [GroupRequest(prompt, 4, stream=stream) for prompt in PROMPTS]
    found = crew.sample_and_score(requests, lambda *_: None)
    assert not found.failed
    return found.groups


def tokens(groups: list[ScoredGroup]) -> list[list[int]]:
    return [rollout.completion_token_ids_T.tolist() for group in groups for rollout in group.rollouts]


def versions(groups: list[ScoredGroup]) -> set[int]:
    return {int(v) for group in groups for rollout in group.rollouts for v in rollout.policy_versions_T}


def run_steps(crew: Crew, count: int = 3) -> list[Any]:
    """What was sampled in some steps, with the metrics of training and broadcast."""
    crew.broadcast()
    found: list[Any] = []
    for step in range(1, count + 1):
        groups = sample(crew, f"step {step}")
        assert versions(groups) == {step - 1}
        trained = crew.train(groups, step)
        assert trained["policy/mismatch/max"] == 0.0
        found.append((tokens(groups), crew.broadcast(), crew.weights_checksum))
    return found


@pytest.fixture(scope="module")
def through_the_store(session: None, small_policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    recipe = make_recipe(small_policy_folder, tmp_path_factory.mktemp("store"), broadcast="object_store")
    crew = Crew(recipe, small_policy_folder, cores=2, with_learner=True)
    try:
        return run_steps(crew)
    finally:
        crew.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_links_carry_what_the_object_store_carries(
    new_crew: Callable[..., Crew], through_the_store: list[Any], ranks: int
) -> None:
    crew = new_crew(broadcast="links", learner_ranks=ranks)
    for (sampled, sent, checksum), (expected, stored, same) in zip(run_steps(crew), through_the_store, strict=True):
        assert sent["broadcast/bytes"] == stored["broadcast/bytes"]
        assert sent["broadcast/checksum_ok"] == 1.0
        assert sent["broadcast/gb_per_s"] > 0 < sent["time_s/broadcast_link"] <= sent["time_s/broadcast"]
        if ranks == 1:
            assert (sampled, checksum) == (expected, same)


def test_a_worker_that_dies_while_weights_are_sent_is_replaced_and_gets_them(
    new_crew: Callable[..., Crew], through_the_store: list[Any]
) -> None:
    said: list[str] = []
    crew = new_crew(said, broadcast="links")
    assert run_steps(crew, 1)[0][0] == through_the_store[0][0]
    crew.train(sample(crew, "step 2"), 2)
    crew._rollout[1].actor.die_next_time.remote()
    started = time.monotonic()
    crew.broadcast()
    assert time.monotonic() - started < 30
    assert crew.weights_checksum == through_the_store[1][2]
    assert [line for line in said if "rollout:1 died" in line and "another takes its place" in line]
    groups = sample(crew, "step 3")
    assert versions(groups) == {2}
    assert tokens(groups) == through_the_store[2][0]
    while crew._rollout[1].ready is not None:
        sample(crew, f"wait {time.monotonic_ns()}")
    # The new one has what the learner holds, proved by what it samples, and takes part in the next broadcast.
    assert versions(sample(crew, "step 3")) == {2}
    crew.train(groups, 3)
    crew.broadcast()
    assert crew.weights_checksum == through_the_store[2][2]


def test_a_worker_killed_while_it_samples_ahead_gets_weights_after_the_learners_step(
    new_crew: Callable[..., Crew],
) -> None:
    said: list[str] = []
    crew = new_crew(said, broadcast="links")
    crew.broadcast()
    ahead = {step: [GroupRequest(prompt, 4, stream=f"ahead {step}") for prompt in PROMPTS] for step in range(1, 5)}
    for requests in ahead.values():
        crew.submit(requests)
    victim = crew._rollout[0]
    for step, requests in ahead.items():
        groups = crew.collect(requests, lambda *_: None).groups
        assert len(groups) == len(PROMPTS)
        assert max(versions(groups)) < step
        if step == 2:
            os.kill(await_result(victim.actor.pid.remote(), timeout_s=30, what="its process id"), signal.SIGKILL)
        crew.train(groups, step)
        crew.broadcast()
    assert [line for line in said if "rollout:0 died" in line]
    while victim.ready is not None:
        sample(crew, f"wait {time.monotonic_ns()}")
    assert versions(sample(crew, "all")) == {4}


def test_a_learner_that_dies_while_it_sends_leaves_no_worker_waiting(
    new_crew: Callable[..., Crew], through_the_store: list[Any], tmp_path: Path
) -> None:
    said: list[str] = []
    crew = new_crew(said, broadcast="links")
    run_steps(crew, 2)
    crew.save(tmp_path / "checkpoints" / "step_000002", {"step": 2})
    assert crew._learner is not None
    crew._learner.first.actor.die_next_time.remote()
    with pytest.raises(LearnerLostError, match="learner to send its weights"):
        crew.broadcast()
    crew.restart_learner()
    assert crew.load(tmp_path / "checkpoints" / "step_000002") == {"step": 2}
    crew.broadcast()
    assert crew.weights_checksum == through_the_store[1][2]
    assert tokens(sample(crew, "step 3")) == through_the_store[2][0]


def test_who_gets_links(small_policy_folder: Path, tmp_path: Path, session: None) -> None:
    def links(gpus: int, **resources: Any) -> bool:
        recipe = make_recipe(small_policy_folder, tmp_path, **resources)
        on_gpu = recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"device": "auto"})})
        return place(on_gpu, cores=4, gpus=gpus).links

    assert [links(gpus) for gpus in (0, 1, 2, 4)] == [False, False, True, True]
    assert links(0, broadcast="links")
    assert not links(2, broadcast="object_store")
    with pytest.raises(RecipeError, match=r"resources\.broadcast is links, but a rollout worker shares the GPU"):
        links(1, broadcast="links")
    with pytest.raises(RecipeError, match="shares the GPU"):
        links(2, broadcast="links", learner_ranks=2)
    with pytest.raises(ValidationError, match="nothing is broadcast"):
        recipe = make_recipe(small_policy_folder, tmp_path).model_dump()
        rollout = {**recipe["rollout"], "workers": 1}
        resources = {"placement": "colocated", "broadcast": "links"}
        TrainRecipe.model_validate({**recipe, "rollout": rollout, "resources": resources})
