"""Groups in, scores out: sums, parts, memory of verdicts, and every way in which a reward can go wrong."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cispo.errors import RewardError, SandboxError
from cispo.rewards.reward_set import RewardSet
from cispo.rewards.settings import RewardSettings
from cispo.rewards.statistics import verdict_shares
from cispo.sandboxes.judge import IMPATIENT_PAUSES_S, RETRY_PAUSES_S
from cispo.sandboxes.settings import SandboxSettings
from cispo.types import Group, Prompt, Rollout, Score, ScoreStatus, StopReason, Turn

SANDBOX = SandboxSettings(workers=2, cpu_s=1.0, wall_s=20.0)
ROW = {"entry_point": "double", "tests": [{"args": [n], "expected": 2 * n} for n in range(4)]}
RIGHT = "```python\ndef double(x):\n    return 2 * x\n```"
WRONG = "def double(x):\n    return x * x"
Make = Callable[..., RewardSet]


def rollout(index: int, text: str, tokens: int = 10, stop_reason: StopReason = StopReason.EOS) -> Rollout:
    turn = Turn(
        np.zeros(tokens, np.int32), np.ones(tokens, np.bool_), np.zeros(tokens, np.float32), np.zeros(tokens, np.int32)
    )
    return Rollout("task-7", index, np.zeros(3, np.int32), (turn,), stop_reason, text)


def group(*texts: str, row: dict[str, Any] = ROW, **options: Any) -> Group:
    rollouts = tuple(rollout(index, text, **options) for index, text in enumerate(texts))
    return Group(Prompt("task-7", "Double it.", row), rollouts)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    opened = []

    def make_set(*rewards: RewardSettings, source: str = "", sandbox: SandboxSettings = SANDBOX) -> RewardSet:
        (tmp_path / "mine.py").write_text(source)
        made = RewardSet(rewards, sandbox, base_path=tmp_path, max_completion_tokens=20)
        opened.append(made)
        return made

    yield make_set
    for made in opened:
        made.close()


def mine(name: str = "reward", **settings: Any) -> RewardSettings:
    return RewardSettings(name=f"mine.py:{name}", **settings)


def test_the_weighted_sum_with_its_parts(make: Make) -> None:
    source = "def reward(prompt, completion): return len(completion) / 100"
    rewards = make(
        RewardSettings(name="code"),
        RewardSettings(name="format", weight=0.5),
        RewardSettings(name="length", args={"cache_tokens": 20}),
        mine(weight=-2.0),
        source=source,
    )
    right, wrong, formless = rewards.score(group(RIGHT, WRONG, "x" * 50))
    assert right.parts == {
        "code": 1.0, "correct": 1.0, "well_formed": 1.0, "format": 1.0, "length": -0.5, "reward": len(RIGHT) / 100,
    }  # fmt: skip
    assert right.value == pytest.approx(1.0 + 0.5 - 0.5 - 2.0 * len(RIGHT) / 100)
    assert right.info == {"verdict": "ok", "passed": 4, "total": 4}
    assert wrong.value == pytest.approx(0.0 + 0.5 - 0.5 - 2.0 * len(WRONG) / 100)
    assert wrong.info == {"verdict": "wrong_answer", "passed": 2, "total": 4}
    assert formless.value == pytest.approx(0.0 + 0.0 - 0.5 - 2.0 * 0.5)
    assert all(score.status is ScoreStatus.OK for score in (right, wrong, formless))


def test_equal_programs_are_run_once(make: Make) -> None:
    rewards = make(RewardSettings(name="code"), RewardSettings(name="format"))
    assert [score.value for score in rewards.score(group(RIGHT, RIGHT, WRONG, RIGHT))] == [2.0, 2.0, 1.0, 2.0]
    first = rewards.statistics()
    assert (first["perf/sandbox_executions"], first["perf/sandbox_cache_hits"]) == (2.0, 6.0)
    assert first["time_s/sandbox"] > 0.0
    assert rewards.statistics() == {}
    rewards.score(group(WRONG))
    assert rewards.statistics() == {
        "perf/sandbox_executions": 0.0, "perf/sandbox_cache_hits": 2.0, "time_s/sandbox": 0.0,
    }  # fmt: skip


def test_shares_of_verdicts_follow_from_the_scores_alone(make: Make) -> None:
    rewards = make(RewardSettings(name="code"))
    scores = rewards.score(group(RIGHT, WRONG, "def double(x):\n    while True: pass", "?"))
    assert verdict_shares(scores) == {"sandbox/frac_timeout": 0.25, "sandbox/frac_error": 0.0}
    assert verdict_shares([Score(1.0)]) == {}
    failed = Score(0.0, ScoreStatus.ERROR, info={"verdict": "sandbox_error"})
    assert verdict_shares([failed, scores[0]])["sandbox/frac_error"] == 0.5


def test_no_sandbox_is_opened_when_no_reward_asks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    rewards = make(mine(), source="def reward(prompt, completion): return 1")
    assert [score.value for score in rewards.score(group("x"))] == [1.0]
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        make(RewardSettings(name="code"))


def test_a_function_gets_what_it_asks_for(make: Make) -> None:
    source = """
from cispo.types import Score

def reward(prompt, completion, *, entry_point, completion_length_tokens, max_completion_tokens, is_truncated, bonus=1):
    seen = [prompt, completion, entry_point, completion_length_tokens, max_completion_tokens, is_truncated, bonus]
    return Score(0.0, info={"seen": seen})

def all_columns(prompt, completion, **row):
    return Score(0.0, info={"names": sorted(row)})
"""
    rewards = make(mine(args={"bonus": 5}), mine("all_columns"), source=source)
    (score,) = rewards.score(group("text", stop_reason=StopReason.LENGTH))
    assert score.info == {
        "seen": ["Double it.", "text", "double", 10, 20, True, 5],
        "names": ["completion_length_tokens", "entry_point", "is_truncated", "max_completion_tokens", "tests"],
    }


def test_a_function_may_judge_programs_itself(make: Make) -> None:
    source = """
def reward(prompt, completion, *, entry_point, tests, judge):
    return judge(completion, entry_point, tests).passed / len(tests)
"""
    assert [score.value for score in make(mine(), source=source).score(group(WRONG, "?"))] == [0.5, 0.0]


def test_async_functions_run_at_one_time_on_one_loop(make: Make) -> None:
    source = """
import asyncio
waiting = []
async def reward(prompt, completion):
    waiting.append(completion)
    while len(waiting) < 4:
        await asyncio.sleep(0.001)
    return float(completion) + (asyncio.get_running_loop() is loops.setdefault(0, asyncio.get_running_loop()))
loops = {}
"""
    rewards = make(mine(timeout_s=20.0), source=source)
    assert [score.value for score in rewards.score(group("1", "2", "3", "4"))] == [2.0, 3.0, 4.0, 5.0]
    assert [score.value for score in rewards.score(group("5"))] == [6.0]


def test_parts_of_the_same_name_are_kept_apart(make: Make) -> None:
    source = """
from cispo.types import Score
def one(prompt, completion): return Score(1.0, parts={"a": 1.0, "two": 5.0}, info={"k": 1})
def two(prompt, completion): return Score(2.0, parts={"a": 2.0}, info={"k": 2})
"""
    (score,) = make(mine("one"), mine("two"), mine("two"), source=source).score(group("x"))
    assert score.parts == {
        "one": 1.0, "two": 2.0, "two_2": 2.0, "a": 1.0, "one.two": 5.0, "two.a": 2.0, "two_2.a": 2.0,
    }  # fmt: skip
    assert score.info == {"k": 1, "two.k": 2, "two_2.k": 2}


def test_a_function_cannot_change_the_row_for_others(make: Make) -> None:
    source = "def reward(prompt, completion, *, tests): tests.clear(); return 0.0"
    rewards = make(mine(), RewardSettings(name="code"), source=source)
    assert [score.value for score in rewards.score(group(RIGHT, RIGHT))] == [1.0, 1.0]


FAILURES = {
    "raises": ("raise ValueError('no\\nway')", "raised ValueError: no way (mine.py:7)"),
    "orders a terminal": ("raise ValueError(chr(27) + '[2Jx')", "raised ValueError: \\x1b[2Jx (mine.py:7)"),
    "asserts": ("assert False", "raised AssertionError (mine.py:7)"),
    "exits": ("import sys; sys.exit(2)", "raised SystemExit: 2 (mine.py:7)"),
    "interrupts": ("raise KeyboardInterrupt", "raised KeyboardInterrupt (mine.py:7)"),
    "times out by itself": ("raise TimeoutError('slow api')", "raised TimeoutError: slow api (mine.py:7)"),
    "raises what cannot be shown": ("raise Mute()", "raised Mute: a Mute that cannot be shown (mine.py:7)"),
    "recurses": ("return reward(prompt, completion)", "raised RecursionError"),
    "NaN": ("return float('nan')", "returned nan; return a finite number"),
    "infinity": ("return -float('inf')", "returned -inf; return a finite number"),
    "a string": ("return '1.0'", "returned '1.0' of type str; return a float"),
    "None": ("return None", "returned None of type NoneType; return a float"),
    "a bool": ("return True", "returned True of type bool; return a float"),
    "a numpy bool": ("return numpy.bool_(True)", "of type bool; return a float"),
    "a list": ("return [1.0]", "returned [1.0] of type list; return a float"),
    "an array": ("return numpy.ones(2)", "of type ndarray; return a float"),
    "a huge int": ("return 10 ** 400", "too large to convert to float"),
    "what cannot be shown": ("return Silent()", "returned something of type Silent; return a float"),
    "a Score of NaN": ("return Score(float('nan'))", "returned a Score whose value is nan"),
    "a Score of True": ("return Score(True)", "returned a Score whose value is True of type bool"),
    "a part of NaN": ("return Score(1.0, parts={'a': float('nan')})", "a Score whose part 'a' is nan"),
    "a part without a name": ("return Score(1.0, parts={'a b': 1.0})", "a part named 'a b' of type str"),
    "parts of another kind": ("return Score(1.0, parts=[1.0])", "whose parts are [1.0] of type list"),
    "info that is no JSON": ("return Score(1.0, info={'a': {1}})", "whose info is no JSON object"),
    "an error of its own": ("return Score(0.0, ScoreStatus.ERROR, message='model is down')", "model is down"),
    "takes too long": ("import time; time.sleep(30)", "took longer than its timeout_s of 0.3 s"),
}
FAILING_SOURCE = """
import numpy
from cispo.types import Score, ScoreStatus
class Silent: __repr__ = __str__ = lambda self: 1 / 0
class Mute(Silent, Exception): pass
{kind} reward(prompt, completion):
    {body}
"""


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_reward_that_goes_wrong_is_an_error(make: Make, tmp_path: Path, name: str, kind: str) -> None:
    body, problem = FAILURES[name]
    if kind == "async def":
        body = body.replace("return reward", "return await reward").replace("time.sleep", "asyncio.sleep")
        body = body.replace("import time; ", "import asyncio; await ")
    rewards = make(mine(timeout_s=0.3), source=FAILING_SOURCE.format(kind=kind, body=body))
    first, second = rewards.score(group("x", "y"))
    for index, score in enumerate((first, second)):
        assert (score.status, score.value) == (ScoreStatus.ERROR, 0.0)
        assert score.message.startswith(f"reward 'reward' ({tmp_path}/mine.py): ")
        assert problem in score.message and "\n" not in score.message
        assert score.message.endswith(f"; prompt 'task-7', completion {index}")


def test_an_error_of_one_reward_or_completion_leaves_the_others(make: Make) -> None:
    source = "def reward(prompt, completion):\n    return {'a': 1.0, 'c': 3.0}[completion]"
    rewards = make(mine(), RewardSettings(name="length", args={"cache_tokens": 20}), source=source)
    scores = rewards.score(group("a", "b", "c"))
    assert [score.status for score in scores] == [ScoreStatus.OK, ScoreStatus.ERROR, ScoreStatus.OK]
    assert [score.value for score in scores] == [0.5, 0.0, 2.5]
    assert scores[1].parts == {"length": -0.5}


def test_a_missing_column_is_named_with_those_there_are(make: Make) -> None:
    rewards = make(mine(), source="def reward(prompt, completion, *, answer): return 1.0")
    (score,) = rewards.score(group("x"))
    assert score.status is ScoreStatus.ERROR
    assert "it needs 'answer', which is no column and no arg; columns: entry_point, tests" in score.message


@pytest.mark.parametrize(
    ("row", "args"),
    [({"completion": "x"}, {}), ({"judge": "x"}, {}), ({"bonus": 1}, {"bonus": 2}), ({}, {"is_truncated": 1})],
)
def test_a_name_with_two_meanings_is_an_error(make: Make, row: dict[str, Any], args: dict[str, Any]) -> None:
    rewards = make(mine(args=args), source="def reward(prompt, completion, **row): return 1.0")
    (score,) = rewards.score(group("x", row=row))
    assert score.status is ScoreStatus.ERROR and "has two meanings" in score.message


def test_bad_tests_are_an_error_of_the_sample(make: Make) -> None:
    rewards = make(RewardSettings(name="code"))
    (score,) = rewards.score(group(RIGHT, row={"entry_point": "double", "tests": [{"args": [1]}]}))
    assert score.status is ScoreStatus.ERROR and "mend the data set" in score.message


def test_a_sandbox_that_fails_masks_the_sample(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = make(RewardSettings(name="code"))
    assert rewards._sandbox is not None
    rewards._sandbox.close()
    (score,) = rewards.score(group(RIGHT))
    assert score.status is ScoreStatus.ERROR and "the sandbox is closed" in score.message
    assert score.info == {"verdict": "sandbox_error"}


def test_a_broken_sandbox_is_waited_for_once_and_not_by_every_program(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("cispo.sandboxes.attempts.time.sleep", slept.append)
    rewards = make(RewardSettings(name="code"))
    working = rewards._sandbox

    def fail(*arguments: object, **options: object) -> None:
        raise SandboxError("fork: Resource temporarily unavailable")

    assert working is not None
    run = working.run
    monkeypatch.setattr(working, "run", fail)
    for _ in range(3):
        (score,) = rewards.score(group(RIGHT))
        assert score.status is ScoreStatus.ERROR
    assert slept == [0.0, *RETRY_PAUSES_S] + 2 * [0.0, *IMPATIENT_PAUSES_S]
    monkeypatch.setattr(working, "run", run)
    (score,) = rewards.score(group(RIGHT))
    assert (score.status, score.value) == (ScoreStatus.OK, 1.0)


def test_a_hanging_function_does_not_hold_up_the_next(make: Make) -> None:
    source = """
import time
def reward(prompt, completion):
    if completion == "hang":
        time.sleep(600)
    return 1.0
"""
    rewards = make(mine(timeout_s=0.2), source=source)
    statuses = [score.status for score in rewards.score(group("hang", "go", "hang", "go"))]
    assert statuses == [ScoreStatus.ERROR, ScoreStatus.OK, ScoreStatus.ERROR, ScoreStatus.OK]


def test_an_async_function_that_blocks_the_loop_is_left_behind(make: Make) -> None:
    source = """
import time
async def reward(prompt, completion):
    if completion == "block":
        time.sleep(600)
    return 1.0
"""
    rewards = make(mine(timeout_s=0.2), source=source)
    assert all(score.status is ScoreStatus.ERROR for score in rewards.score(group("block", "block")))
    assert [score.value for score in rewards.score(group("go"))] == [1.0]


def test_rewards_are_checked_when_the_set_is_made(make: Make) -> None:
    with pytest.raises(RewardError, match="did you mean 'reward'"):
        make(mine("rewrad"), source="def reward(prompt, completion): return 1.0")
    with pytest.raises(RewardError, match="cache_tokens"):
        make(RewardSettings(name="length"))


def test_closing_twice_does_nothing(make: Make) -> None:
    rewards = make(RewardSettings(name="code"))
    rewards.close()
    rewards.close()
