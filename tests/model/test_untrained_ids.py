"""Ids past the tokenizer's last have no trained row: nothing samples them and no logprob counts them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cispo.kernels.head_loss import head_logprobs
from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder
from cispo.model.tokenizer import Tokenizer, count_ids
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest
from cispo.types import Prompt

TOKENIZER_IDS = 260


@pytest.fixture
def decoder(small_policy_folder: Path) -> Decoder:
    """Its untrained rows point where every hidden state would choose them."""
    decoder = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        decoder.head[TOKENIZER_IDS:] *= 100
    return decoder


def test_the_tokenizer_says_which_ids_are_trained(decoder: Decoder, small_policy_folder: Path, tmp_path: Path) -> None:
    assert count_ids(small_policy_folder) == decoder.trained_ids == TOKENIZER_IDS < decoder.config.vocabulary_size
    assert count_ids(tmp_path) is None


def test_logits_of_untrained_ids_are_minus_infinity(decoder: Decoder) -> None:
    with torch.inference_mode():
        logits = decoder.logits(decoder(torch.arange(5), torch.arange(5), torch.tensor([0, 5]).int()))
    assert logits.shape == (5, decoder.config.vocabulary_size)
    assert bool((logits[:, TOKENIZER_IDS:] == float("-inf")).all())
    assert bool(logits[:, :TOKENIZER_IDS].isfinite().all())


def test_rollout_and_learner_leave_them_out_alike(decoder: Decoder, small_policy_folder: Path) -> None:
    tokenizer = Tokenizer.load(small_policy_folder)
    settings = SamplingSettings(max_completion_tokens=40, seed=0)
    engine = Engine(decoder, tokenizer, settings, max_concurrent_completions=8, max_prompt_tokens=64)
    engine.submit(GroupRequest(Prompt(id="p", text="abc"), 8, Drawing(1.0), "0"))
    while not engine.is_idle:
        engine.step()
    (group,) = engine.collect()
    for rollout in group.rollouts:
        completion, prompt = rollout.completion_token_ids_T, rollout.prompt_token_ids_T
        assert completion.max() < TOKENIZER_IDS
        ids = torch.from_numpy(np.concatenate((prompt, completion))).long()
        hidden = decoder(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]).int())[len(prompt) - 1 : -1]
        logprob_N, _ = head_logprobs(hidden, decoder.head_weight, ids[len(prompt) :], temperature=1.0)
        np.testing.assert_array_equal(rollout.logprobs_T, logprob_N.numpy())


def test_changed_weights_are_seen_and_untrained_rows_get_no_gradient(decoder: Decoder) -> None:
    hidden = torch.randn(4, decoder.config.hidden_size)
    with torch.inference_mode():
        before = decoder.logits(hidden)
    with torch.no_grad():
        decoder.head.mul_(2.0)
    with torch.inference_mode():
        torch.testing.assert_close(decoder.logits(hidden), before * 2)
    decoder.logits(hidden)[:, :TOKENIZER_IDS].square().sum().backward()
    assert decoder.head.grad is not None
    assert bool((decoder.head.grad[:TOKENIZER_IDS] != 0).any()) and not decoder.head.grad[TOKENIZER_IDS:].any()
