"""The loop against a crew without Ray: killed at every place where it writes, then resumed, a run is the same run."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch

from cispo import loop
from cispo.checkpoint import load_checkpoint, prune_checkpoints, write_checkpoint
from cispo.crew import Crew, CrewCounts
from cispo.errors import LearnerLostError, RewardError
from cispo.evaluation import HeldoutSet
from cispo.loop import _Run
from cispo.recipe.schema import TrainRecipe
from cispo.rollout.request import GroupRequest
from cispo.run_folder import RunFolder
from cispo.sampler import Collected
from cispo.types import Prompt, Rollout, Score, ScoredGroup, ScoreStatus, StopReason, Turn
from cispo.views import Views

PROMPTS = [Prompt(f"p{index}", f"question {index}") for index in range(8)]
HELDOUT = tuple(Prompt(f"h{index}", f"held out {index}") for index in range(3))
SETS = {"heldout": HELDOUT, "further": HELDOUT}
STEPS = 5


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


class ToyCrew:
    """Rollout workers and a learner whose weights are one number; samples depend on it, and it on all samples."""

    def __init__(self, recipe: TrainRecipe, kill: Callable[[str], None]) -> None:
        self._recipe, self._kill = recipe, kill
        self._rollout = torch.tensor([1.0, 0.0], dtype=torch.float64)
        self.restart_learner()

    def restart_learner(self) -> None:
        self._learner = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def submit(self, requests: Sequence[GroupRequest]) -> None: ...

    def collect(self, requests: Sequence[GroupRequest], progress: object) -> Collected:
        groups = []
        for request in requests:
            self._length = request.stops.max_new_tokens or 1
            groups.append(self._group(request.prompt, request.group_size, request.stream))
        return Collected(groups, {}, {"time_s/rollout": 1.0, "time_s/reward": 1.0})

    def sample_and_score(self, requests: Sequence[GroupRequest], progress: object) -> Collected:
        return self.collect(requests, progress)

    def quarantine(self, prompts: dict[str, str]) -> None: ...

    quarantined: ClassVar[dict[str, str]] = {}
    weights_checksum: ClassVar[None] = None

    def counts(self) -> CrewCounts:
        return CrewCounts(1.0, 1.0, {})

    def _group(self, prompt: Prompt, group_size: int, stream: str) -> ScoredGroup:
        weight, version = self._rollout.tolist()
        ids, ones = np.full(self._length, 5, np.int32), np.ones(self._length, np.bool_)
        turn = Turn(ids, ones, np.zeros(self._length, np.float32), np.full(self._length, version, np.int32))
        text = f"{weight!r} {stream}"
        rollouts = tuple(
            Rollout(prompt.id, i, np.array([1], np.int32), (turn,), StopReason.EOS, f"{text} {i}")
            for i in range(group_size)
        )
        values = (int(hashlib.sha256(f"{prompt.id} {r.text}".encode()).hexdigest()[:6], 16) / 2**24 for r in rollouts)
        scores = tuple(Score(value, parts={"correct": float(value > 0.5)}) for value in values)
        return ScoredGroup(prompt, rollouts, scores)

    def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        self._kill("train")
        total = sum(score.value for group in groups for score in group.scores)
        self._learner = self._learner * torch.tensor([0.9, 1.0]) + torch.tensor([total, 1.0])
        return {"policy/version": float(self._learner[1])}

    def broadcast(self) -> dict[str, float]:
        self._kill("broadcast")
        self._rollout = self._learner.clone()
        return {"broadcast/checksum_ok": 1.0, "time_s/broadcast": 0.1}

    def reward_statistics(self) -> list[dict[str, float]]:
        return [{"perf/sandbox_executions": 1.0}]

    def save(self, path: Path, loop_state: dict[str, Any]) -> None:
        def write_policy(folder: Path) -> None:
            (folder / "weights").write_text(repr(self._learner.tolist()))
            self._kill("in the middle of a checkpoint")

        self._kill("before a checkpoint")
        write_checkpoint(
            path, write_policy=write_policy, learner_state={"weights": self._learner}, loop_state=loop_state
        )
        self._kill("between a checkpoint and the removal of older ones")
        prune_checkpoints(path.parent, keep=self._recipe.checkpoint.keep)
        self._kill("after a checkpoint")

    def load(self, path: Path) -> dict[str, Any]:
        checkpoint = load_checkpoint(path)
        self._learner = checkpoint.learner_state["weights"]
        return dict(checkpoint.loop_state)


class SilentViews:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def step(self, step: int, metrics: object) -> None: ...

    def phase(self, name: str, done: int, total: int) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def make_recipe(
    *,
    steps: int = STEPS,
    save_every: int = 1,
    keep: int = 2,
    keep_best: str | None = None,
    drop: float | None = None,
    windows: dict[str, Any] | None = None,
    ahead: int = 0,
) -> TrainRecipe:
    sections = {
        "name": "toy",
        "steps": steps,
        "policy": {"path": "unused"},
        "data": {"path": "unused"},
        "rollout": {
            "prompts_per_step": 3,
            "group_size": 2,
            "max_completion_tokens": 4,
            "drop_solved_at": drop,
            "length_windows": windows,
            "max_off_policy_steps": ahead,
        },
        "rewards": [{"name": "length"}],
        "learner": {"learning_rate": 1e-3},
        "evaluation": {"data": {"path": "unused"}, "every_steps": 2, "also": {"further": {"data": {"path": "unused"}}}},
        "checkpoint": {"every_steps": save_every, "keep": keep, "keep_best": keep_best},
    }
    return TrainRecipe.model_validate(sections)


def run(
    path: Path, recipe: TrainRecipe, *, resume: bool = False, kill: Callable[[str], None] = lambda place: None
) -> list[str]:
    """What `cispo.loop.run_training` does between the start of the actors and their end; returns what it says."""
    folder = RunFolder.open_for_resume(path, recipe) if resume else RunFolder.create(path, recipe)
    for name in ("write_rollouts", "append_metrics"):
        setattr(folder, name, killable(getattr(folder, name), name, kill))
    views = SilentViews()
    try:
        crew, shown = cast(Crew, ToyCrew(recipe, kill)), cast(Views, views)
        assert recipe.evaluation is not None
        heldout = [HeldoutSet(name, settings, SETS[name]) for name, settings in recipe.evaluation.sets.items()]
        running = _Run(recipe, folder, crew, shown, PROMPTS, heldout)
        running.start(resume=resume)
        running.take_steps()
        running.finish()
    finally:
        folder.close()
    return views.messages


def killable(action: Callable[..., None], name: str, kill: Callable[[str], None]) -> Callable[..., None]:
    def act(*arguments: Any) -> None:
        kill(f"before {name}")
        action(*arguments)
        kill(f"after {name}")

    return act


def fingerprint(path: Path) -> dict[str, str]:
    """Metrics less their times, rollouts and checkpoints, as they are on disk."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith(("time_s/", "perf/"))} for line in lines]
    files = [f for place in ("rollouts", "checkpoints") for f in sorted((path / place).rglob("*")) if f.is_file()]
    return {"metrics": json.dumps(kept), **{str(file.relative_to(path)): file.read_bytes().hex() for file in files}}


def kill_at(count: int, places: list[str]) -> Callable[[str], None]:
    """Note the places that a run passes, and kill it at the count-th."""

    def kill(place: str) -> None:
        places.append(place)
        if len(places) == count:
            raise Killed(place)

    return kill


@pytest.mark.parametrize("save_every", [1, 2, 3])
def test_killed_anywhere_and_resumed_a_run_is_the_same_run(tmp_path: Path, save_every: int) -> None:
    recipe = make_recipe(save_every=save_every)
    places: list[str] = []
    said = run(tmp_path / "alone", recipe, kill=kill_at(0, places))
    expected = fingerprint(tmp_path / "alone")
    assert [line["step"] for line in json.loads(expected["metrics"])] == list(range(STEPS + 1))
    assert len(places) > 30
    for count in range(1, len(places) + 1):
        path = tmp_path / f"killed_{count}"
        with pytest.raises(Killed):
            run(path, recipe, kill=kill_at(count, []))
        assert run(path, recipe, resume=True)[-7:-1] == said[-7:-1]
        left = fingerprint(path)
        # A kill between the last checkpoint and the removal of older ones leaves one more, which does no harm.
        assert expected.items() <= left.items(), f"killed at place {count}, {places[count - 1]}"
        assert all(name.startswith("checkpoints/") for name in left.keys() - expected.keys())


def test_a_run_that_leaves_solved_prompts_out_and_keeps_its_best_is_the_same_when_killed(tmp_path: Path) -> None:
    recipe = make_recipe(steps=8, save_every=3, keep=1, keep_best="reward/mean", drop=0.5)
    places: list[str] = []
    run(tmp_path / "alone", recipe, kill=kill_at(0, places))
    expected = fingerprint(tmp_path / "alone")
    metrics = json.loads(expected["metrics"])
    left_out = [line["group/left_out_solved"] for line in metrics[1:]]
    assert left_out[:2] == [0.0, 0.0] and max(left_out) > 0
    measured = {line["step"]: line["reward/mean"] for line in metrics[1:]}
    best = max(measured, key=lambda step: measured[step])
    kept = {int(name[17:23]) for name in expected if name.startswith("checkpoints/step_")}
    assert kept == {best, 8}, "the best is not the last, or this shows nothing"
    for count in range(1, len(places) + 1, 3):
        path = tmp_path / f"killed_{count}"
        with pytest.raises(Killed):
            run(path, recipe, kill=kill_at(count, []))
        run(path, recipe, resume=True)
        left = fingerprint(path)
        assert expected.items() <= left.items(), f"killed at place {count}, {places[count - 1]}"


def test_windows_that_grow_are_the_same_in_a_run_that_was_killed(tmp_path: Path) -> None:
    recipe = make_recipe(steps=6, save_every=3, windows={"tokens": [1, 2], "steps": 2})
    places: list[str] = []
    said = run(tmp_path / "alone", recipe, kill=kill_at(0, places))
    expected = fingerprint(tmp_path / "alone")
    lines = json.loads(expected["metrics"])[1:]
    assert [line["completion/length_tokens/p99"] for line in lines] == [1, 1, 2, 2, 4, 4]
    assert [line["completion/window_tokens"] for line in lines] == [1, 1, 2, 2, 4, 4]
    assert sum("asked for from now on" in line for line in said) == 2
    for count in range(1, len(places) + 1, 3):
        path = tmp_path / f"killed_{count}"
        with pytest.raises(Killed):
            run(path, recipe, kill=kill_at(count, []))
        run(path, recipe, resume=True)
        assert expected.items() <= fingerprint(path).items(), f"killed at place {count}, {places[count - 1]}"


WINDOWS_AHEAD = {"tokens": [1], "steps": 2}


def windows_of(path: Path) -> list[tuple[int, int]]:
    """Of each step, the window that is logged and the length of its completions, which all fill theirs."""
    lines = json.loads(fingerprint(path)["metrics"])[1:]
    return [(line["completion/window_tokens"], line["completion/length_tokens/p99"]) for line in lines]


def test_steps_handed_out_ahead_keep_their_window_and_a_resumed_run_asks_for_them_with_the_new_one(
    tmp_path: Path,
) -> None:
    run(tmp_path / "alone", make_recipe(steps=6, windows=WINDOWS_AHEAD, ahead=2))
    # The second step opens it; the third and the fourth are handed out by then.
    assert windows_of(tmp_path / "alone") == [(1, 1)] * 4 + [(4, 4)] * 2
    run(tmp_path / "resumed", make_recipe(steps=2, windows=WINDOWS_AHEAD, ahead=2))
    state = load_checkpoint(tmp_path / "resumed" / "checkpoints" / "step_000002").loop_state
    assert state["length_windows"] == {"window_tokens": 4, "perplexities": []}
    run(tmp_path / "resumed", make_recipe(steps=6, windows=WINDOWS_AHEAD, ahead=2), resume=True)
    assert windows_of(tmp_path / "resumed") == [(1, 1)] * 2 + [(4, 4)] * 4


@pytest.mark.parametrize(
    ("dies_in", "save_every", "late"),
    # The checkpoint gone back to is of a step before the window opened, of the one that opened it, or of one after.
    [(2, 1, 4), (3, 1, 2), (3, 3, 4), (5, 3, 3)],
)
def test_windows_go_back_with_a_learner_that_died(tmp_path: Path, dies_in: int, save_every: int, late: int) -> None:
    trainings: list[str] = []

    def die(place: str) -> None:
        trainings.extend([place] * (place == "train"))
        if place == "train" and len(trainings) == dies_in:
            raise LearnerLostError("gone")

    said = run(tmp_path / "toy", make_recipe(steps=6, save_every=save_every, windows=WINDOWS_AHEAD, ahead=2), kill=die)
    assert any("the learner starts again" in line for line in said)
    assert windows_of(tmp_path / "toy") == [(1, 1)] * late + [(4, 4)] * (6 - late)


def test_a_run_killed_twice_in_the_same_place_is_the_same_run(tmp_path: Path) -> None:
    recipe = make_recipe()
    run(tmp_path / "alone", recipe)
    with pytest.raises(Killed):
        run(tmp_path / "killed", recipe, kill=kill_at(20, []))
    with pytest.raises(Killed):
        run(tmp_path / "killed", recipe, resume=True, kill=kill_at(2, []))
    run(tmp_path / "killed", recipe, resume=True)
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "alone")


def test_resuming_a_finished_run_changes_nothing_and_tells_its_gain_again(tmp_path: Path) -> None:
    said = run(tmp_path / "toy", make_recipe())
    before = fingerprint(tmp_path / "toy")
    again = run(tmp_path / "toy", make_recipe(), resume=True)
    assert fingerprint(tmp_path / "toy") == before
    assert again[0] == f"resumed from step_00000{STEPS}"
    assert again[-7:-1] == said[-7:-1]


def test_every_set_is_measured_under_its_name_with_noise_of_its_own(tmp_path: Path) -> None:
    said = run(tmp_path / "toy", make_recipe())
    lines = json.loads(fingerprint(tmp_path / "toy")["metrics"])
    measured = [line["step"] for line in lines if "eval/heldout/pass@1" in line]
    assert measured == [0, 2, 4, STEPS]
    assert measured == [line["step"] for line in lines if "eval/further/pass@1" in line]
    # The same prompts in both sets do not give the same completions.
    assert any(line["eval/heldout/avg@1"] != line["eval/further/avg@1"] for line in lines if line["step"] in measured)
    titles = [line.partition(":")[0] for line in said[-7:-1]]
    assert titles[:2] == ["held-out before", "held-out after"] and titles[2].startswith("gain ")
    assert titles[3:5] == ["held-out further before", "held-out further after"] and titles[5].startswith("gain ")


def test_a_run_can_be_resumed_with_more_steps(tmp_path: Path) -> None:
    run(tmp_path / "short", make_recipe(steps=3))
    run(tmp_path / "short", make_recipe(steps=STEPS), resume=True)
    run(tmp_path / "long", make_recipe(steps=STEPS))
    short, long = fingerprint(tmp_path / "short"), fingerprint(tmp_path / "long")
    # The shorter run measured its policy after its own last step.
    assert {name: text for name, text in short.items() if name != "metrics"} == {
        name: text for name, text in long.items() if name != "metrics"
    }
    assert json.loads(short["metrics"])[-1] == json.loads(long["metrics"])[-1]


def failing_rewards(monkeypatch: pytest.MonkeyPatch, *, of_stream: str) -> None:
    group_of = ToyCrew._group

    def group(crew: ToyCrew, prompt: Prompt, group_size: int, stream: str) -> ScoredGroup:
        made = group_of(crew, prompt, group_size, stream)
        failed = Score(0.0, ScoreStatus.ERROR, message="reward 'mine': raised KeyError")
        return replace(made, scores=(failed,) * group_size) if stream.startswith(of_stream) else made

    monkeypatch.setattr(ToyCrew, "_group", group)


def test_a_reward_that_fails_on_the_whole_first_evaluation_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        failing_rewards(broken, of_stream="evaluation")
        with pytest.raises(RewardError, match=r"before the first step.*all 3 completions.*KeyError.*mend the reward"):
            run(tmp_path / "toy", make_recipe())
    assert (tmp_path / "toy" / "metrics.jsonl").read_bytes() == b""
    assert not list((tmp_path / "toy" / "checkpoints").iterdir())
    run(tmp_path / "toy", make_recipe(), resume=True)
    run(tmp_path / "alone", make_recipe())
    assert fingerprint(tmp_path / "toy") == fingerprint(tmp_path / "alone")


@pytest.mark.parametrize("fails", [False, True])
def test_the_crew_is_closed_however_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    recipe, closed = make_recipe(), []

    class ClosableCrew(ToyCrew):
        def __init__(self, recipe: TrainRecipe, policy_path: Path, **options: object) -> None:
            super().__init__(recipe, lambda place: None)

        def row_dependent_shapes(self) -> list[str]:
            if fails:
                raise RewardError("broken")
            return []

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(loop, "Crew", ClosableCrew)
    monkeypatch.setattr(loop, "resolve_policy", lambda path, base_path: tmp_path)
    monkeypatch.setattr(loop, "load_prompts", lambda data, base_path: PROMPTS)
    monkeypatch.setattr(loop, "load_heldout", lambda evaluation, base_path: [])
    monkeypatch.setattr(loop, "check_start", lambda *arguments: None)
    monkeypatch.setattr(loop, "ray_session", lambda settings: nullcontext())
    monkeypatch.setattr(loop, "_views", lambda recipe, folder: nullcontext(SilentViews()))
    folder = RunFolder.create(tmp_path / "toy", recipe)
    with pytest.raises(RewardError, match="broken") if fails else nullcontext():
        loop.run_training(recipe, folder, resume=False)
    folder.close()
    assert len(closed) == 1
