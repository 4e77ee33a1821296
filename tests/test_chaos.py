"""A thousand requests of all kinds through a crew whose weights change and whose workers are killed: none is lost."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cispo.crew import Crew, Roles
from cispo.ray_runtime import ray_session
from cispo.recipe.schema import RaySettings, TrainRecipe
from cispo.rollout.request import Drawing, GroupRequest, Repetition, Stops, ThinkingBudget
from cispo.types import Prompt, StopReason

REQUESTS, UPDATES, KILLS = 1000, 20, 2
REWARD = "def reward(prompt, completion, **row):\n    return float(len(completion) % 3)\n"


def watched_worker() -> type:
    """A rollout worker that tells its pid and what its engine still holds."""
    from cispo.actors import RolloutWorker

    class WatchedWorker(RolloutWorker):
        def pid(self) -> int:
            return os.getpid()

        def held(self) -> tuple[int, int, float]:
            engine = self._engine
            return engine.active_completions, engine.waiting_groups, engine.cache_share

    return WatchedWorker


@pytest.fixture
def crew(small_policy_folder: Path, tmp_path: Path) -> Iterator[Crew]:
    (tmp_path / "lengths.py").write_text(REWARD, encoding="utf-8")
    sections = {
        "name": "chaos",
        "steps": UPDATES + 1,
        "policy": {"path": str(small_policy_folder), "device": "cpu"},
        "data": {"path": "unused.jsonl"},
        "rollout": {
            "prompts_per_step": 12,
            "group_size": 2,
            "max_prompt_tokens": 64,
            "max_completion_tokens": 96,
            "max_concurrent_completions": 16,
            "max_off_policy_steps": UPDATES,
            "workers": 2,
        },
        "rewards": [{"name": f"{tmp_path / 'lengths.py'}:reward"}],
        "sandbox": {"workers": 1},
        "learner": {"learning_rate": 1e-3},
        "base_path": tmp_path,
    }
    recipe = TrainRecipe.model_validate(sections)
    with ray_session(RaySettings(dashboard=False)):
        crew = Crew(
            recipe,
            small_policy_folder,
            cores=2,
            with_learner=True,
            say=lambda _: None,
            roles=Roles(rollout=watched_worker()),
        )
        yield crew
        crew.close()


def any_request(index: int, rng: random.Random) -> GroupRequest:
    stops = Stops(
        max_new_tokens=rng.choice([1, 3, 20, 60, 96, None]),
        strings=rng.choice([(), ("a",), ("ab", "zz")]),
        token_ids=rng.choice([(), (65,)]),
        thinking=rng.choice([None, ThinkingBudget(5, "</t>", "stop</t>")]),
        repetition=rng.choice([None, Repetition(8, 0.5)]),
    )
    drawing = Drawing(rng.choice([0.0, 0.7, 1.0]), top_p=rng.choice([1.0, 0.9]), top_k=rng.choice([0, 5]))
    prompt = Prompt(f"r{index}", "x" * rng.randint(1, 40))
    return GroupRequest(prompt, rng.choice([1, 2, 4]), drawing, "chaos", stops, priority=rng.randint(0, 3))


def is_refused(request: GroupRequest) -> bool:
    """Whether its thinking budget leaves no room for an answer: an error of that request alone."""
    return request.stops.thinking is not None and request.stops.max_new_tokens in (1, 3)


@pytest.mark.slow
def test_a_thousand_requests_end_once_each_while_weights_change_and_workers_die(crew: Crew) -> None:
    rng = random.Random(5)
    first = [GroupRequest(Prompt(f"t{index}", "ask"), 4, stream="train") for index in range(12)]
    to_train = crew.sample_and_score(first, lambda *_: None).groups
    requests = [any_request(index, rng) for index in range(REQUESTS)]
    crew.submit(requests)
    killed = 0
    for update in range(1, UPDATES + 1):
        part = requests[(update - 1) * REQUESTS // UPDATES : update * REQUESTS // UPDATES]
        found = crew.collect(part, lambda *_: None)
        served = [request for request in part if not is_refused(request)]
        assert set(found.failed) == {request.prompt.id for request in part if is_refused(request)}
        assert all("leave no room for an answer" in reason for reason in found.failed.values())
        assert [group.prompt.id for group in found.groups] == [request.prompt.id for request in served]
        for request, group in zip(served, found.groups, strict=True):
            assert [rollout.completion_index for rollout in group.rollouts] == list(range(request.group_size))
            assert all(isinstance(rollout.stop_reason, StopReason) for rollout in group.rollouts)
            assert all(rollout.completion_length_tokens for rollout in group.rollouts)
        if update in (5, 11):
            os.kill(ray.get(crew._rollout[killed].actor.pid.remote()), signal.SIGKILL)
            killed += 1
        crew.train(to_train, update)
        crew.broadcast()
    assert killed == KILLS
    assert crew.counts().deaths == {"rollout": KILLS}
    time.sleep(1)
    for member in crew._rollout:
        assert ray.get(member.actor.held.remote()) == (0, 0, 0.0)


def test_the_requests_are_of_all_kinds() -> None:
    rng = random.Random(5)
    stops: Counter[Any] = Counter()
    for index in range(REQUESTS):
        request = any_request(index, rng)
        rules = request.stops
        stops[rules.thinking is not None, rules.repetition is not None, bool(rules.strings)] += 1
    assert len(stops) == 8
    assert min(stops.values()) > REQUESTS // 20
