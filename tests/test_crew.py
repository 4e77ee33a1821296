"""The actors of a run in one Ray session: order, policy versions, proof of a broadcast, errors that name an actor."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cispo.crew import Crew
from cispo.errors import BroadcastError, CheckpointError, CispoError, DeadlineError
from cispo.placement import gpu_share
from cispo.ray_runtime import await_result, ray_session
from cispo.recipe.schema import RaySettings, TrainRecipe
from cispo.rollout.request import GroupRequest
from cispo.types import Prompt, ScoredGroup

PROMPTS = [Prompt(f"p{index}", "ask" * (1 + index % 3)) for index in range(7)]
REWARD = """\
import time
from pathlib import Path

def reward(prompt, completion, **row):
    while prompt == "wait" and not Path(__file__).with_name("go").exists():
        time.sleep(0.02)
    return float(len(completion) % 3)
"""


@pytest.fixture(scope="module")
def recipe(small_policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainRecipe:
    folder = tmp_path_factory.mktemp("crew")
    (folder / "lengths.py").write_text(REWARD, encoding="utf-8")
    sections = {
        "name": "crew",
        "steps": 2,
        "policy": {"path": str(small_policy_folder), "device": "cpu"},
        "data": {"path": "unused.jsonl"},
        "rollout": {
            "prompts_per_step": 7,
            "group_size": 4,
            "max_prompt_tokens": 16,
            "max_completion_tokens": 6,
            "max_concurrent_completions": 10,
            "workers": 2,
        },
        "rewards": [{"name": f"{folder / 'lengths.py'}:reward"}],
        "sandbox": {"workers": 2},
        "learner": {"learning_rate": 1e-3},
        "base_path": folder,
    }
    return TrainRecipe.model_validate(sections)


@pytest.fixture(scope="module")
def crew(recipe: TrainRecipe, small_policy_folder: Path) -> Iterator[Crew]:
    with ray_session(RaySettings(dashboard=False)):
        crew = Crew(recipe, small_policy_folder, cores=1, with_learner=True)
        yield crew
        crew.close()


def requests(prompts: list[Prompt], stream: str = "0") -> list[GroupRequest]:
    return [GroupRequest(prompt, 4, stream=stream) for prompt in prompts]


def sample(crew: Crew, prompts: list[Prompt], stream: str = "0") -> list[ScoredGroup]:
    found = crew.sample_and_score(requests(prompts, stream), lambda done, total: None)
    assert not found.failed
    return found.groups


def tokens(groups: list[ScoredGroup]) -> dict[str, list[list[int]]]:
    return {
        group.prompt.id: [rollout.completion_token_ids_T.tolist() for rollout in group.rollouts] for group in groups
    }


def test_groups_come_in_the_order_of_the_prompts_and_the_same_from_any_worker(crew: Crew) -> None:
    done: list[tuple[int, int]] = []
    found = crew.sample_and_score(requests(PROMPTS), lambda *count: done.append(count))
    groups = found.groups
    assert [group.prompt for group in groups] == PROMPTS
    assert done[0] == (0, 7)
    assert done[-1] == (7, 7)
    assert done == sorted(set(done))
    assert set(found.times) == {"time_s/rollout", "time_s/reward"}
    for group in groups:
        assert [rollout.completion_index for rollout in group.rollouts] == [0, 1, 2, 3]
        assert [score.value for score in group.scores] == [len(rollout.text) % 3 for rollout in group.rollouts]
    assert tokens(sample(crew, PROMPTS[::-1])) == tokens(groups)
    assert tokens(sample(crew, PROMPTS[:1])).items() <= tokens(groups).items()
    assert tokens(sample(crew, PROMPTS, stream="1")) != tokens(groups)


def test_a_broadcast_is_proved_and_tokens_carry_its_version(crew: Crew) -> None:
    def versions(groups: list[ScoredGroup]) -> set[int]:
        return {int(v) for group in groups for rollout in group.rollouts for v in rollout.policy_versions_T}

    first = sample(crew, PROMPTS)
    assert versions(first) == {0}
    metrics = crew.train(first, 1)
    assert metrics["policy/version"] == 1.0
    assert metrics["policy/mismatch/max"] == 0.0
    assert versions(sample(crew, PROMPTS[:2])) == {0}
    assert crew.broadcast()["broadcast/checksum_ok"] == 1.0
    second = sample(crew, PROMPTS, stream="1")
    assert versions(second) == {1}
    assert crew.train(second, 2)["policy/mismatch/max"] == 0.0
    crew.broadcast()


def test_weights_with_another_checksum_are_refused(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar:
        def __init__(self, learner: Any) -> None:
            self._learner = learner

        def weights(self) -> Any:
            from dataclasses import replace

            return replace(ray.get(self._learner.weights.remote()), checksum="0" * 32)

    stand_in: Any = ray.remote(Liar)
    assert crew._learner is not None
    learner = crew._learner.first
    with monkeypatch.context() as lying:
        lying.setattr(learner, "actor", stand_in.options(num_cpus=0).remote(learner.actor))
        with pytest.raises(BroadcastError, match=r"rollout:\d holds weights version \d+ with .* checksum 0{32};"):
            crew.broadcast()
        # A worker with groups in hand takes weights unseen; then what it samples is not used.
        crew.submit(requests(PROMPTS))
        with pytest.raises(BroadcastError, match=r"rollout:\d holds weights version \d+ with .* checksum 0{32};"):
            crew.broadcast()
            crew.collect(requests(PROMPTS), lambda *_: None)
    crew._sampler.forget_all()
    crew.broadcast()


def test_a_deadline_names_the_actor_that_is_waited_for(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = crew._recipe.rollout.model_copy(update={"timeout_s": 1.0})
    monkeypatch.setattr(crew, "_recipe", crew._recipe.model_copy(update={"rollout": rollout}))
    with pytest.raises(DeadlineError, match=r"0 of 1 groups after 1 s, waiting for .*reward:\d"):
        sample(crew, [Prompt("slow", "wait")])
    (crew._recipe.base_path / "go").touch()
    assert len(sample(crew, PROMPTS)) == 7


def test_what_a_constructor_says_is_wrong_is_what_the_user_reads(crew: Crew) -> None:
    class Broken:
        def __init__(self) -> None:
            from cispo.errors import CheckpointError

            raise CheckpointError("/policy has no weights; copy them there")

    class Buggy:
        def __init__(self) -> None:
            raise KeyError("lost")

    def start(kind: type) -> None:
        actor: Any = ray.remote(kind)
        await_result(actor.options(num_cpus=0).remote().__ray_ready__.remote(), timeout_s=60, what="rollout:0 to start")

    with pytest.raises(CheckpointError) as refused:
        start(Broken)
    assert str(refused.value) == "/policy has no weights; copy them there"
    with pytest.raises(CispoError, match=r"waited for rollout:0 to start \(KeyError: 'lost'\); look at its log"):
        start(Buggy)


def test_a_late_call_is_named(crew: Crew) -> None:
    @ray.remote(num_cpus=0)
    def nap() -> None:
        time.sleep(5)

    with pytest.raises(DeadlineError, match=r"waited 0\.1 s for learner in step 3; look at that actor's log"):
        await_result(nap.remote(), timeout_s=0.1, what="learner in step 3")


@pytest.mark.parametrize("actors", range(1, 40))
def test_the_shares_of_a_gpu_fit_on_it(actors: int) -> None:
    in_rays_units = round(gpu_share(actors) * 10_000)
    assert 10_000 - actors < in_rays_units * actors <= 10_000


def test_a_local_ray_is_our_own_whatever_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run would be joined to another's actors, of another version perhaps."""
    given: list[dict[str, object]] = []
    monkeypatch.setenv("RAY_ADDRESS", "198.51.100.1:6379")
    monkeypatch.setattr("ray.init", lambda **options: given.append(options))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with ray_session(RaySettings(dashboard=False)):
        pass
    assert given[0]["address"] == "local"
