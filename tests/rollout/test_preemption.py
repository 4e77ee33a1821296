"""Few pages: sequences are set aside and go on, and no bit of any sample changes for it."""

import pytest

from cispo.rollout.engine import Engine
from cispo.rollout.request import Drawing, RequestError, ThinkingBudget
from cispo.rollout.sequence import Stage
from cispo.types import StopReason
from tests.rollout.trials import Policy, assert_empty, request, run, samples, stops

REQUESTS = [
    request("short", 5, 4),
    request("page", 49, 3),
    request("two", 90, 2),
    request("long", 120, 3, **stops(max_new_tokens=40)),
    request("one", 1, 6, priority=1),
    request("think", 30, 3, **stops(thinking=ThinkingBudget(20, "</t>", "stop it</t>"))),
]


@pytest.mark.parametrize("pages", [6, 8, 11, 20])
@pytest.mark.parametrize(("records_experts", "runs_ahead"), [(False, False), (True, False), (True, True)])
def test_samples_are_those_of_a_cache_with_room_for_all(
    policy: Policy, pages: int, records_experts: bool, runs_ahead: bool
) -> None:
    reference = run(policy.engine(records_experts=records_experts), REQUESTS)
    sizes = {"cache_pages": pages, "max_prefill_tokens": 64}
    engine = policy.engine(records_experts=records_experts, runs_ahead=runs_ahead, **sizes)
    groups = run(engine, REQUESTS)
    assert samples(groups) == samples(reference)
    if pages < 20:
        assert engine.times_set_aside > 0
    assert_empty(engine)
    if records_experts:
        for name, group in groups.items():
            for one, other in zip(group.rollouts, reference[name].rollouts, strict=True):
                assert one.expert_ids_TLK is not None and other.expert_ids_TLK is not None
                assert one.expert_ids_TLK.tolist() == other.expert_ids_TLK.tolist()


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_turns_that_grow_together_beyond_the_pages_go_on_one_after_the_other(policy: Policy, runs_ahead: bool) -> None:
    """Each alone fits; what is put in wants more pages than are free, while nothing decodes."""
    requests = [request(f"p{i}", 10, 1, is_open=True, **stops(token_ids=tuple(range(260)))) for i in range(4)]

    def play(engine: Engine) -> dict[tuple[str, int], tuple[object, ...]]:
        turns = {f"p{i}": 0 for i in range(4)}
        for one in requests:
            engine.submit(one)
        waiting, groups = [], {}
        for _ in range(500):
            if engine.is_idle:
                break
            engine.step()
            waiting += engine.collect_turns()
            groups.update({group.prompt.id: group for group in engine.collect()})
            if len(waiting) == len(turns):
                for turn in waiting:
                    turns[turn.prompt_id] += 1
                    if turns[turn.prompt_id] > 3:
                        engine.close_turn(turn)
                    else:
                        assert engine.extend(turn, [65] * 90)
                waiting = []
                groups.update({group.prompt.id: group for group in engine.collect()})
        assert len(groups) == len(requests)
        assert_empty(engine)
        return samples(groups)

    few = policy.engine(limit=300, max_prompt_tokens=64, cache_pages=6, runs_ahead=runs_ahead)
    assert play(few) == play(policy.engine(limit=300, max_prompt_tokens=64))
    assert few.times_set_aside > 0


def test_higher_priorities_are_admitted_first_and_set_aside_last(policy: Policy) -> None:
    engine = policy.engine(capacity=4, cache_pages=6, limit=128)
    banned = {"drawing": Drawing(banned_ids=(policy.tokenizer.eos_id,))}
    for number in range(6):
        engine.submit(request(f"low{number}", 50, 1, priority=-1, **banned))
    for _ in range(3):
        engine.step()
    engine.submit(request("high", 50, 1, priority=5, **banned))
    ended: list[str] = []
    has_had_a_slot = False
    for _ in range(5000):
        if engine.is_idle:
            break
        engine.step()
        ended += [group.prompt.id for group in engine.collect()]
        high = [one for one in engine._room.in_slot.values() if one.group.request.prompt.id == "high"]
        has_had_a_slot |= bool(high)
        # Once it has a slot it keeps it: those of lower priority make room.
        assert high or not has_had_a_slot or "high" in ended
    assert engine.times_set_aside > 0
    assert len(ended) == 7
    # All need as many tokens, so of those that wait the first in rank ends first.
    assert ended.index("high") < ended.index("low4")
    assert ended.index("low4") < ended.index("low5")


def test_what_was_set_aside_gives_way_to_a_group_of_higher_priority(policy: Policy) -> None:
    engine = policy.engine(capacity=2, limit=128)
    for name in ("a", "b"):
        engine.submit(request(name, 5, 1))
    engine.step()
    victim = engine._room.in_slot[int(engine._room.decoding()[-1])]
    engine._room.set_aside(victim)
    engine.submit(request("urgent", 5, 1, priority=1))
    engine.step()
    assert {one.group.request.prompt.id for one in engine._room.in_slot.values()} == {"a", "urgent"}
    assert victim.stage is Stage.ASIDE
    assert len(run(engine)) == 3
    assert_empty(engine)


def test_an_interruption_without_a_page_leaves_the_stops_of_others_as_they_are(policy: Policy) -> None:
    thinks = request("thinks", 60, **stops(max_new_tokens=60, thinking=ThinkingBudget(2, "</t>", "time is up</t>")))
    ends = request("ends", 5, **stops(token_ids=tuple(range(0, 260, 17))))
    calm = run(policy.engine(), [thinks, ends])
    reference = samples(calm)
    assert calm["ends"].rollouts[0].stop_reason is StopReason.STOP_TOKEN
    assert calm["ends"].rollouts[0].completion_length_tokens > 5
    engine = policy.engine(capacity=2)
    engine.submit(thinks)
    engine.submit(ends)
    taken: list[int] = []

    def take_all_pages_for_a_while() -> None:
        if engine.steps == 1:
            while engine._cache.free_pages:
                taken.append(engine._cache._take_page())
        elif engine.steps == 40:
            while taken:
                engine._cache._drop_page(taken.pop())

    assert samples(run(engine, before_step=take_all_pages_for_a_while)) == reference
    assert engine.times_set_aside > 0
    assert_empty(engine)


def test_a_group_that_can_never_have_its_pages_is_refused(policy: Policy) -> None:
    engine = policy.engine(cache_pages=2)
    with pytest.raises(RequestError, match="may take 3 pages of 64 tokens, and the cache has 2"):
        engine.submit(request("long", 120))
    with pytest.raises(RequestError, match="cache_pages"):
        engine.submit(request("forks", 50, 8))
    assert set(run(engine, [request("fits", 50)])) == {"fits"}
    assert_empty(engine)
