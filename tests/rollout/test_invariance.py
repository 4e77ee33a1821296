"""What a request samples depends on weights and itself alone: not on batch, slot, worker, order, pages or pieces."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.model.routing import ExpertRecord, RoutingControl
from cispo.rollout.request import Drawing, GroupRequest, Repetition, Stops, ThinkingBudget
from tests.rollout.trials import Policy, assert_empty, assert_learners_logprobs, request, run, samples, stops

REQUESTS = [
    request("short", 1, 4),
    request("chunk", 61, 3),
    request("page", 62, 2, drawing=Drawing(0.7)),
    request("long", 120, 3, **stops(max_new_tokens=20)),
    request("cut", 40, 2, drawing=Drawing(1.3, top_p=0.8, top_k=30, banned_ids=(0, 1, 2))),
    request("greedy", 30, 1, drawing=Drawing(0.0)),
    request("ends", 20, 5, **stops(token_ids=tuple(range(100, 120)), strings=("q",))),
    request("thinks", 70, 2, **stops(thinking=ThinkingBudget(30, "</t>", "time is up</t>"))),
    request("repeats", 9, 3, **stops(repetition=Repetition(3, 0.004))),
]


@pytest.fixture(scope="module")
def reference(policy: Policy) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Each request by itself, with room for all, its prompt in one piece."""
    alone: dict[tuple[str, int], tuple[Any, ...]] = {}
    for one in REQUESTS:
        groups = run(policy.engine(capacity=one.group_size), [one])
        assert_learners_logprobs(policy.decoder, groups[one.prompt.id].rollouts, one.drawing.temperature or 1.0)
        alone |= samples(groups)
    return alone


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_requests_sample_alike_in_any_engine_and_order(
    policy: Policy, reference: dict[tuple[str, int], tuple[Any, ...]], data: st.DataObject
) -> None:
    requests = data.draw(st.permutations(REQUESTS), "order")
    priorities = data.draw(st.lists(st.integers(-1, 1), min_size=len(requests), max_size=len(requests)), "priorities")
    waits = data.draw(st.lists(st.integers(0, 12), min_size=len(requests), max_size=len(requests)), "steps between")
    engine = policy.engine(
        capacity=data.draw(st.integers(5, 30), "capacity"),
        cache_pages=data.draw(st.none() | st.integers(5, 30), "pages"),
        max_prefill_tokens=data.draw(st.sampled_from([64, 65, 100, 200, 16_384]), "piece"),
        records_experts=data.draw(st.booleans(), "experts"),
        runs_ahead=data.draw(st.booleans(), "ahead"),
    )
    due: dict[int, list[GroupRequest]] = {}
    for number, (one, priority) in enumerate(zip(requests, priorities, strict=True)):
        due.setdefault(sum(waits[:number]), []).append(replace(one, priority=priority))

    def submit_what_is_due() -> None:
        for one in due.pop(engine.steps, []):
            engine.submit(one)

    groups = {}
    while due or not engine.is_idle:
        submit_what_is_due()
        engine.step()
        groups |= {group.prompt.id: group for group in engine.collect()}
    assert samples(groups) == reference
    assert_empty(engine)


def test_workers_that_share_the_requests_sample_what_one_would(
    policy: Policy, reference: dict[tuple[str, int], tuple[Any, ...]]
) -> None:
    first, second = policy.engine(), policy.engine(capacity=7)
    assert samples(run(first, REQUESTS[::2])) | samples(run(second, REQUESTS[1::2])) == reference


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(
    policy: Policy, reference: dict[tuple[str, int], tuple[Any, ...]], threads: int
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert samples(run(policy.engine(), REQUESTS)) == reference
    finally:
        torch.set_num_threads(before)


def test_names_and_streams_make_the_noise(policy: Policy) -> None:
    def ids(one: GroupRequest) -> list[list[int]]:
        rollouts = run(policy.engine(), [one])[one.prompt.id].rollouts
        return [rollout.completion_token_ids_T.tolist() for rollout in rollouts]

    prompt = [70, 71, 72]
    first = ids(request("a", prompt_ids=prompt, group_size=3))
    assert ids(request("a", prompt_ids=prompt, group_size=3)) == first
    assert ids(request("a", prompt_ids=prompt, group_size=2)) == first[:2]
    assert ids(request("b", prompt_ids=prompt, group_size=3)) != first
    assert ids(request("a", prompt_ids=prompt, group_size=3, stream="1")) != first
    assert ids(request("a", prompt_ids=prompt, group_size=3, stops=Stops(max_new_tokens=5))) == [x[:5] for x in first]


@pytest.mark.parametrize("piece", [64, 16_384])
@pytest.mark.parametrize("pages", [None, 6])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_recorded_experts_are_those_of_one_forward(
    policy: Policy, pages: int | None, piece: int, runs_ahead: bool
) -> None:
    engine = policy.engine(records_experts=True, cache_pages=pages, max_prefill_tokens=piece, runs_ahead=runs_ahead)
    groups = run(engine, [one for one in REQUESTS if one.prompt.id in ("chunk", "long", "thinks")])
    for group in groups.values():
        for rollout in group.rollouts:
            ids = [*rollout.prompt_token_ids_T.tolist(), *rollout.completion_token_ids_T.tolist()]
            record = ExpertRecord(policy.decoder.config)
            with torch.no_grad():
                cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
                control = RoutingControl(record=record)
                policy.decoder(torch.tensor(ids), torch.arange(len(ids)), cu_seqlens, routing=control)
            assert rollout.expert_ids_TLK is not None
            assert rollout.expert_ids_TLK.tolist() == record.ids_NLK[:-1].tolist()
