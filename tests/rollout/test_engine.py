"""The engine: what it samples depends on weights and request alone, and equals the learner's forward bit for bit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cispo.kernels.head_loss import head_logprobs
from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder
from cispo.model.tokenizer import Tokenizer
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest
from cispo.types import Group, Prompt, StopReason

PROMPTS = [Prompt(id=f"p{i}", text="x" * length) for i, length in enumerate((1, 7, 40, 62, 63, 64, 90))]


def make_engine(folder: Path, *, capacity: int = 32, limit: int = 70) -> Engine:
    decoder = load_policy(folder, dtype=torch.float32, device="cpu")
    settings = SamplingSettings(max_completion_tokens=limit, seed=3)
    return Engine(decoder, Tokenizer.load(folder), settings, max_concurrent_completions=capacity, max_prompt_tokens=128)


def run(engine: Engine, prompts: Sequence[Prompt], group_size: int = 3, temperature: float = 1.0) -> dict[str, Group]:
    for prompt in prompts:
        engine.submit(GroupRequest(prompt, group_size, Drawing(temperature), stream="0"))
    groups: dict[str, Group] = {}
    while not engine.is_idle:
        engine.step()
        groups.update({group.prompt.id: group for group in engine.collect()})
    return groups


def logprobs_of_learner(decoder: Decoder, group: Group, temperature: float) -> list[np.ndarray]:
    """The logprobs of the sampled tokens by one packed forward over the whole group, with gradients switched on."""
    sequences = [
        np.concatenate((rollout.prompt_token_ids_T, rollout.completion_token_ids_T)) for rollout in group.rollouts
    ]
    lengths = [len(sequence) for sequence in sequences]
    ids_N = torch.from_numpy(np.concatenate(sequences)).long()
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    hidden_ND = decoder(ids_N, positions_N, cu_seqlens)
    assert hidden_ND.requires_grad
    logprobs, start = [], 0
    for rollout, length in zip(group.rollouts, lengths, strict=True):
        prompt = len(rollout.prompt_token_ids_T)
        rows = slice(start + prompt - 1, start + length - 1)
        targets_N = ids_N[start + prompt : start + length]
        logprob_N, _ = head_logprobs(hidden_ND[rows], decoder.head_weight, targets_N, temperature=temperature)
        logprobs.append(logprob_N.numpy())
        start += length
    return logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_the_learners_forward_bit_for_bit(small_policy_folder: Path, temperature: float) -> None:
    engine = make_engine(small_policy_folder)
    groups = run(engine, PROMPTS, temperature=temperature)
    assert len(groups) == len(PROMPTS)
    for group in groups.values():
        for rollout, expected in zip(
            group.rollouts, logprobs_of_learner(engine.decoder, group, temperature), strict=True
        ):
            np.testing.assert_array_equal(rollout.logprobs_T, expected)


def completions(groups: dict[str, Group]) -> dict[tuple[str, int], tuple[list[int], list[float]]]:
    return {
        (group.prompt.id, rollout.completion_index): (
            rollout.completion_token_ids_T.tolist(),
            rollout.logprobs_T.tolist(),
        )
        for group in groups.values()
        for rollout in group.rollouts
    }


def test_a_request_samples_the_same_whatever_the_batch_order_and_neighbours(small_policy_folder: Path) -> None:
    reference = completions(run(make_engine(small_policy_folder), PROMPTS))
    reordered = completions(run(make_engine(small_policy_folder, capacity=5), list(reversed(PROMPTS))))
    assert reordered == reference
    alone = completions(run(make_engine(small_policy_folder, capacity=3), PROMPTS[2:3]))
    assert alone.items() <= reference.items()


def test_completions_of_a_group_differ_and_stop_for_the_reason_given(small_policy_folder: Path) -> None:
    engine = make_engine(small_policy_folder, limit=40)
    group = run(engine, PROMPTS[1:2], group_size=8)["p1"]
    assert [rollout.completion_index for rollout in group.rollouts] == list(range(8))
    assert len({tuple(rollout.completion_token_ids_T) for rollout in group.rollouts}) > 1
    for rollout in group.rollouts:
        ids = rollout.completion_token_ids_T
        ends = ids[-1] == engine.tokenizer.eos_id
        assert (rollout.stop_reason is StopReason.EOS) == ends
        assert engine.tokenizer.eos_id not in ids[:-1]
        assert ends or len(ids) == 40
        assert rollout.loss_mask_T.all()


def test_weights_can_change_between_two_steps_and_tokens_carry_their_version(small_policy_folder: Path) -> None:
    engine = make_engine(small_policy_folder)
    engine.submit(GroupRequest(PROMPTS[0], 4, Drawing(1.0), stream="0"))
    for _ in range(3):
        engine.step()
    tensors = {name: tensor.detach() * 1.01 for name, tensor in engine.decoder.named_parameters()}
    engine.update_weights(7, tensors)
    while not engine.is_idle:
        engine.step()
    (group,) = engine.collect()
    for rollout in group.rollouts:
        versions = rollout.policy_versions_T.tolist()
        assert versions == sorted(versions)
        assert versions[:3] == [0] * min(3, len(versions))
        assert set(versions[3:]) <= {7}


def test_weights_of_another_model_are_refused(small_policy_folder: Path) -> None:
    engine = make_engine(small_policy_folder)
    with pytest.raises(ValueError, match="embedding"):
        engine.update_weights(1, {})


def test_requests_that_can_never_run_are_refused(small_policy_folder: Path) -> None:
    engine = make_engine(small_policy_folder, capacity=4)
    with pytest.raises(ValueError, match="max_concurrent_completions 4"):
        engine.submit(GroupRequest(PROMPTS[0], 5, Drawing(1.0), stream="0"))
    with pytest.raises(ValueError, match="max_prompt_tokens 128"):
        engine.submit(GroupRequest(Prompt(id="long", text="x" * 500), 1, Drawing(1.0), stream="0"))


def test_no_page_is_lost(small_policy_folder: Path) -> None:
    engine = make_engine(small_policy_folder, capacity=8)
    run(engine, PROMPTS, group_size=4)
    assert engine._cache.pages_in_use == 0
    assert engine.active_completions == 0
