from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.advantage import AdvantageSettings, group_advantages
from cispo.batch import TrainSequence, split_mini_batches, token_weights, training_sequences
from cispo.errors import CispoError
from cispo.objective_settings import Reduction
from cispo.packing import MicroBatch, pack, pack_micro_batches
from cispo.types import Prompt, Rollout, Score, ScoredGroup, ScoreStatus, StopReason, Turn

REDUCTIONS: tuple[Reduction, ...] = ("token", "prompt", "sample", "mixed", "constant")


def turn(rng: np.random.Generator, mask: list[bool]) -> Turn:
    mask_T = np.array(mask, dtype=np.bool_)
    return Turn(
        token_ids_T=rng.integers(0, 99, len(mask)).astype(np.int32),
        loss_mask_T=mask_T,
        logprobs_T=np.where(mask_T, -rng.random(len(mask)), 0).astype(np.float32),
        policy_versions_T=np.where(mask_T, rng.integers(1, 5, len(mask)), 0).astype(np.int32),
    )


def rollout(rng: np.random.Generator, prompt_tokens: int, *masks: list[bool], prompt_id: str = "p") -> Rollout:
    """One prompt for each length, as the completions of a group have one."""
    prompt = np.arange(prompt_tokens, dtype=np.int32)
    return Rollout(prompt_id, 0, prompt, tuple(turn(rng, mask) for mask in masks), StopReason.EOS, "text")


def random_groups(seed: int, count: int) -> list[ScoredGroup]:
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(count):
        rollouts = []
        for _ in range(int(rng.integers(2, 5))):
            masks = [list(map(bool, rng.integers(0, 2, rng.integers(1, 9)))) for _ in range(int(rng.integers(1, 4)))]
            rollouts.append(rollout(rng, int(rng.integers(1, 6)), *masks, prompt_id=f"p{index}"))
        scores = tuple(
            Score(float(rng.integers(0, 3)), ScoreStatus.ERROR if rng.random() < 0.2 else ScoreStatus.OK)
            for _ in rollouts
        )
        groups.append(ScoredGroup(Prompt(f"p{index}", "text"), tuple(rollouts), scores))
    return groups


def sequences_of(groups: list[ScoredGroup]) -> list[TrainSequence]:
    kept = training_sequences(groups, group_advantages(groups, AdvantageSettings(drop_zero_variance=False)))
    return [sequence for group in kept for sequence in group]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 50))
def test_packs_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    packs = pack(lengths, budget)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    for members in packs:
        assert sum(lengths[i] for i in members) <= budget or len(members) == 1
    assert pack(lengths, budget) == packs


def test_a_sequence_longer_than_the_budget_goes_alone() -> None:
    assert pack([3, 20, 3], 6) == [[1], [0, 2]]


def test_packs_are_few() -> None:
    assert len(pack([6, 4, 5, 5, 7, 3], 10)) == 3


def context(micro: MicroBatch, row: int) -> tuple[int, ...]:
    """The tokens that a packed row sees: of its piece up to itself, after those of the prompt if it is a branch."""
    starts = micro.cu_seqlens.tolist()
    families = range(len(starts) - 1) if micro.families is None else micro.families
    piece = max(index for index, start in enumerate(starts[:-1]) if start <= row)
    first = max(index for index in families if index <= piece)
    prompt = micro.ids_N[starts[first] : starts[first + 1]].tolist() if first < piece else []
    seen = (*prompt, *micro.ids_N[starts[piece] : row + 1].tolist())
    assert int(micro.positions_N[row]) == len(seen) - 1
    return seen


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 60), st.booleans())
def test_micro_batches_hold_exactly_the_loss_tokens(seed: int, count: int, budget: int, shares_prompts: bool) -> None:
    sequences = sequences_of(random_groups(seed, count))
    weights = [float(np.float32(1 / (1 + i))) for i in range(len(sequences))]
    want = set()
    for sequence, weight in zip(sequences, weights, strict=True):
        for place in np.flatnonzero(sequence.loss_mask_T):
            ids, logprob = sequence.token_ids_T, float(sequence.rollout_logprob_T[place])
            version = int(sequence.policy_version_T[place])
            want.add((sequence.sequence, tuple(ids[:place]), int(ids[place]), logprob, version, weight))
    got = []
    for micro in pack_micro_batches(sequences, weights, budget, shares_prompts=shares_prompts):
        assert micro.cu_seqlens.dtype == torch.int32
        assert int(micro.cu_seqlens[-1]) == len(micro.ids_N) == len(micro.positions_N)
        assert bool((micro.cu_seqlens.diff() > 0).all())
        tokens = micro.tokens
        assert len(micro.ids_N) <= budget or len(tokens.sequence_N.unique()) == 1
        for m, row in enumerate(micro.rows_M.tolist()):
            got.append(
                (
                    int(tokens.sequence_N[m]),
                    context(micro, row),
                    int(micro.targets_M[m]),
                    float(tokens.rollout_logprob_N[m]),
                    int(tokens.policy_version_N[m]),
                    float(tokens.weight_N[m]),
                )
            )
        assert int(micro.rows_M.max()) == len(micro.ids_N) - 1, "tokens after the last loss token are not computed"
        assert bool(tokens.loss_mask_N.all())
    assert len(got) == len(want)
    assert set(got) == want


def packed_tokens(sequences: list[TrainSequence], budget: int) -> list[int]:
    packed = pack_micro_batches(sequences, [1.0] * len(sequences), budget, shares_prompts=True)
    return [len(micro.ids_N) for micro in packed]


def test_a_prompt_is_packed_once_for_each_part_of_its_group() -> None:
    rng = np.random.default_rng(0)
    rollouts = tuple(rollout(rng, 10, [True] * length) for length in (1, 4, 4, 4))
    scores = tuple(Score(float(i)) for i in range(4))
    sequences = sequences_of([ScoredGroup(Prompt(f"p{i}", "text"), rollouts, scores) for i in range(2)])
    assert packed_tokens(sequences, 100) == [2 * (10 + 3 * 3)]
    assert packed_tokens(sequences[:4], 16) == [10 + 2 * 3, 10 + 3]
    assert packed_tokens(sequences[:4], 5) == [13, 13, 13, 10], "a sequence over the budget goes alone"
    micro = next(pack_micro_batches(sequences[:4], [1.0] * 4, 100, shares_prompts=True))
    assert micro.families == (0,)
    assert micro.cu_seqlens.tolist() == [0, 10, 13, 16, 19]
    assert micro.rows_M.tolist() == [9, 9, 10, 11, 12, 9, 13, 14, 15, 9, 16, 17, 18]
    other = replace(sequences[1], token_ids_T=sequences[1].token_ids_T + 1)
    assert packed_tokens([sequences[2], other], 100) == [26], "another prompt is not shared"


def test_masked_and_unsampled_completions_are_left_out() -> None:
    rng = np.random.default_rng(0)
    rollouts = (rollout(rng, 2, [True]), rollout(rng, 2, [True]), rollout(rng, 2, [False]), rollout(rng, 2, [True]))
    scores = (Score(1.0), Score(0.0, ScoreStatus.ERROR), Score(1.0), Score(0.0))
    sequences = sequences_of([ScoredGroup(Prompt("p", "text"), rollouts, scores)])
    assert [sequence.sequence for sequence in sequences] == [0, 3]
    assert sequences[0].advantage > 0 > sequences[1].advantage


def test_a_prompt_without_tokens_is_refused() -> None:
    rng = np.random.default_rng(0)
    group = ScoredGroup(Prompt("p", ""), (rollout(rng, 0, [True]),) * 2, (Score(0.0), Score(1.0)))
    with pytest.raises(CispoError, match="prompt p has no tokens"):
        sequences_of([group])


def empty_sequence(sequence: int, group: int) -> TrainSequence:
    nothing = np.zeros(1, dtype=np.int32)
    return TrainSequence(
        nothing, nothing.astype(np.bool_), nothing.astype(np.float32), nothing, 0.0, sequence, group, "p", 0
    )


def flat(sequences: list[TrainSequence], reduction: Reduction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weights = token_weights(sequences, reduction, mixed_sample_weight=0.3, normaliser_tokens=50)
    counts = [sequence.loss_tokens for sequence in sequences]
    return (
        np.repeat(weights, counts),
        np.repeat([sequence.sequence for sequence in sequences], counts),
        np.repeat([sequence.group for sequence in sequences], counts),
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_weights_are_the_means_they_are_named_after(seed: int, count: int) -> None:
    sequences = sequences_of(random_groups(seed, count))
    if not sequences:
        return
    values = np.random.default_rng(seed).normal(size=sum(sequence.loss_tokens for sequence in sequences))
    weight, sample, prompt = flat(sequences, "token")
    token_mean = values.mean()
    sample_mean = np.mean([values[sample == s].mean() for s in np.unique(sample)])
    prompt_mean = np.mean([values[prompt == p].mean() for p in np.unique(prompt)])
    assert (weight * values).sum() == pytest.approx(token_mean)
    assert (flat(sequences, "sample")[0] * values).sum() == pytest.approx(sample_mean)
    assert (flat(sequences, "prompt")[0] * values).sum() == pytest.approx(prompt_mean)
    assert (flat(sequences, "mixed")[0] * values).sum() == pytest.approx(0.3 * sample_mean + 0.7 * token_mean)
    assert (flat(sequences, "constant")[0] * values).sum() == pytest.approx(values.sum() / len(sequences) / 50)


@pytest.mark.parametrize("reduction", ["mixed", "constant"])
def test_reductions_without_their_number_are_refused(reduction: Reduction) -> None:
    sequences = sequences_of(random_groups(0, 2))
    with pytest.raises(ValueError, match="needs"):
        token_weights(sequences, reduction)


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 20), st.integers(0, 5))
def test_mini_batches_hold_whole_groups_and_differ_by_at_most_one(groups: int, count: int, step: int) -> None:
    kept = [[empty_sequence(2 * g + i, g) for i in range(2)] for g in range(groups)]
    parts = split_mini_batches(kept, count, seed=3, step=step)
    sizes = [len(part) // 2 for part in parts]
    assert len(parts) == min(count, groups)
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert sorted(sequence.sequence for part in parts for sequence in part) == list(range(2 * groups))
    for part in parts:
        assert [sequence.group for sequence in part[::2]] == [sequence.group for sequence in part[1::2]]
    again = split_mini_batches(kept, count, seed=3, step=step)
    assert [[s.sequence for s in part] for part in again] == [[s.sequence for s in part] for part in parts]


def test_the_order_of_groups_differs_from_step_to_step_and_seed_to_seed() -> None:
    kept = [[empty_sequence(g, g)] for g in range(32)]
    orders = {
        tuple(part[0].group for part in split_mini_batches(kept, 32, seed=seed, step=step))
        for seed in range(3)
        for step in range(3)
    }
    assert len(orders) == 9


def test_rows_and_devices_keep_every_field() -> None:
    micro = next(pack_micro_batches(sequences_of(random_groups(1, 2)), [1.0] * 99, 1000))
    part = micro.tokens.rows(slice(2, 5))
    for field in fields(part):
        whole = getattr(micro.tokens, field.name)
        assert (whole is None) == (getattr(part, field.name) is None)
        if whole is not None:
            assert torch.equal(getattr(part, field.name), whole[2:5])
    assert micro.to(torch.device("meta")).tokens.weight_N.is_meta
