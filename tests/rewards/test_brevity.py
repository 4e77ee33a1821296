"""The example plugin, found and called as a recipe would."""

from pathlib import Path

import numpy as np
import pytest

import cispo.recipes
from cispo.rewards.reward_set import RewardSet
from cispo.rewards.settings import RewardSettings
from cispo.sandboxes.settings import SandboxSettings
from cispo.types import Group, Prompt, Rollout, StopReason, Turn


@pytest.mark.parametrize(
    ("completion", "stop_reason", "value"),
    [
        ("```python\ndef f():\n\n    return 1\n```", StopReason.EOS, 0.5),
        ("```python\n```", StopReason.EOS, 1.0),
        ("a\nb\nc\nd\ne", StopReason.EOS, 0.0),
        ("a", StopReason.LENGTH, 0.0),
    ],
)
def test_short_programs_are_favoured(completion: str, stop_reason: StopReason, value: float) -> None:
    assert cispo.recipes.__file__ is not None
    settings = RewardSettings(name="plugins/brevity.py:brevity", args={"most_lines": 4})
    recipes = Path(cispo.recipes.__file__).parent
    turn = Turn(np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), np.zeros(1, np.int32))
    rollout = Rollout("p", 0, np.zeros(1, np.int32), (turn,), stop_reason, completion)
    rewards = RewardSet([settings], SandboxSettings(), base_path=recipes, max_completion_tokens=64)
    try:
        (score,) = rewards.score(Group(Prompt("p", "", {}), (rollout,)))
    finally:
        rewards.close()
    assert (score.value, score.parts) == (value, {"brevity": value})
