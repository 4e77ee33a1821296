"""A short run of engine and learner that must learn: the reward of what is sampled rises, on three objectives."""

from pathlib import Path

import pytest
import torch

from cispo.advantage import AdvantageSettings
from cispo.learner import Learner
from cispo.learner_settings import LearnerSettings
from cispo.model.checkpoint import load_policy
from cispo.model.tokenizer import Tokenizer
from cispo.objective_settings import CispoSettings, DapoSettings, GrpoSettings, ObjectiveSettings
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest
from cispo.types import Prompt, Score, ScoredGroup

PROMPTS = [Prompt(id=f"p{i}", text=text) for i, text in enumerate(("say", "tell me", "go on", "what"))]


def share_of_small_letters(text: str) -> float:
    return sum(character.islower() and character.isascii() for character in text) / max(1, len(text))


STEPS = 16
GAIN = 0.4
"""Of four seeds, the slowest gains 0.87 with cispo, 0.50 with grpo and 0.78 with dapo."""


@pytest.mark.parametrize("objective", [CispoSettings(), GrpoSettings(), DapoSettings()], ids=["cispo", "grpo", "dapo"])
def test_the_reward_rises(small_policy_folder: Path, objective: ObjectiveSettings) -> None:
    decoder = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    engine = Engine(
        decoder,
        Tokenizer.load(small_policy_folder),
        SamplingSettings(max_completion_tokens=12, seed=0),
        max_concurrent_completions=64,
        max_prompt_tokens=16,
    )
    learner = Learner(
        decoder,
        objective=objective,
        advantage=AdvantageSettings(),
        settings=LearnerSettings(learning_rate=3e-3, updates_per_step=4),
        temperature=1.0,
        max_completion_tokens=12,
        total_updates=4 * STEPS,
        seed=0,
    )
    means = []
    for step in range(1, STEPS + 1):
        for prompt in PROMPTS:
            engine.submit(GroupRequest(prompt, 16, Drawing(1.0), stream=str(step)))
        while not engine.is_idle:
            engine.step()
        groups = [
            ScoredGroup(g.prompt, g.rollouts, tuple(Score(share_of_small_letters(r.text)) for r in g.rollouts))
            for g in engine.collect()
        ]
        means.append(sum(score.value for group in groups for score in group.scores) / (16 * len(groups)))
        metrics = learner.train(groups, step)
        if all(len({score.value for score in group.scores}) == 1 for group in groups):
            assert means[-1] > 0.95, "nothing is left to learn from only where everything is learnt"
            break
        assert metrics["policy/mismatch/max"] == 0.0
        engine.policy_version = learner.policy_version
    assert means[0] < 0.35
    assert means[-1] > means[0] + GAIN, means
