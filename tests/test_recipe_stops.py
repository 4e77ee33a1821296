"""Stops of a recipe, from its settings to the learner: they act in training and evaluation, are counted, and what
interrupts thinking trains nothing."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cispo.advantage import AdvantageSettings
from cispo.cli import main
from cispo.learner import Learner
from cispo.learner_settings import LearnerSettings
from cispo.model.checkpoint import load_policy
from cispo.model.tokenizer import Tokenizer
from cispo.objective_settings import CispoSettings
from cispo.recipe.rollout_schema import RepetitionSettings, RolloutSettings, ThinkingSettings
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.recipe_request import group_request, rollout_stops
from cispo.rollout.request import Repetition, Stops, ThinkingBudget
from cispo.types import Prompt, Rollout, Score, ScoredGroup

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
INTERRUPTION = "No.</t>"
"""Holds letters that stop the policy's own text, and must not stop this."""
BUDGET, LIMIT = 4, 24
THINKING = ThinkingSettings(tokens=BUDGET, end="</t>", interruption=INTERRUPTION)

REWARDS = """\
import json
from pathlib import Path

def reward(prompt, completion, *, completion_length_tokens, **row):
    with Path(__file__).with_name("seen.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([prompt, completion, completion_length_tokens]) + chr(10))
    return float(len(completion) % 3)
"""


@pytest.fixture(scope="module")
def groups(small_policy_folder: Path) -> list[ScoredGroup]:
    """Of four prompts, eight completions each, as a recipe with a budget and stop strings asks for them."""
    rollout = RolloutSettings(
        prompts_per_step=4, max_completion_tokens=LIMIT, stop_strings=tuple(LETTERS), thinking=THINKING
    )
    engine = Engine(
        load_policy(small_policy_folder, dtype=torch.float32, device="cpu"),
        Tokenizer.load(small_policy_folder),
        SamplingSettings(LIMIT, seed=1),
        max_concurrent_completions=32,
        max_prompt_tokens=16,
    )
    for number in range(4):
        prompt = Prompt(f"p{number}", "ask" * (1 + number))
        engine.submit(group_request(prompt, rollout, group_size=8, temperature=1.0, stream="1"))
    while not engine.is_idle:
        engine.step()
    assert not engine.collect_failures()
    collected = sorted(engine.collect(), key=lambda group: group.prompt.id)
    return [ScoredGroup(g.prompt, g.rollouts, tuple(Score(float(i % 2)) for i in range(8))) for g in collected]


def train(folder: Path, groups: Sequence[ScoredGroup]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and weights after one step of two updates."""
    decoder = load_policy(folder, dtype=torch.float32, device="cpu")
    learner = Learner(
        decoder,
        objective=CispoSettings(),
        advantage=AdvantageSettings(),
        settings=LearnerSettings(learning_rate=1e-2, updates_per_step=2),
        temperature=1.0,
        max_completion_tokens=LIMIT,
        total_updates=2,
        seed=0,
    )
    return learner.train(groups, 1), learner.policy_tensors()


def with_turns(groups: Sequence[ScoredGroup], change: Callable[[Rollout], Rollout]) -> list[ScoredGroup]:
    return [replace(group, rollouts=tuple(map(change, group.rollouts))) for group in groups]


def strange_where_forced(rollout: Rollout) -> Rollout:
    """The same with other logprobs and versions for the tokens that the policy did not sample."""
    turns = (
        replace(
            turn,
            logprobs_T=np.where(turn.loss_mask_T, turn.logprobs_T, np.float32(-7)),
            policy_versions_T=np.where(turn.loss_mask_T, turn.policy_versions_T, np.int32(-9)),
        )
        for turn in rollout.turns
    )
    return replace(rollout, turns=tuple(turns))


def as_if_sampled(rollout: Rollout) -> Rollout:
    turns = (replace(turn, loss_mask_T=np.ones_like(turn.loss_mask_T)) for turn in rollout.turns)
    return replace(rollout, turns=tuple(turns))


def test_settings_of_a_recipe_are_the_stops_of_its_requests() -> None:
    plain = RolloutSettings(prompts_per_step=1, max_completion_tokens=9)
    assert rollout_stops(plain) == Stops()
    both = plain.model_copy(update={"stop_strings": ("a", "b"), "thinking": THINKING})
    assert rollout_stops(both) == Stops(strings=("a", "b"), thinking=ThinkingBudget(BUDGET, "</t>", INTERRUPTION))
    of_m1 = plain.model_copy(update={"repetition": RepetitionSettings()})
    assert rollout_stops(of_m1).repetition == Repetition(3000, 0.99)
    request = group_request(Prompt("p", "x"), both, group_size=3, temperature=0.5, stream="eval")
    assert (request.group_size, request.drawing.temperature, request.stream) == (3, 0.5, "eval")
    assert request.stops == rollout_stops(both) and not request.drawing.has_cut


def test_tokens_that_interrupt_thinking_carry_no_loss(small_policy_folder: Path, groups: list[ScoredGroup]) -> None:
    forced = Tokenizer.load(small_policy_folder).encode(INTERRUPTION)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    interrupted = [rollout for rollout in rollouts if rollout.is_interrupted]
    assert len(interrupted) >= 8 and len(interrupted) < len(rollouts)
    for rollout in rollouts:
        given = rollout.completion_token_ids_T[~rollout.loss_mask_T].tolist()
        assert given == (forced if rollout.is_interrupted else [])

    metrics, weights = train(small_policy_folder, groups)
    # Their logprobs are stored as 0, so a single one among the loss tokens would show here.
    assert metrics["policy/mismatch/max"] == 0.0
    _, same = train(small_policy_folder, with_turns(groups, strange_where_forced))
    assert all(torch.equal(weight, same[name]) for name, weight in weights.items())
    wrong, other = train(small_policy_folder, with_turns(groups, as_if_sampled))
    assert wrong["policy/mismatch/max"] > 0.0
    assert any(not torch.equal(weight, other[name]) for name, weight in weights.items())


RECIPE: dict[str, Any] = {
    "name": "stops",
    "steps": 1,
    "policy": {"path": "policy", "device": "cpu"},
    "data": {"path": "prompts.jsonl", "columns": {"prompt": "question"}},
    "rollout": {
        "prompts_per_step": 4,
        "group_size": 8,
        "max_prompt_tokens": 32,
        "max_completion_tokens": LIMIT,
        "stop_strings": list(LETTERS),
        "thinking": THINKING.model_dump(),
        "repetition": {"tokens": 5, "probability": 1e-6},
    },
    "rewards": [{"name": "rewards.py:reward"}],
    "sandbox": {"workers": 1},
    "learner": {"learning_rate": 1.0e-4},
    "evaluation": {"data": {"path": "heldout.jsonl", "columns": {"prompt": "question"}}, "completions_per_prompt": 8},
    "ray": {"dashboard": False},
    "logging": {"console": "lines"},
}


@pytest.fixture
def folder(tmp_path: Path, small_policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, prompts to train and to evaluate on, and rewards that note what they see."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy").symlink_to(small_policy_folder)
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    for name in ("prompts", "heldout"):
        rows = [json.dumps({"question": f"{name} {number}"}) + "\n" for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path


def read(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_run_counts_each_stop_and_rewards_see_what_came_before_it(folder: Path) -> None:
    assert main(["train", "r.yaml"]) == 0
    run = folder / "runs" / "stops"
    (metrics,) = (one for one in read(run / "metrics.jsonl") if "stop/eos" in one)
    records = read(run / "rollouts" / "step_000001.jsonl")
    assert len(records) == 32
    for reason in ("eos", "length", "stop_string", "stop_token", "repetition"):
        assert metrics[f"stop/{reason}"] == sum(one["stop_reason"] == reason for one in records) / 32
    assert min(metrics["stop/stop_string"], metrics["stop/repetition"], metrics["completion/frac_interrupted"]) > 0
    assert metrics["completion/frac_interrupted"] == sum(one["is_interrupted"] for one in records) / 32
    assert metrics["completion/frac_truncated"] == metrics["stop/length"] + metrics["stop/repetition"]
    assert metrics["policy/mismatch/max"] == 0.0

    seen = read(folder / "seen.jsonl")
    trained = sorted([text, length] for prompt, text, length in seen if prompt.startswith("prompts"))
    assert trained == sorted([one["completion"], one["completion_length_tokens"]] for one in records)
    evaluated = [text for prompt, text, _ in seen if prompt.startswith("heldout")]
    assert len(evaluated) == 2 * 32
    for text in (*evaluated, *(one["completion"] for one in records)):
        assert not set(LETTERS) & set(text.replace(INTERRUPTION, "", 1))
    assert any(INTERRUPTION in text for text in evaluated)
