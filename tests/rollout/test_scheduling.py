"""Continuous batching: prompts read once, pieces beside decode, first come first served within a priority."""

import numpy as np
import pytest

from cispo.rollout.request import Drawing, Stops
from tests.rollout.trials import Policy, assert_empty, request, run, stops

FULL_LENGTH = Drawing(banned_ids=(259,))
"""Without end of sequence a completion goes on to its limit."""


@pytest.mark.parametrize("piece", [64, 16_384])
def test_a_groups_prompt_is_read_once_and_its_full_pages_are_shared(policy: Policy, piece: int) -> None:
    engine = policy.engine(max_prefill_tokens=piece, limit=60)
    engine.submit(request("p", 126, 8, drawing=FULL_LENGTH))
    for _ in range(4):
        engine.step()
    # 128 tokens are two pages, shared; each completion has one of its own besides.
    assert engine._cache.pages_in_use == 2 + 8
    run(engine)
    assert engine.prompt_tokens == 128
    assert_empty(engine)


def test_what_is_set_aside_reads_nothing_again(policy: Policy) -> None:
    engine = policy.engine(cache_pages=5)
    run(engine, [request(f"p{number}", 60, 2, drawing=FULL_LENGTH) for number in range(3)])
    assert engine.times_set_aside > 0
    # The last token that was sampled, which no step had read.
    assert engine.prompt_tokens <= 3 * 62 + engine.times_set_aside


def test_the_next_turn_reads_only_what_is_new(policy: Policy) -> None:
    engine = policy.engine()
    engine.submit(request("p", 98, is_open=True, stops=Stops(token_ids=tuple(range(260)))))
    while not engine.open_turns:
        engine.step()
    (turn,) = engine.collect_turns()
    assert engine.extend(turn, [65] * 20)
    while not engine.open_turns:
        engine.step()
    assert engine.prompt_tokens == 100 + 1 + 20


def test_a_long_prompt_is_read_in_pieces_while_others_decode_at_every_step(policy: Policy) -> None:
    engine = policy.engine(max_prompt_tokens=1000, max_prefill_tokens=64)
    engine.submit(request("decodes", 5, 2, drawing=FULL_LENGTH))
    engine.step()
    engine.submit(request("long", 700, 2, **stops(max_new_tokens=5)))
    for steps in range(1, 12):
        before, read = engine.completion_tokens, engine.prompt_tokens
        engine.step()
        assert engine.completion_tokens - before == (2 if steps < 11 else 4)
        assert 0 < engine.prompt_tokens - read <= 64
    assert set(run(engine)) == {"decodes", "long"}


def test_groups_of_one_priority_begin_in_the_order_they_came_in(policy: Policy) -> None:
    """A large group is not passed by small ones, which would keep it from ever having its slots."""
    engine = policy.engine(capacity=8)
    generator = np.random.default_rng(0)
    began: list[str] = []
    for number in range(60):
        size = 8 if number % 20 == 10 else int(generator.integers(1, 4))
        engine.submit(request(f"p{number}", int(generator.integers(1, 100)), size, **stops(max_new_tokens=6)))

    def note_who_began() -> None:
        slots = sorted(engine._room.in_slot.values(), key=lambda one: one.rank)
        began.extend(dict.fromkeys(name for one in slots if (name := one.group.request.prompt.id) not in began))

    run(engine, before_step=note_who_began)
    assert began == [f"p{number}" for number in range(60)]


def test_higher_priorities_begin_first(policy: Policy) -> None:
    engine = policy.engine(capacity=2)
    for number in range(12):
        engine.submit(request(f"p{number}", 5, 2, priority=number % 3, **stops(max_new_tokens=4)))
    ended: list[str] = []
    while not engine.is_idle:
        engine.step()
        ended += [group.prompt.id for group in engine.collect()]
    assert ended == [f"p{number}" for priority in (2, 1, 0) for number in range(12) if number % 3 == priority]


def test_an_engine_without_requests_does_nothing(policy: Policy) -> None:
    engine = policy.engine()
    assert engine.is_idle
    engine.step()
    assert (engine.collect(), engine.collect_failures(), engine.collect_turns(), engine.park()) == ([], [], [], [])
    assert engine.completion_tokens == engine.prompt_tokens == 0
    assert_empty(engine)
