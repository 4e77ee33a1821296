"""Solved prompts are left out of later passes, of no pass under way, and a resumed run goes on with the same."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.errors import CheckpointError
from cispo.prompt_order import prompts_of_step
from cispo.types import Prompt, Score, ScoredGroup, ScoreStatus
from cispo.unsolved_prompts import UnsolvedPrompts

PROMPTS = [Prompt(id=f"p{index}", text=f"question {index}") for index in range(12)]


def group(name: str, *values: float | None) -> ScoredGroup:
    """A scored group without rollouts; None is a reward that failed."""
    scores = tuple(Score(0.0, ScoreStatus.ERROR) if value is None else Score(value) for value in values)
    return ScoredGroup(Prompt(id=name, text=""), (), scores)


def table(**settings: float) -> UnsolvedPrompts:
    return UnsolvedPrompts(PROMPTS, 4, seed=3, solved_at=settings.get("solved_at", 0.9))


def ids(prompts: UnsolvedPrompts, *steps: int) -> list[str]:
    return [prompt.id for step in steps for prompt in prompts.prompts_of_step(step).prompts]


@given(st.integers(1, 12), st.integers(0, 5), st.integers(1, 40))
def test_with_nothing_solved_they_are_those_of_the_plain_order(per_step: int, seed: int, step: int) -> None:
    prompts = UnsolvedPrompts(PROMPTS, per_step, seed=seed, solved_at=1.0)
    assert prompts.prompts_of_step(step) == prompts_of_step(PROMPTS, per_step, seed=seed, step=step)


def test_a_solved_prompt_ends_with_its_pass() -> None:
    prompts = table()
    first = ids(prompts, 1)
    prompts.record([group(name, 1.0, 1.0) for name in first] + [group("p99", 1.0)])
    assert len(set(ids(prompts, 1, 2, 3))) == 12, "the pass under way is not touched"
    later = ids(prompts, 4, 5)
    assert set(later) == {prompt.id for prompt in PROMPTS} - set(first) and prompts.left_out(4) == 4
    assert prompts.prompts_of_step(6).epoch == 2 and prompts.left_out(1) == 0


def test_the_newest_group_decides_and_failed_rewards_do_not() -> None:
    prompts = table(solved_at=0.5)
    prompts.record([group("p0", 1.0, 0.0), group("p1", 1.0), group("p2", None, None), group("p3", None, 1.0)])
    prompts.record([group("p1", 0.0, 0.0, 0.9), group("p4", 0.4)])
    prompts.prompts_of_step(4)
    assert prompts.state_dict()["passes"][1]["without"] == ["p0", "p3"]


def test_the_part_correct_counts_before_the_value() -> None:
    prompts = table()
    scores = (Score(1.1, parts={"correct": 0.0}), Score(0.2, parts={"correct": 1.0}))
    prompts.record([ScoredGroup(PROMPTS[0], (), scores[:1]), ScoredGroup(PROMPTS[1], (), scores[1:])])
    assert prompts.state_dict()["pass_rates"] == {"p0": 0.0, "p1": 1.0}


def test_as_many_stay_as_a_step_takes() -> None:
    prompts = table(solved_at=0.25)
    prompts.record([group(prompt.id, *[1.0] * (index + 1), *[0.0] * 4) for index, prompt in enumerate(PROMPTS[::-1])])
    # p11 has 1 of 5 right and is not solved; p10, p9, p8 are solved least of the others.
    assert set(ids(prompts, 4)) == set(ids(prompts, 5)) == {"p11", "p10", "p9", "p8"}
    assert [prompts.prompts_of_step(step).epoch for step in (4, 5)] == [1, 2]


@given(st.dictionaries(st.sampled_from([p.id for p in PROMPTS]), st.floats(0, 1)), st.integers(1, 8), st.integers(1, 9))
def test_a_resumed_run_goes_on_with_the_same_prompts(rates: Mapping[str, float], stop: int, more: int) -> None:
    prompts, again = table(), table()
    for step in range(1, stop + 1):
        prompts.prompts_of_step(step)
        prompts.record([group(name, rate, *([1.0] * step)) for name, rate in rates.items()])
    again.load_state_dict(json.loads(json.dumps(prompts.state_dict())))
    assert ids(again, *range(1, stop + more)) == ids(prompts, *range(1, stop + more))


def test_every_pass_takes_each_prompt_once_at_most() -> None:
    prompts = table(solved_at=0.5)
    seen: dict[int, list[str]] = {}
    for step in range(1, 30):
        chosen = prompts.prompts_of_step(step)
        seen.setdefault(chosen.epoch, []).extend(prompt.id for prompt in chosen.prompts)
        prompts.record([group(p.id, float(int(p.id[1:]) % 3 == 0)) for p in chosen.prompts])
    assert all(len(names) == len(set(names)) for names in seen.values())
    assert not any(int(name[1:]) % 3 == 0 for epoch, names in seen.items() if epoch for name in names)


def test_what_cannot_be_resumed_says_so() -> None:
    with pytest.raises(CheckpointError, match="has no table of pass rates"):
        table().load_state_dict({})
    strange = {"pass_rates": {}, "passes": [{"first_step": 1, "without": ["other"]}]}
    with pytest.raises(CheckpointError, match="leaves out the prompt 'other', which the data lack"):
        table().load_state_dict(strange)
    with pytest.raises(ValueError, match="12 prompts are fewer than 13 of a step"):
        UnsolvedPrompts(PROMPTS, 13, seed=0, solved_at=0.9)
