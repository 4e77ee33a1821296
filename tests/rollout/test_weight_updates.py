"""Weights that change between any two steps, caches kept or recomputed, and rollouts that go on under other weights."""

import pickle
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cispo.kernels.head_loss import head_logits, head_logprobs
from cispo.model.decoder import Decoder
from cispo.rollout.request import Drawing, RequestError, ThinkingBudget
from cispo.rollout.sampling import sample_tokens
from cispo.types import Group, Rollout, StopReason
from tests.rollout.trials import Policy, assert_empty, facts, request, run, samples, stops

VERSIONS = 6
REQUESTS = [
    request("short", 5, 3),
    request("page", 62, 2),
    request("long", 120, 2, **stops(max_new_tokens=30)),
    request("thinks", 20, 2, **stops(thinking=ThinkingBudget(15, "</t>", "stop it</t>"))),
]


class Weights(list[Mapping[str, Tensor]]):
    """The tensors of each version."""

    def __repr__(self) -> str:
        return f"<weights of {len(self)} versions>"


@pytest.fixture(scope="module")
def weights(policy: Policy) -> Weights:
    """None far from the one before."""
    generator = torch.Generator().manual_seed(0)
    current = {name: parameter.detach().clone() for name, parameter in policy.decoder.named_parameters()}
    versions = Weights([current])
    while len(versions) < VERSIONS:
        current = {name: x * (1 + 0.05 * torch.randn(x.shape, generator=generator)) for name, x in current.items()}
        versions.append(current)
    return versions


@pytest.fixture(scope="module")
def own_policy(policy: Policy) -> Policy:
    """A copy whose weights these tests change."""
    return Policy(pickle.loads(pickle.dumps(policy.decoder)), policy.tokenizer)


def load(decoder: Decoder, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(tensors[name])


def logprobs_by_forward(decoder: Decoder, rollout: Rollout) -> np.ndarray:
    """Of all tokens of the completion, with the weights that the decoder has."""
    ids = np.concatenate((rollout.prompt_token_ids_T, rollout.completion_token_ids_T)).astype(np.int64)
    prompt, length = len(rollout.prompt_token_ids_T), len(ids)
    ids_N = torch.from_numpy(ids)
    with torch.no_grad():
        hidden_ND = decoder(ids_N, torch.arange(length), torch.tensor([0, length], dtype=torch.int32))
        asked = hidden_ND[prompt - 1 : length - 1]
        logprob_T, _ = head_logprobs(asked, decoder.head_weight, ids_N[prompt:], temperature=1.0)
    return logprob_T.numpy()


def assert_each_token_is_of_its_version(decoder: Decoder, weights: Weights, groups: Mapping[str, Group]) -> set[int]:
    """With caches recomputed, a logprob is that of one forward with the weights of the token's version."""
    seen = set()
    for version, tensors in enumerate(weights):
        load(decoder, tensors)
        for group in groups.values():
            for rollout in group.rollouts:
                is_of_version = rollout.loss_mask_T & (rollout.policy_versions_T == version)
                if is_of_version.any():
                    seen.add(version)
                    expected = logprobs_by_forward(decoder, rollout)
                    np.testing.assert_array_equal(rollout.logprobs_T[is_of_version], expected[is_of_version])
    return seen


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_recomputed_caches_are_those_of_the_new_weights(
    own_policy: Policy, weights: Weights, data: st.DataObject
) -> None:
    """Wherever the updates fall: before the first step, in the middle of a prompt, while sequences are set aside."""
    load(own_policy.decoder, weights[0])
    engine = own_policy.engine(
        capacity=data.draw(st.integers(4, 12), "capacity"),
        cache_pages=data.draw(st.none() | st.integers(4, 12), "pages"),
        max_prefill_tokens=data.draw(st.sampled_from([64, 16_384]), "piece"),
        runs_ahead=data.draw(st.booleans(), "ahead"),
    )
    updates = VERSIONS - 1
    due = sorted(data.draw(st.lists(st.integers(0, 60), min_size=updates, max_size=updates, unique=True), "steps"))

    def update() -> None:
        while due and due[0] <= engine.steps:
            due.pop(0)
            version = engine.policy_version + 1
            engine.update_weights(version, weights[version], caches="recompute")

    groups = run(engine, REQUESTS, before_step=update)
    assert len(assert_each_token_is_of_its_version(own_policy.decoder, weights, groups)) > 1
    for group in groups.values():
        for rollout in group.rollouts:
            versions = rollout.policy_versions_T[rollout.loss_mask_T]
            assert (np.diff(versions) >= 0).all()
            assert not rollout.policy_versions_T[~rollout.loss_mask_T].any()
    assert_empty(engine)


@torch.inference_mode()
def kept_sample(decoder: Decoder, weights: Weights, rollout: Rollout) -> tuple[list[float], list[int]]:
    """Logprobs and greedy ids of a completion, token by token from one cache, with the weights of each version."""
    prompt, ids = rollout.prompt_token_ids_T.tolist(), rollout.completion_token_ids_T.tolist()
    cache = decoder.new_cache(capacity=1, max_tokens=len(prompt) + len(ids))
    load(decoder, weights[0])
    cu_seqlens = torch.tensor([0, len(prompt)], dtype=torch.int32)
    hidden_BD = decoder(torch.tensor(prompt), torch.arange(len(prompt)), cu_seqlens, cache.extend([0], [len(prompt)]))
    hidden_BD = hidden_BD[-1:]
    logprobs, drawn = [], []
    for before, version in zip([-1, *ids], rollout.policy_versions_T.tolist(), strict=False):
        if before >= 0:
            load(decoder, weights[version])
            step = cache.begin_step(np.zeros(1, np.int64))
            # Idle rows repeat the token.
            hidden_BD = decoder.decode(torch.tensor([before] * 4), step, cache)[:1]
        logits_BV = head_logits(hidden_BD, decoder.head_weight)
        greedy_B, logprob_B = sample_tokens(logits_BV, torch.zeros(1, dtype=torch.float64), torch.zeros(1))
        drawn.append(int(greedy_B))
        logprobs.append(float(logprob_B))
    return logprobs, drawn


@pytest.mark.parametrize("pages", [None, 4])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_kept_caches_go_on_from_what_the_old_weights_left(
    own_policy: Policy, weights: Weights, pages: int | None, runs_ahead: bool
) -> None:
    """Greedy, so that the reference is drawn by the same rule."""
    load(own_policy.decoder, weights[0])
    engine = own_policy.engine(cache_pages=pages, runs_ahead=runs_ahead)
    requests = [request(name, length, 1, drawing=Drawing(0.0)) for name, length in (("a", 5), ("b", 60), ("c", 62))]

    def update() -> None:
        if engine.steps % 11 == 10 and engine.policy_version < VERSIONS - 1:
            version = engine.policy_version + 1
            engine.update_weights(version, weights[version], caches="keep")

    groups = run(engine, requests, before_step=update)
    for group in groups.values():
        (rollout,) = group.rollouts
        # A prompt that was read under later weights has another beginning than the reference.
        if rollout.policy_versions_T[0] == 0:
            logprobs, drawn = kept_sample(own_policy.decoder, weights, rollout)
            assert rollout.logprobs_T.tolist() == logprobs
            assert rollout.completion_token_ids_T.tolist() == drawn
    assert len(set(groups["a"].rollouts[0].policy_versions_T.tolist())) > 3


@pytest.mark.parametrize("caches", ["keep", "recompute"])
def test_the_same_weights_again_change_nothing(
    own_policy: Policy, weights: Weights, caches: Literal["keep", "recompute"]
) -> None:
    load(own_policy.decoder, weights[0])
    reference = samples(run(own_policy.engine(records_experts=True), REQUESTS))
    engine = own_policy.engine(cache_pages=9, max_prefill_tokens=64, records_experts=True)

    def update() -> None:
        if engine.steps % 3 == 0:
            engine.update_weights(0, weights[0], caches=caches)

    assert samples(run(engine, REQUESTS, before_step=update)) == reference
    assert_empty(engine)


def test_weights_taken_before_the_first_step_are_all_there_is(own_policy: Policy, weights: Weights) -> None:
    load(own_policy.decoder, weights[3])
    reference = run(own_policy.engine(), REQUESTS)
    load(own_policy.decoder, weights[0])
    engine = own_policy.engine()
    run(engine, REQUESTS)
    engine.update_weights(3, weights[3])
    groups = run(engine, REQUESTS)
    for name, group in groups.items():
        for rollout, other in zip(group.rollouts, reference[name].rollouts, strict=True):
            assert facts(rollout)[:3] == facts(other)[:3]
            assert set(rollout.policy_versions_T[rollout.loss_mask_T].tolist()) == {3}


@pytest.mark.parametrize("parked_at", [1, 2, 9, 30])
def test_a_parked_group_goes_on_elsewhere_under_other_weights(
    own_policy: Policy, weights: Weights, parked_at: int
) -> None:
    load(own_policy.decoder, weights[0])
    engine = own_policy.engine(capacity=6, max_prefill_tokens=64)
    for one in REQUESTS:
        engine.submit(one)
    for _ in range(parked_at):
        engine.step()
    groups = {group.prompt.id: group for group in engine.collect()}
    parked = pickle.loads(pickle.dumps(engine.park()))
    assert_empty(engine)
    assert len(parked) + len(groups) == len(REQUESTS)
    load(own_policy.decoder, weights[1])
    other = own_policy.engine(cache_pages=6)
    other.policy_version = 1
    for one in parked:
        other.resume(one)
    groups |= run(other)
    assert groups.keys() == {one.prompt.id for one in REQUESTS}
    assert assert_each_token_is_of_its_version(own_policy.decoder, Weights(weights[:2]), groups) == {0, 1}
    assert_empty(other)


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_parking_and_resuming_under_the_same_weights_changes_nothing(
    policy: Policy, times: int, runs_ahead: bool
) -> None:
    reference = samples(run(policy.engine(), REQUESTS))
    engine = policy.engine(cache_pages=9, runs_ahead=runs_ahead)
    groups: dict[str, Group] = {}
    for one in REQUESTS:
        engine.submit(one)
    for _ in range(times):
        for _ in range(8):
            engine.step()
        parked = engine.park()
        assert_empty(engine)
        groups |= {group.prompt.id: group for group in engine.collect()}
        engine = policy.engine(capacity=9, cache_pages=7, runs_ahead=runs_ahead)
        for one in parked:
            engine.resume(one)
    assert samples(groups | run(engine)) == reference


def test_stops_see_what_came_before_the_parking(policy: Policy) -> None:
    """A stop string or a run of likely tokens that begins before it and ends after."""
    whole = run(policy.engine(), [request("p", 5, 1)])["p"].rollouts[0]
    ids = whole.completion_token_ids_T.tolist()
    ascii_pairs = [n for n in range(3, len(ids) - 1) if ids[n] < 94 and ids[n + 1] < 94]
    at = ascii_pairs[0]
    string = policy.tokenizer.decode(ids[at : at + 2])
    for rules in (stops(strings=(string,)), stops(token_ids=(ids[at],))):
        straight = facts(run(policy.engine(), [request("p", 5, 1, **rules)])["p"].rollouts[0])
        for parked_at in range(1, len(straight[0])):
            engine, other = policy.engine(), policy.engine()
            engine.submit(request("p", 5, 1, **rules))
            for _ in range(parked_at):
                engine.step()
            (parked,) = engine.park()
            other.resume(parked)
            assert facts(run(other)["p"].rollouts[0]) == straight


def test_a_parked_group_that_is_too_long_for_an_engine_is_refused(policy: Policy) -> None:
    engine, small = policy.engine(), policy.engine(limit=10)
    engine.submit(request("p", 5, 1))
    for _ in range(10):
        engine.step()
    (parked,) = engine.park()
    with pytest.raises(RequestError, match=r"has 10 tokens already.*more max_completion_tokens"):
        small.resume(parked)
    assert_empty(small)
    large = policy.engine(limit=11)
    large.resume(parked)
    (rollout,) = run(large)["p"].rollouts
    assert (rollout.completion_length_tokens, rollout.stop_reason) == (11, StopReason.LENGTH)


def test_experts_of_rollouts_that_have_ended_stay_those_they_were_sampled_with(
    own_policy: Policy, weights: Weights
) -> None:
    load(own_policy.decoder, weights[0])
    one = request("p", 100, 8, **stops(token_ids=tuple(range(60))))
    engine = own_policy.engine(records_experts=True)
    engine.submit(one)
    while not engine.stop_reasons:
        engine.step()
    ended = next(iter(next(iter(engine._groups._under_way.values())).rollouts.values()))
    before = ended.expert_ids_TLK
    assert before is not None
    engine.update_weights(5, weights[5], caches="recompute")
    groups = run(engine)
    after = groups["p"].rollouts[ended.completion_index].expert_ids_TLK
    assert after is not None
    assert after.tolist() == before.tolist()
    others = [x.prompt_expert_ids_TLK for x in groups["p"].rollouts if x.completion_index != ended.completion_index]
    assert any(x is not None and x.tolist() != before[: len(x)].tolist() for x in others)


def test_an_update_before_every_step_gives_every_token_its_version(own_policy: Policy, weights: Weights) -> None:
    load(own_policy.decoder, weights[0])
    engine = own_policy.engine()
    engine.submit(request("p", 5, 1))

    def update() -> None:
        engine.update_weights(engine.steps, weights[engine.steps % VERSIONS])

    (rollout,) = run(engine, before_step=update)["p"].rollouts
    versions = rollout.policy_versions_T.tolist()
    assert versions == list(range(len(versions)))
    assert len(versions) > 10
