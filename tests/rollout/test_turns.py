"""Several turns: what an environment puts in carries no loss, and however a turn waits, the policy goes on the same."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.rollout.engine import Engine
from cispo.rollout.request import Drawing, GroupRequest, RequestError, Stops, ThinkingBudget
from cispo.rollout.sequence import OpenTurn
from cispo.types import Group, Rollout, StopReason
from tests.rollout.trials import Policy, assert_empty, assert_learners_logprobs, request, run, samples, stops

LIMIT = 200
DRAWING = Drawing(allowed_ids=(*range(60, 80), 259))
"""Few letters and end of sequence, so that turns are short."""

REQUESTS = [
    request("tool", 5, 3, drawing=DRAWING, is_open=True),
    request("long", 100, 2, drawing=DRAWING, is_open=True, **stops(token_ids=(61, 62))),
    request("words", 30, 2, drawing=DRAWING, is_open=True, **stops(strings=("a", "bcd"))),
    request("plain", 62, 2, **stops(max_new_tokens=50)),
]


def answer(turn: OpenTurn) -> list[int] | None:
    """What the environment says to a turn, of its ids alone; None ends the completion."""
    total = sum(turn.token_ids)
    return None if total % 5 == 0 else [65 + (total + place) % 20 for place in range(total % 70 + 1)]


def play(
    engine: Engine,
    requests: list[GroupRequest],
    *,
    waits: Callable[[], int] = lambda: 0,
    between: Callable[[Engine], Engine] = lambda engine: engine,
) -> tuple[dict[str, Group], list[OpenTurn]]:
    """Groups by prompt id, and all turns that were open. waits: how many steps an answer takes."""
    for one in requests:
        engine.submit(one)
    groups: dict[str, Group] = {}
    turns: list[OpenTurn] = []
    due: list[tuple[int, OpenTurn]] = []
    for step in range(3000):
        if engine.is_idle:
            assert_empty(engine)
            return groups, turns
        before, engine = engine, between(engine)
        if engine is not before:
            # What ended with the tokens under way; the turns that wait are open again in the engine that goes on.
            groups |= {group.prompt.id: group for group in before.collect()}
            due = []
        engine.step()
        for turn in engine.collect_turns():
            turns.append(turn)
            due.append((step + waits(), turn))
        for when, turn in [one for one in due if one[0] <= step]:
            due.remove((when, turn))
            ids = answer(turn)
            if ids is None:
                engine.close_turn(turn)
            else:
                engine.extend(turn, ids)
        groups |= {group.prompt.id: group for group in engine.collect()}
    raise AssertionError(f"not idle: {engine.open_turns} turns are open")


@pytest.fixture(scope="module")
def reference(policy: Policy) -> tuple[dict[str, Group], list[OpenTurn]]:
    return play(policy.engine(limit=LIMIT), REQUESTS)


def turns_of(rollout: Rollout, group: str, turns: list[OpenTurn]) -> Iterator[OpenTurn]:
    key = (group, rollout.completion_index)
    return (turn for turn in turns if (turn.prompt_id, turn.completion_index) == key)


def test_a_rollout_is_what_was_sampled_and_what_was_put_in(
    policy: Policy, reference: tuple[dict[str, Group], list[OpenTurn]]
) -> None:
    groups, turns = reference
    assert len(turns) > 20
    for name, group in groups.items():
        assert_learners_logprobs(policy.decoder, group.rollouts)
        for rollout in group.rollouts:
            said = list(turns_of(rollout, name, turns))
            ids: list[int] = []
            mask: list[bool] = []
            for turn in said:
                given = answer(turn) or []
                assert turn.text == policy.tokenizer.decode(turn.token_ids)
                if len(ids) + len(turn.token_ids) + len(given) >= LIMIT:
                    given = []
                ids += [*turn.token_ids, *given]
                mask += [True] * len(turn.token_ids) + [False] * len(given)
            unfinished = rollout.completion_length_tokens - len(ids)
            assert rollout.completion_token_ids_T[: len(ids)].tolist() == ids
            assert rollout.loss_mask_T.tolist() == mask + [True] * unfinished
            assert unfinished == 0 or name == "plain" or rollout.stop_reason is StopReason.LENGTH
            assert not rollout.logprobs_T[~rollout.loss_mask_T].any()
            assert rollout.logprobs_T[rollout.loss_mask_T].all()
            borders = np.flatnonzero(np.diff(rollout.loss_mask_T))
            assert len(rollout.turns) == len(borders) + 1
            if rollout.stop_reason is not StopReason.STOP_STRING:
                assert rollout.text == policy.tokenizer.decode(rollout.completion_token_ids_T.tolist())
    assert {"tool", "long", "words", "plain"} == groups.keys()
    reasons = {rollout.stop_reason for group in groups.values() for rollout in group.rollouts}
    assert reasons >= {StopReason.EOS, StopReason.STOP_TOKEN, StopReason.STOP_STRING, StopReason.LENGTH}


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_however_a_turn_waits_the_policy_goes_on_the_same(
    policy: Policy, reference: tuple[dict[str, Group], list[OpenTurn]], data: st.DataObject
) -> None:
    """Few slots and pages send waiting turns out of their slots; parking sends everything to another engine."""
    random = data.draw(st.randoms(use_true_random=False), "waits")
    most = data.draw(st.sampled_from([0, 3, 20]), "longest wait")
    parks_every = data.draw(st.sampled_from([0, 7, 31]), "parks every")
    sizes: dict[str, Any] = {
        "limit": LIMIT,
        "capacity": data.draw(st.integers(3, 12), "capacity"),
        "cache_pages": data.draw(st.none() | st.integers(6, 20), "pages"),
        "max_prefill_tokens": data.draw(st.sampled_from([64, 100, 16_384]), "piece"),
        "runs_ahead": data.draw(st.booleans(), "ahead"),
    }

    def park_now_and_then(engine: Engine) -> Engine:
        if not parks_every or engine.steps == 0 or engine.steps % parks_every:
            return engine
        other = policy.engine(**sizes)
        for parked in pickle.loads(pickle.dumps(engine.park())):
            other.resume(parked)
        assert_empty(engine)
        return other

    first = policy.engine(**sizes)
    groups, _ = play(first, REQUESTS, waits=lambda: random.randint(0, most), between=park_now_and_then)
    assert samples(groups) == samples(reference[0])


def test_a_turn_that_was_open_is_open_again_in_the_engine_that_goes_on(policy: Policy) -> None:
    one = request("tool", 5, 3, drawing=DRAWING, is_open=True, **stops(strings=("ab",)))
    engine, other = (policy.engine(limit=LIMIT) for _ in range(2))
    straight = run_to_open(policy.engine(limit=LIMIT), one)
    run_to_open(engine, one)
    (parked,) = pickle.loads(pickle.dumps(engine.park()))
    assert_empty(engine)
    assert engine.collect_turns() == []
    other.resume(parked)
    turns = other.collect_turns()
    assert [(turn.completion_index, turn.token_ids, turn.text) for turn in turns] == straight
    for turn in turns[1:]:
        other.close_turn(turn)
    assert other.extend(turns[0], [65, 66])
    while not other.is_idle:
        other.step()
        for turn in other.collect_turns():
            other.close_turn(turn)
    (group,) = other.collect()
    assert_learners_logprobs(policy.decoder, group.rollouts)
    first_turns = [tuple(rollout.turns[0].token_ids_T.tolist()) for rollout in group.rollouts]
    assert first_turns == [ids for _, ids, _ in straight]
    assert_empty(other)


def run_to_open(engine: Engine, one: GroupRequest) -> list[tuple[int, tuple[int, ...], str]]:
    """Step until all completions wait; their turns, which nobody has collected."""
    engine.submit(one)
    for _ in range(300):
        if engine.open_turns == one.group_size:
            break
        engine.step()
    turns = sorted(engine._groups.turns, key=lambda turn: turn.completion_index)
    assert len(turns) == one.group_size
    return [(turn.completion_index, turn.token_ids, turn.text) for turn in turns]


def test_only_the_policys_own_words_stop_it(policy: Policy) -> None:
    """A stop string in what was put in, or begun there, ends nothing; nor does the one that ended the turn before."""
    strings = ("stop", "b")
    b = policy.tokenizer.encode("b")[0]
    drawing = Drawing(allowed_ids=(b, *policy.tokenizer.encode("op")))
    one = request("p", 5, 4, drawing=drawing, is_open=True, **stops(strings=strings, max_new_tokens=60))
    engine = policy.engine(limit=LIMIT)
    engine.submit(one)
    given = policy.tokenizer.encode("stop b st")
    for _ in range(300):
        if engine.is_idle:
            break
        engine.step()
        for turn in engine.collect_turns():
            assert turn.token_ids[-1] == b and b not in turn.token_ids[:-1]
            engine.extend(turn, given)
    (group,) = engine.collect()
    assert all(rollout.stop_reason is StopReason.LENGTH for rollout in group.rollouts)
    assert any(len(rollout.turns) > 4 for rollout in group.rollouts)


def test_what_leaves_no_room_for_the_policy_ends_the_completion_without_it(policy: Policy) -> None:
    every = Stops(max_new_tokens=20, token_ids=tuple(range(260)))
    engine = policy.engine()
    engine.submit(request("p", 5, 2, is_open=True, stops=every))
    while engine.open_turns < 2:
        engine.step()
    first, second = engine.collect_turns()
    assert not engine.extend(first, [65] * 19)
    assert engine.extend(second, [65] * 18)
    while not engine.open_turns:
        engine.step()
    (last,) = engine.collect_turns()
    assert not engine.extend(last, [65])
    (group,) = engine.collect()
    short, full = group.rollouts
    assert (short.completion_length_tokens, full.completion_length_tokens) == (1, 20)
    assert short.stop_reason is full.stop_reason is StopReason.LENGTH
    assert full.loss_mask_T.tolist() == [True, *[False] * 18, True]
    assert_empty(engine)


def test_an_interruption_that_leaves_no_room_ends_the_completion(policy: Policy) -> None:
    """What an environment put in has used the room up."""
    first = int(run(policy.engine(), [request("p")])["p"].rollouts[0].completion_token_ids_T[0])
    thinking = ThinkingBudget(10, "</t>", "time is up</t>")
    rules = Stops(max_new_tokens=40, token_ids=(first,), thinking=thinking)
    engine = policy.engine()
    engine.submit(request("p", is_open=True, stops=rules))
    while not engine.open_turns:
        engine.step()
    (turn,) = engine.collect_turns()
    # The next token is the 31st, past the budget, and the interruption's 14 do not fit into 40.
    assert engine.extend(turn, [65] * 29)
    (rollout,) = run(engine)["p"].rollouts
    assert rollout.stop_reason is StopReason.LENGTH
    assert rollout.completion_length_tokens == 31
    assert engine.interruptions == 0
    assert_empty(engine)


def test_turns_that_are_not_open_are_refused(policy: Policy) -> None:
    every = stops(token_ids=tuple(range(260)))
    engine, other = policy.engine(), policy.engine()
    engine.submit(request("p", 5, 1, is_open=True, **every))
    other.submit(request("q", 5, 1, is_open=True, **every))
    while not (engine.open_turns and other.open_turns):
        engine.step()
        other.step()
    (turn,), (foreign,) = engine.collect_turns(), other.collect_turns()
    with pytest.raises(RequestError, match="by tokens"):
        engine.extend(turn, [])
    with pytest.raises(RequestError, match="extension of a turn holds 320"):
        engine.extend(turn, [65, 320])
    with pytest.raises(RequestError, match="of prompt q, is not open"):
        engine.extend(foreign, [65])
    assert engine.extend(turn, [65])
    with pytest.raises(RequestError, match="is not open"):
        engine.extend(turn, [65])
    while not engine.open_turns:
        engine.step()
    # The completion waits again, but with another turn.
    with pytest.raises(RequestError, match="is not open"):
        engine.close_turn(turn)
    (later,) = engine.collect_turns()
    engine.close_turn(later)
    assert_empty(engine)
