"""One request that cannot be served is refused or fails by itself; the others sample what they would have sampled."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cispo.model.decoder import Decoder
from cispo.model.routing import RoutingLog
from cispo.rollout.request import Drawing, GroupRequest, Repetition, RequestError, Stops, ThinkingBudget
from cispo.types import Prompt
from tests.rollout.trials import LIMIT, Policy, assert_empty, request, run, samples

UNTRAINED_ID = 300
"""Its embedding can be read, but no token of the tokenizer has it."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "top_p of 0": ({"drawing": Drawing(top_p=0.0)}, "top_p is 0; it must be above 0"),
    "top_p of NaN": ({"drawing": Drawing(top_p=math.nan)}, "top_p is nan"),
    "top_p above 1": ({"drawing": Drawing(top_p=1.5)}, r"top_p is 1\.5"),
    "top_k below 0": ({"drawing": Drawing(top_k=-1)}, "top_k is -1"),
    "min_p of 1": ({"drawing": Drawing(min_p=1.0)}, "min_p is 1"),
    "temperature below 0": ({"drawing": Drawing(temperature=-1.0)}, "temperature is -1"),
    "temperature of NaN": ({"drawing": Drawing(temperature=math.nan)}, "temperature is nan"),
    "temperature that logits divided by overflow": ({"drawing": Drawing(temperature=1e-39)}, "temperature is 1e-39"),
    "no token allowed": ({"drawing": Drawing(allowed_ids=())}, "leave no token"),
    "all allowed tokens banned": ({"drawing": Drawing(allowed_ids=(1, 2), banned_ids=(2, 1))}, "leave no token"),
    "all tokens banned": ({"drawing": Drawing(banned_ids=tuple(range(260)))}, "leave no token"),
    "unknown id allowed": ({"drawing": Drawing(allowed_ids=(1, 400))}, "allowed_ids holds 400"),
    "unknown id banned": ({"drawing": Drawing(banned_ids=(-1,))}, "banned_ids holds -1"),
    "unknown stop id": ({"stops": Stops(token_ids=(5, 260))}, "token_ids holds 260; .* from 0 to 259"),
    "stop string without a character": ({"stops": Stops(strings=("a", ""))}, "empty string"),
    "no new token": ({"stops": Stops(max_new_tokens=0)}, "max_new_tokens is 0"),
    "fewer than no new tokens": ({"stops": Stops(max_new_tokens=-3)}, "max_new_tokens is -3"),
    "more new tokens than there is room for": ({"stops": Stops(max_new_tokens=LIMIT + 1)}, f"from 1 to {LIMIT}"),
    "thinking budget of 0": ({"stops": Stops(thinking=ThinkingBudget(0))}, "thinking_budget is 0"),
    "thinking without an end": ({"stops": Stops(thinking=ThinkingBudget(5, end=""))}, "not empty"),
    "thinking budget without room for an answer": ({"stops": Stops(thinking=ThinkingBudget(LIMIT - 5))}, "no room"),
    "repetition of no token": ({"stops": Stops(repetition=Repetition(tokens=0))}, "at least 1"),
    "repetition of probability 1": ({"stops": Stops(repetition=Repetition(5, 1.0))}, "between 0 and 1"),
    "empty prompt": ({"length": 0}, "is empty"),
    "prompt of no token": ({"prompt_ids": []}, "has no tokens"),
    "prompt of an unknown token": ({"prompt_ids": [5, 320]}, "holds 320"),
    "prompt longer than the engine reads": ({"prompt_ids": [5] * 129}, "129 tokens, more than max_prompt_tokens 128"),
    "no completion": ({"group_size": 0}, "group_size 0"),
    "more completions than slots": ({"group_size": 33}, "max_concurrent_completions 32"),
    "threshold of 1": ({"expert_threshold": 1.0}, "expert_threshold is 1"),
}

OTHERS = [request("a", 10, 3), request("b", 70, 2), request("c", 20, 2, drawing=Drawing(0.7, top_k=40))]


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_can_never_be_served_is_refused_while_others_are_under_way(policy: Policy, name: str) -> None:
    changes, said = REFUSED[name]
    engine = policy.engine(limit=LIMIT)
    engine.submit(OTHERS[0])
    engine.step()
    with pytest.raises(RequestError, match=said):
        engine.submit(request("wrong", **changes))
    assert set(run(engine)) == {"a"}
    assert not engine.collect_failures()
    assert_empty(engine)


def test_refusals_leave_the_samples_of_others_as_they_are(policy: Policy) -> None:
    reference = samples(run(policy.engine(), OTHERS))
    engine = policy.engine()
    for changes, _ in REFUSED.values():
        with pytest.raises(RequestError):
            engine.submit(request("wrong", **changes))
    assert samples(run(engine, OTHERS)) == reference


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_that_the_routing_log_does_not_have_is_refused(policy: Policy, number: int) -> None:
    log = RoutingLog(policy.decoder.config, 2)
    engine = policy.engine(routing_log=log)
    with pytest.raises(RequestError, match=f"log_sequence is {number}.* has 2 sequences"):
        engine.submit(request("wrong", log_sequence=number))
    groups = run(engine, [request("right", 5, 2, log_sequence=1)])
    read = 7 + sum(rollout.completion_length_tokens - 1 for rollout in groups["right"].rollouts)
    assert log.routed_BL[:, 0].tolist() == [0, read]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"capacity": 0}, "max_concurrent_completions is 0"),
        ({"limit": 0}, "max_completion_tokens is 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"max_prefill_tokens": 63}, "max_prefill_tokens is 63; it must be at least 64"),
    ],
)
def test_an_engine_that_could_serve_nothing_is_refused(policy: Policy, sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        policy.engine(**sizes)


def poison(decoder: Decoder) -> None:
    """NaN wherever that token is read."""
    with torch.no_grad():
        decoder.embedding[UNTRAINED_ID] = math.nan


@pytest.mark.parametrize("place", [0, 40, 64, 99])
@pytest.mark.parametrize(("capacity", "runs_ahead"), [(4, False), (32, False), (4, True)])
def test_logits_that_are_not_numbers_fail_their_request_alone(
    fresh_policy: Callable[[], Policy], place: int, capacity: int, runs_ahead: bool
) -> None:
    """Slots and pages that held NaN are used again, and by sequences that end within what was NaN."""
    policy = fresh_policy()
    reference = samples(run(policy.engine(), OTHERS))
    poison(policy.decoder)
    engine = policy.engine(capacity=capacity, cache_pages=4 * capacity, runs_ahead=runs_ahead)
    ids = [65] * 100
    ids[place] = UNTRAINED_ID
    bad = [GroupRequest(Prompt(id=f"bad{i}", text=""), 3, prompt_ids=ids) for i in range(3)]
    groups = run(engine, [bad[0], OTHERS[0], bad[1], *OTHERS[1:], bad[2]])
    assert samples(groups) == reference
    failures = engine.collect_failures()
    assert sorted(failure.prompt_id for failure in failures) == ["bad0", "bad1", "bad2"]
    assert all("prompt bad" in failure.message and "not finite" in failure.message for failure in failures)
    assert engine.collect_failures() == []
    assert_empty(engine)


def test_a_prompt_is_poisoned_in_a_later_turn(fresh_policy: Callable[[], Policy]) -> None:
    policy = fresh_policy()
    poison(policy.decoder)
    engine = policy.engine()
    every_token = Stops(token_ids=tuple(range(260)))
    engine.submit(request("turns", 5, 2, is_open=True, stops=every_token))
    while engine.open_turns != 2:
        engine.step()
    first, second = engine.collect_turns()
    assert engine.extend(first, [65, UNTRAINED_ID, 65])
    engine.step()
    (failure,) = engine.collect_failures()
    assert failure.prompt_id == "turns"
    with pytest.raises(RequestError, match="is not open"):
        engine.close_turn(second)
    assert_empty(engine)
    assert set(run(engine, OTHERS)) == {"a", "b", "c"}


@torch.no_grad()
def test_a_damaged_weight_fails_all_that_is_under_way_and_a_good_one_mends_it(
    fresh_policy: Callable[[], Policy],
) -> None:
    policy = fresh_policy()
    good = {name: parameter.clone() for name, parameter in policy.decoder.named_parameters()}
    reference = samples(run(policy.engine(), OTHERS))
    engine = policy.engine()
    for one in OTHERS:
        engine.submit(one)
    engine.step()
    engine.update_weights(1, {name: torch.full_like(x, math.nan) for name, x in good.items()})
    assert run(engine) == {}
    assert sorted(failure.prompt_id for failure in engine.collect_failures()) == ["a", "b", "c"]
    assert_empty(engine)
    engine.update_weights(0, good)
    assert samples(run(engine, OTHERS)) == reference


def test_weights_of_other_shapes_are_refused_before_any_is_taken(fresh_policy: Callable[[], Policy]) -> None:
    policy = fresh_policy()
    reference = samples(run(policy.engine(), OTHERS))
    engine = policy.engine()
    wrong = {name: torch.zeros(1) for name, _ in policy.decoder.named_parameters()}
    with pytest.raises(ValueError, match="other shapes"):
        engine.update_weights(1, wrong)
    assert engine.policy_version == 0
    assert samples(run(engine, OTHERS)) == reference
