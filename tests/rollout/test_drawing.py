"""How tokens are drawn: against a plain reading of temperature, top-k, top-p, min-p, allowed and banned tokens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.kernels import cpu_library
from cispo.kernels.head_loss import head_logits
from cispo.rollout.filters import Filters, cut_logits
from cispo.rollout.request import Drawing
from cispo.rollout.sampling import noise_key, sample_tokens, uniforms
from cispo.types import Rollout
from tests.rollout.trials import Policy, assert_learners_logprobs, request, run, stops

SEED = 3
"""Of the engines of these tests."""

DRAWINGS = {
    "whole": Drawing(),
    "cold": Drawing(0.6),
    "hot": Drawing(1.7),
    "greedy": Drawing(0.0),
    "top-k": Drawing(top_k=5),
    "top-k of one": Drawing(top_k=1),
    "top-k above the vocabulary": Drawing(top_k=10_000),
    "top-p": Drawing(top_p=0.3),
    "top-p of almost nothing": Drawing(top_p=1e-9),
    "min-p": Drawing(min_p=0.2),
    "all": Drawing(0.8, top_p=0.9, top_k=50, min_p=0.05, banned_ids=tuple(range(0, 260, 3))),
    "allowed": Drawing(allowed_ids=(5, 6, 7, 90)),
    "allowed, greedy": Drawing(0.0, allowed_ids=(5, 6, 7, 90)),
    "banned": Drawing(banned_ids=tuple(range(200))),
    "allowed but for the banned": Drawing(allowed_ids=(5, 6, 7), banned_ids=(6,)),
}


def kept_ids(logits: list[float], drawing: Drawing) -> list[int]:
    """Ids that may be drawn, in falling order of probability, equal ones by id; by the definitions, in float64."""
    allowed = range(len(logits)) if drawing.allowed_ids is None else drawing.allowed_ids
    ids = sorted(set(allowed) - set(drawing.banned_ids), key=lambda token: (-logits[token], token))
    ids = ids[: drawing.top_k] if drawing.top_k else ids
    scale = drawing.temperature or 1.0
    weights = [math.exp((logits[token] - logits[ids[0]]) / scale) for token in ids]
    shares = [weight / math.fsum(weights) for weight in weights]
    nucleus = 1 + next((n for n in range(len(ids)) if math.fsum(shares[: n + 1]) >= drawing.top_p), len(ids) - 1)
    count = nucleus if drawing.top_p < 1 else len(ids)
    return [token for token, share in zip(ids[:count], shares, strict=False) if share >= drawing.min_p * shares[0]]


def drawn_interval(logits: list[float], drawing: Drawing, token: int) -> tuple[float, float]:
    """Which uniform numbers give this token: the inverse of the distribution function of what is kept, by id."""
    kept = kept_ids(logits, drawing)
    if drawing.temperature == 0:
        return (0.0, 1.0) if token == kept[0] else (2.0, 2.0)
    weights = {one: math.exp((logits[one] - logits[kept[0]]) / drawing.temperature) for one in sorted(kept)}
    if token not in weights:
        return 2.0, 2.0
    total = math.fsum(weights.values())
    below = math.fsum(weight for one, weight in weights.items() if one < token) / total
    return below, below + weights[token] / total


def logits_of(policy: Policy, rollout: Rollout) -> list[list[float]]:
    """Float32 logits that each token of a completion was drawn from, by one forward."""
    ids = np.concatenate((rollout.prompt_token_ids_T, rollout.completion_token_ids_T)).astype(np.int64)
    prompt, length = len(rollout.prompt_token_ids_T), len(ids)
    with torch.no_grad():
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        hidden_ND = policy.decoder(torch.from_numpy(ids), torch.arange(length), cu_seqlens)
        logits_TV: list[list[float]] = head_logits(
            hidden_ND[prompt - 1 : length - 1].contiguous(), policy.decoder.head_weight
        ).tolist()
    return logits_TV


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_token_is_where_the_distribution_function_passes_its_number(policy: Policy, name: str) -> None:
    drawing = DRAWINGS[name]
    group = run(policy.engine(), [request(name, 9, 4, drawing=drawing, **stops(max_new_tokens=24))])[name]
    assert_learners_logprobs(policy.decoder, group.rollouts, drawing.temperature or 1.0)
    for rollout in group.rollouts:
        key = noise_key(SEED, "", name, rollout.completion_index)
        count = rollout.completion_length_tokens
        numbers = uniforms(np.full(count, key), np.arange(count)).tolist()
        ids = rollout.completion_token_ids_T.tolist()
        for token, number, logits in zip(ids, numbers, logits_of(policy, rollout), strict=True):
            low, high = drawn_interval(logits, drawing, token)
            assert low - 1e-6 <= number <= high + 1e-6


def test_greedy_and_cuts_to_one_token_agree(policy: Policy) -> None:
    one_token = (Drawing(0.0), Drawing(top_k=1), Drawing(top_p=1e-9), Drawing(min_p=0.999999))
    drawn = [run(policy.engine(), [request("p", 9, 2, drawing=drawing)])["p"].rollouts for drawing in one_token]
    ids = [[rollout.completion_token_ids_T.tolist() for rollout in rollouts] for rollouts in drawn]
    assert ids[0][0] == ids[0][1]
    assert all(one == ids[0] for one in ids)


@pytest.mark.parametrize("kernels", ["fused", "plain"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_what_is_cut_is_what_the_definitions_say(kernels: str, data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(2, 40), "vocabulary")
    # Halves: many ties. Wide: tails far below float32's resolution.
    spread = data.draw(st.sampled_from([0.5, 3.0, 60.0]), "spread")
    rows = data.draw(st.lists(row_strategy(vocabulary, spread), min_size=1, max_size=4), "rows")
    logits_BV = torch.tensor([logits for logits, _ in rows])
    drawings = [drawing for _, drawing in rows]
    temperature_B = torch.tensor([drawing.temperature for drawing in drawings])
    allowed_BV = torch.ones(logits_BV.shape, dtype=torch.bool)
    for row, drawing in enumerate(drawings):
        if drawing.allowed_ids is not None:
            allowed_BV[row] = False
            allowed_BV[row, list(drawing.allowed_ids)] = True
    filters = Filters(
        top_k_B=torch.tensor([drawing.top_k for drawing in drawings]),
        top_p_B=torch.tensor([drawing.top_p for drawing in drawings]),
        min_p_B=torch.tensor([drawing.min_p for drawing in drawings]),
        allowed_BV=allowed_BV,
    )
    is_kept_BV = cut_logits(logits_BV, temperature_B, filters).isfinite()
    number = data.draw(st.floats(0, 1, exclude_max=True), "number")
    with pytest.MonkeyPatch.context() as patch:
        if kernels == "plain":
            patch.setattr(cpu_library, "serves", lambda *tensors: False)
        uniform_B = torch.full((len(rows),), number, dtype=torch.float64)
        ids_B, logprob_B = sample_tokens(logits_BV, uniform_B, temperature_B, filters)
    for row, drawing in enumerate(drawings):
        kept = torch.nonzero(is_kept_BV[row]).flatten().tolist()
        assert kept == sorted(kept_ids(logits_BV[row].tolist(), drawing)) or is_on_a_border(logits_BV[row], drawing)
        token = int(ids_B[row])
        assert token in kept
        whole_V = torch.log_softmax(logits_BV[row].double() / (drawing.temperature or 1.0), dim=-1)
        assert float(logprob_B[row]) == pytest.approx(float(whole_V[token]), abs=1e-4, rel=1e-5)


def row_strategy(vocabulary: int, spread: float) -> st.SearchStrategy[tuple[list[float], Drawing]]:
    """Logits on a coarse grid, and a drawing; shares that are a sum of such weights are not met by chance."""
    ids = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=vocabulary).map(tuple)
    drawing = st.builds(
        Drawing,
        temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        top_p=st.sampled_from([1.0, 0.97, 0.51, 0.13, 0.011]),
        top_k=st.integers(0, vocabulary + 3),
        min_p=st.sampled_from([0.0, 0.013, 0.37]),
        allowed_ids=st.none() | ids,
    )
    numbers = st.lists(st.integers(-4, 4).map(lambda x: x * spread), min_size=vocabulary, max_size=vocabulary)
    return st.tuples(numbers, drawing)


def is_on_a_border(logits_V: torch.Tensor, drawing: Drawing) -> bool:
    """Whether float32 and float64 may differ in what they keep: a sum of shares next to top_p."""
    kept = kept_ids(logits_V.tolist(), Drawing(drawing.temperature, 1.0, drawing.top_k, 0.0, drawing.allowed_ids))
    shares_V = torch.softmax(logits_V[kept].double() / (drawing.temperature or 1.0), dim=-1)
    return bool(((shares_V.cumsum(0) - drawing.top_p).abs() < 1e-6).any())
