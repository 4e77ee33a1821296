"""Stops: a completion with a stop is the completion without it, up to where the rule first holds."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.rollout.request import Drawing, Repetition, Stops, ThinkingBudget
from cispo.types import Rollout, StopReason
from tests.rollout.trials import (
    LIMIT,
    Policy,
    assert_empty,
    assert_learners_logprobs,
    facts,
    request,
    run,
    samples,
    stops,
)

GROUP = 6
LETTERS = ("a", "b", "é", "ab", "ba", "abab", "bab")


@pytest.fixture(scope="module")
def babble(syllable_policy: Policy) -> tuple[Drawing, list[Rollout]]:
    """A drawing of few letters, bytes of a character by themselves and end of sequence; and what it gives unstopped."""
    ids = {token for text in LETTERS for token in syllable_policy.tokenizer.encode(text)}
    drawing = Drawing(allowed_ids=(*sorted(ids), syllable_policy.tokenizer.eos_id))
    groups = run(syllable_policy.engine(), [request("p", 5, GROUP, drawing=drawing)])
    return drawing, list(groups["p"].rollouts)


def expected_end(policy: Policy, rollout: Rollout, rules: Stops) -> tuple[int, StopReason]:
    """How many tokens of an unstopped completion are left, and why, by the plain reading of the rules."""
    ids, logprobs, run_length = rollout.completion_token_ids_T.tolist(), rollout.logprobs_T, 0
    for count in range(1, len(ids) + 1):
        token, text = ids[count - 1], policy.tokenizer.decode(ids[:count])
        if token == policy.tokenizer.eos_id:
            return count, StopReason.EOS
        if token in rules.token_ids:
            return count, StopReason.STOP_TOKEN
        if any(string in text for string in rules.strings):
            return count, StopReason.STOP_STRING
        if rules.repetition is not None:
            is_likely = logprobs[count - 1] > np.float32(math.log(rules.repetition.probability))
            run_length = run_length + 1 if is_likely else 0
            if run_length >= rules.repetition.tokens:
                return count, StopReason.REPETITION
        if count == (rules.max_new_tokens or LIMIT):
            return count, StopReason.LENGTH
    raise AssertionError("the completion without stops is shorter than the one with them")


RULES = st.builds(
    Stops,
    max_new_tokens=st.none() | st.integers(1, LIMIT),
    strings=st.lists(st.text("abé", min_size=1, max_size=5), max_size=3).map(tuple),
    token_ids=st.lists(st.integers(64, 70), max_size=2).map(tuple),
    repetition=st.none() | st.builds(Repetition, st.integers(1, 3), st.floats(0.001, 0.1)),
)


@settings(max_examples=60, deadline=None)
@given(rules=RULES, runs_ahead=st.booleans())
def test_a_completion_ends_where_a_rule_first_holds(
    syllable_policy: Policy, babble: tuple[Drawing, list[Rollout]], rules: Stops, runs_ahead: bool
) -> None:
    drawing, unstopped = babble
    engine = syllable_policy.engine(runs_ahead=runs_ahead)
    rollouts = run(engine, [request("p", 5, GROUP, drawing=drawing, stops=rules)])["p"].rollouts
    for rollout, whole in zip(rollouts, unstopped, strict=True):
        count, reason = expected_end(syllable_policy, whole, rules)
        assert rollout.stop_reason is reason
        assert rollout.completion_token_ids_T.tolist() == whole.completion_token_ids_T[:count].tolist()
        assert rollout.logprobs_T.tobytes() == whole.logprobs_T[:count].tobytes()
        text = syllable_policy.tokenizer.decode(rollout.completion_token_ids_T.tolist())
        if reason is StopReason.STOP_STRING:
            text = text[: min(text.index(string) for string in rules.strings if string in text)]
        assert rollout.text == text
    assert engine.stop_reasons == Counter(rollout.stop_reason for rollout in rollouts)
    assert engine.completion_tokens == sum(rollout.completion_length_tokens for rollout in rollouts)
    assert_empty(engine)


def test_the_rules_are_all_met_by_what_the_policy_babbles(
    syllable_policy: Policy, babble: tuple[Drawing, list[Rollout]]
) -> None:
    """Else the test above would be empty."""
    _, unstopped = babble
    for rules, reason in (
        (Stops(strings=("ba", "é")), StopReason.STOP_STRING),
        (Stops(token_ids=tuple(syllable_policy.tokenizer.encode("b"))), StopReason.STOP_TOKEN),
        (Stops(repetition=Repetition(2, 0.002)), StopReason.REPETITION),
        (Stops(max_new_tokens=5), StopReason.LENGTH),
        (Stops(), StopReason.EOS),
    ):
        assert reason in {expected_end(syllable_policy, rollout, rules)[1] for rollout in unstopped}


def test_several_tokens_may_end_a_completion_like_end_of_sequence(policy: Policy) -> None:
    ends = (policy.tokenizer.eos_id, *policy.tokenizer.encode("<|user|>"), *policy.tokenizer.encode("<|bos|>"))
    drawing = Drawing(allowed_ids=(*ends, *range(60, 70)))
    engine = policy.engine()
    rollouts = run(engine, [request("p", 5, 20, drawing=drawing, **stops(token_ids=ends))])["p"].rollouts
    last = {int(rollout.completion_token_ids_T[-1]) for rollout in rollouts}
    assert last == set(ends)
    for rollout in rollouts:
        *before, end = rollout.completion_token_ids_T.tolist()
        assert not set(before) & set(ends)
        assert rollout.loss_mask_T.all()
        is_eos = end == policy.tokenizer.eos_id
        assert rollout.stop_reason is (StopReason.EOS if is_eos else StopReason.STOP_TOKEN)
        assert not rollout.is_truncated
    assert engine.stop_reasons.keys() == {StopReason.EOS, StopReason.STOP_TOKEN}


def test_a_completion_may_fill_prompt_and_limit_to_the_last_page(policy: Policy) -> None:
    engine = policy.engine(capacity=2, max_prompt_tokens=58, limit=70)
    drawing = Drawing(banned_ids=(policy.tokenizer.eos_id,))
    rollouts = run(engine, [request("p", 56, 2, drawing=drawing)])["p"].rollouts
    for rollout in rollouts:
        assert len(rollout.prompt_token_ids_T) + rollout.completion_length_tokens == 128
        assert rollout.stop_reason is StopReason.LENGTH
        assert rollout.is_truncated
    assert_learners_logprobs(policy.decoder, rollouts)
    assert_empty(engine)


ANSWER = "stop: <|assistant|>"


@pytest.mark.parametrize("end", ["<|assistant|>", "ab", "é"], ids=["one token", "text of tokens", "a character"])
@pytest.mark.parametrize("budget", [1, 7, 30])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_thinking_is_interrupted_at_its_budget_and_the_policy_goes_on(
    policy: Policy, end: str, budget: int, runs_ahead: bool
) -> None:
    tokenizer = policy.tokenizer
    ids = {token for text in (*LETTERS, "<|assistant|>") for token in tokenizer.encode(text)}
    drawing = Drawing(allowed_ids=(*ids, tokenizer.eos_id))
    unstopped = run(policy.engine(), [request("p", 5, GROUP, drawing=drawing)])["p"].rollouts
    engine = policy.engine(capacity=GROUP, runs_ahead=runs_ahead)
    thinking = ThinkingBudget(budget, end, ANSWER)
    rollouts = run(engine, [request("p", 5, GROUP, drawing=drawing, **stops(thinking=thinking))])["p"].rollouts
    forced = tokenizer.encode(ANSWER)
    interrupted = 0
    for rollout, whole in zip(rollouts, unstopped, strict=True):
        thought = whole.completion_token_ids_T[:budget].tolist()
        end_ids = tokenizer.encode(end)
        has_end = end_ids[0] in thought if len(end_ids) == 1 else end in tokenizer.decode(thought)
        if has_end or thought[-1] == tokenizer.eos_id:
            assert facts(rollout) == facts(whole)
            continue
        interrupted += 1
        given = slice(budget, budget + len(forced))
        assert [turn.loss_mask_T.all() for turn in rollout.turns] == [True, False, True]
        assert rollout.completion_token_ids_T[: given.stop].tolist() == thought + forced
        assert np.flatnonzero(~rollout.loss_mask_T).tolist() == list(range(given.start, given.stop))
        assert not rollout.logprobs_T[given].any() and not rollout.policy_versions_T[given].any()
        assert rollout.completion_length_tokens <= LIMIT
    assert engine.interruptions == interrupted == sum(rollout.is_interrupted for rollout in rollouts)
    if budget == 1:
        assert interrupted > 0
    assert engine.completion_tokens == sum(int(rollout.loss_mask_T.sum()) for rollout in rollouts)
    assert_learners_logprobs(policy.decoder, rollouts)
    assert_empty(engine)


def test_an_interruption_ends_a_run_of_likely_tokens(policy: Policy) -> None:
    rules = Stops(thinking=ThinkingBudget(4, "</t>", "x"), repetition=Repetition(6, 1e-30))
    rollouts = run(policy.engine(), [request("p", 5, 3, stops=rules)])["p"].rollouts
    for rollout in rollouts:
        if rollout.stop_reason is StopReason.REPETITION:
            assert rollout.completion_length_tokens == 4 + 1 + 6
    assert StopReason.REPETITION in {rollout.stop_reason for rollout in rollouts}


def test_stops_of_one_request_leave_its_neighbours_as_they_are(policy: Policy) -> None:
    others = [request("a", 10, 3), request("b", 70, 2)]
    reference = samples(run(policy.engine(), others))
    strange = [
        request("s", 9, 2, **stops(strings=("x", "y"), token_ids=(3, 4))),
        request("t", 9, 2, **stops(thinking=ThinkingBudget(3, "</t>", "stop</t>"))),
        request("r", 9, 2, **stops(repetition=Repetition(2, 0.01))),
    ]
    groups = run(policy.engine(), [strange[0], others[0], strange[1], others[1], strange[2]])
    assert reference.items() <= samples(groups).items()
