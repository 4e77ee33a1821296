"""Engine and learner over one decoder on a GPU: the same code as on CPU, with its mismatch measured."""

from pathlib import Path

import pytest
import torch

from cispo.advantage import AdvantageSettings
from cispo.learner import Learner
from cispo.learner_settings import LearnerSettings
from cispo.model.checkpoint import load_policy
from cispo.model.tokenizer import Tokenizer
from cispo.objective_settings import CispoSettings
from cispo.resources import resolve_policy
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest
from cispo.types import Prompt, Score, ScoredGroup


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)], ids=str)
def test_a_step_on_one_gpu(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    folder = resolve_policy("bundled:tiny", base_path=tmp_path)
    decoder = load_policy(folder, dtype=dtype, device="cuda")
    settings = SamplingSettings(max_completion_tokens=96, seed=0)
    engine = Engine(decoder, Tokenizer.load(folder), settings, max_concurrent_completions=64, max_prompt_tokens=64)
    learner = Learner(
        decoder,
        objective=CispoSettings(),
        advantage=AdvantageSettings(),
        settings=LearnerSettings(learning_rate=1e-5, updates_per_step=2),
        temperature=1.0,
        max_completion_tokens=96,
        total_updates=10,
        seed=0,
    )
    for step in (1, 2):
        for name in ("add 4 to n", "reverse the word", "sum the numbers", "negate num"):
            engine.submit(GroupRequest(Prompt(name, f"Write `fn(n)` to {name}."), 16, Drawing(1.0), stream=str(step)))
        while not engine.is_idle:
            engine.step()
        groups = [
            ScoredGroup(g.prompt, g.rollouts, tuple(Score(float(len(r.text) % 2)) for r in g.rollouts))
            for g in engine.collect()
        ]
        metrics = learner.train(groups, step)
        engine.policy_version = learner.policy_version
        print({name: value for name, value in metrics.items() if "mismatch" in name})
        assert metrics["policy/mismatch/max"] < bound
        assert metrics["optim/updates"] == 2
