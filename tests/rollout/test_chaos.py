"""A thousand requests of all kinds, weights that change in between, more than there is room for: none is lost."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from cispo.rollout.engine import Engine
from cispo.rollout.request import Drawing, GroupRequest, Repetition, RequestError, Stops, ThinkingBudget
from cispo.rollout.sequence import OpenTurn
from cispo.types import Group, Prompt, StopReason
from tests.rollout.trials import LIMIT, Policy, assert_empty

REQUESTS = 1000
UPDATES = 20
POISON_ID = 300
"""A token that can be read and never sampled; here its embedding is no number."""


def random_request(number: int, generator: np.random.Generator) -> GroupRequest:
    """One in fifty fails, a few more can never be served."""
    ids = generator.integers(0, 260, int(generator.choice([1, 5, 20, 63, 64, 65, 128]))).tolist()
    if generator.random() < 0.02:
        ids[int(generator.integers(len(ids)))] = POISON_ID
    # Most are short, so that the test is; a few ask for no token at all, and are refused.
    most = int(generator.integers(0, 25)) if generator.random() < 0.8 else None
    has_budget, is_likely = most is None and generator.random() < 0.5, generator.random() < 0.1
    return GroupRequest(
        Prompt(id=f"p{number}", text=""),
        int(generator.integers(1, 5)),
        drawing=Drawing(
            temperature=float(generator.choice([0.0, 0.7, 1.0, 1.0, 1.0])),
            top_p=float(generator.choice([1.0, 1.0, 1.0, 0.9, 0.0], p=[0.32, 0.32, 0.32, 0.03, 0.01])),
            banned_ids=tuple(range(int(generator.choice([0, 0, 0, 0, 30])))),
        ),
        stops=Stops(
            max_new_tokens=most,
            strings=tuple(chr(97 + int(letter)) for letter in generator.integers(0, 26, 2)) if is_likely else (),
            token_ids=tuple(generator.integers(0, 260, 3).tolist()),
            thinking=ThinkingBudget(int(generator.integers(1, 30)), "</t>", "enough</t>") if has_budget else None,
            repetition=Repetition(2, 0.02) if is_likely else None,
        ),
        priority=int(generator.integers(-2, 3)),
        is_open=bool(generator.random() < 0.1),
        prompt_ids=ids,
    )


class Chaos:
    """What comes out of an engine while all that can happen to it does, and must come out once."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.policy = policy
        self.generator = np.random.default_rng(seed)
        self.groups: dict[str, Group] = {}
        self.failed: list[str] = []
        self.refused: list[str] = []
        self.waiting: list[OpenTurn] = []
        self.stop_reasons: Counter[StopReason] = Counter()
        self.engine = self.new_engine()

    def new_engine(self) -> Engine:
        return self.policy.engine(
            capacity=int(self.generator.integers(12, 40)),
            cache_pages=int(self.generator.integers(8, 40)),
            max_prefill_tokens=int(self.generator.choice([64, 200, 4096])),
            runs_ahead=bool(self.generator.integers(2)),
        )

    def submit(self, request: GroupRequest) -> None:
        try:
            self.engine.submit(request)
        except RequestError:
            self.refused.append(request.prompt.id)

    def step(self) -> None:
        self.engine.step()
        self.waiting += self.engine.collect_turns()
        while self.waiting and self.generator.random() < 0.5:
            turn = self.waiting.pop(int(self.generator.integers(len(self.waiting))))
            if self.generator.random() < 0.4:
                self.engine.close_turn(turn)
            else:
                self.engine.extend(turn, self.generator.integers(0, 260, int(self.generator.integers(1, 40))).tolist())
        self.collect()

    def collect(self) -> None:
        for group in self.engine.collect():
            assert group.prompt.id not in self.groups
            self.groups[group.prompt.id] = group
        failures = [failure.prompt_id for failure in self.engine.collect_failures()]
        self.failed += failures
        self.waiting = [turn for turn in self.waiting if turn.prompt_id not in failures]

    def move(self) -> None:
        """Park everything, and go on in an engine of another size."""
        parked, old = pickle.loads(pickle.dumps(self.engine.park())), self.engine
        assert_empty(old)
        self.collect()
        self.stop_reasons += old.stop_reasons
        self.engine, self.waiting = self.new_engine(), []
        self.engine.policy_version = old.policy_version
        for group in parked:
            self.engine.resume(group)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_every_request_ends_once_and_nothing_is_left_behind(policy: Policy, seed: int) -> None:
    own = Policy(pickle.loads(pickle.dumps(policy.decoder)), policy.tokenizer)
    with torch.no_grad():
        own.decoder.embedding[POISON_ID] = float("nan")
    weights = {name: parameter.detach().clone() for name, parameter in own.decoder.named_parameters()}
    chaos = Chaos(own, seed)
    requests = [random_request(number, chaos.generator) for number in range(REQUESTS)]
    due = {int(step): number for number, step in enumerate(np.linspace(5, 400, UPDATES).astype(int), start=1)}
    left, steps = list(requests), 0
    while left or not chaos.engine.is_idle or due:
        for _ in range(min(len(left), int(chaos.generator.integers(0, 6)))):
            chaos.submit(left.pop())
        if steps in due:
            version = due.pop(steps)
            new = {name: x * (1 + 0.01 * version) for name, x in weights.items()}
            chaos.engine.update_weights(version, new, caches="recompute" if version % 2 else "keep")
        if steps in (150, 300):
            chaos.move()
        chaos.step()
        steps += 1
        assert steps < 20_000
    assert_empty(chaos.engine)
    chaos.stop_reasons += chaos.engine.stop_reasons
    check(chaos, {request.prompt.id: request for request in requests})


def check(chaos: Chaos, requests: dict[str, GroupRequest]) -> None:
    ended = [*chaos.groups, *chaos.failed, *chaos.refused]
    assert sorted(ended) == sorted(requests)
    poisoned = {name for name, one in requests.items() if POISON_ID in one.prompt_ids} - set(chaos.refused)
    assert set(chaos.failed) == poisoned
    assert len(chaos.groups) > 0.9 * REQUESTS
    assert len(poisoned) > 3 and len(chaos.refused) > 3
    rollouts = [rollout for group in chaos.groups.values() for rollout in group.rollouts]
    for name, group in chaos.groups.items():
        request = requests[name]
        assert [rollout.completion_index for rollout in group.rollouts] == list(range(request.group_size))
        for rollout in group.rollouts:
            assert rollout.prompt_token_ids_T.tolist() == request.prompt_ids
            assert 1 <= rollout.completion_length_tokens <= (request.stops.max_new_tokens or LIMIT)
            assert rollout.loss_mask_T.any()
            sampled = rollout.logprobs_T[rollout.loss_mask_T]
            assert np.isfinite(sampled).all() and (sampled <= 0).all()
            assert (np.diff(rollout.policy_versions_T[rollout.loss_mask_T]) >= 0).all()
    assert set(chaos.stop_reasons) == set(StopReason)
    # Completions that had ended before another of their group failed are counted, and not handed out.
    handed_out = Counter(rollout.stop_reason for rollout in rollouts)
    assert all(handed_out[reason] <= count for reason, count in chaos.stop_reasons.items())
    versions = {int(version) for rollout in rollouts for version in rollout.policy_versions_T[rollout.loss_mask_T]}
    assert len(versions) > UPDATES * 3 // 4
