"""Sampling noise and the inverse distribution function."""

import numpy as np
import torch

from cispo.rollout.sampling import noise_key, sample_tokens, uniforms


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


def test_frequencies_follow_the_distribution() -> None:
    probability_V = torch.tensor([0.5, 0.0, 0.3, 0.2])
    logits_BV = probability_V.log().expand(40_000, 4)
    uniform_B = torch.from_numpy(uniforms(np.full(40_000, noise_key(1, "", "p", 0)), np.arange(40_000)))
    ids_B, logprob_B = sample_tokens(logits_BV, uniform_B)
    frequency_V = torch.bincount(ids_B, minlength=4) / 40_000
    torch.testing.assert_close(frequency_V, probability_V, atol=0.01, rtol=0.0)
    torch.testing.assert_close(logprob_B.exp(), probability_V[ids_B])


def test_the_ends_of_the_unit_interval_pick_tokens_of_positive_probability() -> None:
    logits_BV = torch.tensor([[float("-inf"), 0.0, 1.0, float("-inf")]] * 2)
    ids_B, _ = sample_tokens(logits_BV, torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64))
    assert ids_B.tolist() == [1, 2]
