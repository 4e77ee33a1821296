"""Sampling noise and the inverse distribution function."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.head_loss import head_logits, head_logprobs
from cispo.rollout.sampling import noise_key, sample_tokens, uniforms


@pytest.fixture(params=["fused", "plain"])
def either_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(cpu_library, "serves", lambda *tensors: False)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_head(rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head weight and uniform numbers."""
    generator = torch.Generator().manual_seed(rows)
    hidden_BD, weight_VD = torch.randn(rows, 32, generator=generator), torch.randn(vocabulary, 32, generator=generator)
    return hidden_BD, weight_VD / 3, torch.rand(rows, generator=generator, dtype=torch.float64)


def test_noise_depends_on_each_part_of_its_name() -> None:
    keys = {
        int(noise_key(*name))
        for name in [(0, "a", "p", 0), (1, "a", "p", 0), (0, "b", "p", 0), (0, "a", "q", 0), (0, "a", "p", 1)]
    }
    assert len(keys) == 5


def test_uniforms_are_uniform_and_repeat() -> None:
    keys = np.full(20_000, noise_key(0, "", "p", 0))
    positions = np.arange(20_000)
    values = uniforms(keys, positions)
    assert np.array_equal(values, uniforms(keys, positions))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts, _ = np.histogram(values, bins=20, range=(0.0, 1.0))
    chi_square = float(((counts - 1000.0) ** 2 / 1000.0).sum())
    assert chi_square < 45.0
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_frequencies_follow_the_distribution(either_kernel: None) -> None:
    probability_V = torch.tensor([0.5, 0.0, 0.3, 0.2])
    logits_BV = probability_V.log().expand(40_000, 4)
    uniform_B = torch.from_numpy(uniforms(np.full(40_000, noise_key(1, "", "p", 0)), np.arange(40_000)))
    ids_B, logprob_B = sample_tokens(logits_BV, uniform_B)
    frequency_V = torch.bincount(ids_B, minlength=4) / 40_000
    torch.testing.assert_close(frequency_V, probability_V, atol=0.01, rtol=0.0)
    torch.testing.assert_close(logprob_B.exp(), probability_V[ids_B])


def test_the_ends_of_the_unit_interval_pick_tokens_of_positive_probability(either_kernel: None) -> None:
    logits_BV = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]] * 2)
    ids_B, _ = sample_tokens(logits_BV, torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64))
    assert ids_B.tolist() == [1, 2]


@pytest.mark.parametrize("vocabulary", [5, 100, 512, 1100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sampled_logprob_is_the_learners_to_the_last_bit(
    either_kernel: None, vocabulary: int, temperature: float
) -> None:
    hidden_BD, weight_VD, uniform_B = random_head(70, vocabulary)
    temperature_B = None if temperature == 1.0 else torch.full((70,), temperature)
    ids_B, logprob_B = sample_tokens(head_logits(hidden_BD, weight_VD), uniform_B, temperature_B)
    learners_B, _ = head_logprobs(hidden_BD, weight_VD, ids_B, temperature=temperature)
    assert torch.equal(logprob_B, learners_B)


@pytest.mark.parametrize("vocabulary", [5, 100, 512, 1100])
def test_the_token_is_where_the_distribution_function_passes_the_number(either_kernel: None, vocabulary: int) -> None:
    hidden_BD, weight_VD, uniform_B = random_head(200, vocabulary)
    temperature_B = torch.linspace(0.5, 2.0, 200)
    logits_BV = head_logits(hidden_BD, weight_VD)
    ids_B, _ = sample_tokens(logits_BV, uniform_B, temperature_B)
    probability_BV = torch.softmax(logits_BV.double() / temperature_B.unsqueeze(1), dim=-1)
    up_to_B1 = probability_BV.cumsum(1).gather(1, ids_B.unsqueeze(1))
    below_B1 = up_to_B1 - probability_BV.gather(1, ids_B.unsqueeze(1))
    assert (below_B1.squeeze(1) <= uniform_B + 1e-6).all()
    assert (up_to_B1.squeeze(1) >= uniform_B - 1e-6).all()


def test_a_row_samples_the_same_alone_with_others_and_with_any_threads(restored_threads: None) -> None:
    hidden_BD, weight_VD, uniform_B = random_head(300, 100)
    logits_BV, temperature_B = head_logits(hidden_BD, weight_VD), torch.linspace(0.5, 2.0, 300)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(sample_tokens(logits_BV, uniform_B, temperature_B))
    for row in (0, 1, 299):
        one = slice(row, row + 1)
        alone = sample_tokens(logits_BV[one].clone(), uniform_B[one], temperature_B[one])
        assert [int(alone[0]), float(alone[1])] == [int(results[0][0][row]), float(results[0][1][row])]
    for ids_B, logprob_B in results[1:]:
        assert torch.equal(ids_B, results[0][0])
        assert torch.equal(logprob_B, results[0][1])


def test_logits_are_not_written_to(either_kernel: None) -> None:
    hidden_BD, weight_VD, uniform_B = random_head(4, 100)
    logits_BV = head_logits(hidden_BD, weight_VD)
    before = logits_BV.clone()
    sample_tokens(logits_BV, uniform_B, torch.full((4,), 0.7))
    assert torch.equal(logits_BV, before)


def test_logits_that_are_not_numbers_give_a_token_of_the_vocabulary_and_no_logprob(either_kernel: None) -> None:
    ids_B, logprob_B = sample_tokens(torch.full((2, 20), float("nan")), torch.tensor([0.0, 0.5], dtype=torch.float64))
    assert ((ids_B >= 0) & (ids_B < 20)).all()
    assert logprob_B.isnan().all()
