"""One arithmetic: packed, alone, forked and token by token, a sequence has the same bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cispo.model.arithmetic import row_dependent_shapes
from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder
from cispo.model.mixers import lightning_slopes

LENGTHS = (30, 64, 65, 128, 1, 200, 77, 3, 129)


@pytest.fixture(scope="module")
def decoder(small_policy_folder: Path) -> Decoder:
    return load_policy(small_policy_folder, dtype=torch.float32, device="cpu")


def packed(sequences: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = [len(sequence) for sequence in sequences]
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    return torch.cat(sequences), positions_N, torch.tensor([0, *lengths]).cumsum(0).int()


def random_sequences(decoder: Decoder) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, decoder.config.vocabulary_size, (n,), generator=generator) for n in LENGTHS]


def test_packed_and_alone_are_bitwise_equal(decoder: Decoder) -> None:
    sequences = random_sequences(decoder)
    whole = decoder(*packed(sequences)).split(LENGTHS)
    for sequence, rows in zip(sequences, whole, strict=True):
        assert torch.equal(decoder(*packed([sequence])), rows)


def test_the_number_of_threads_changes_no_bit(decoder: Decoder) -> None:
    """Rollout workers share the cores and the learner has all of them, so the two never have equally many threads."""
    generator = torch.Generator().manual_seed(6)
    sequences = [torch.randint(0, decoder.config.vocabulary_size, (n,), generator=generator) for n in LENGTHS * 2]
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 3, 5):
            torch.set_num_threads(threads)
            outputs.append(decoder(*packed(sequences)).detach())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@torch.inference_mode()
def test_prefill_and_decode_are_bitwise_equal_to_one_forward(decoder: Decoder) -> None:
    sequences = [sequence for sequence in random_sequences(decoder) if len(sequence) > 1]
    prompts = [
        max(1, min(len(sequence) - 1, limit))
        for sequence, limit in zip(sequences, (9, 63, 64, 64, 65, 70, 1, 128), strict=True)
    ]
    expected = decoder(*packed(sequences)).split([len(sequence) for sequence in sequences])
    cache = decoder.new_cache(capacity=len(sequences), max_tokens=400)
    target = cache.extend(range(len(sequences)), prompts)
    prefilled = decoder(*packed([s[:p] for s, p in zip(sequences, prompts, strict=True)]), target).split(prompts)
    for rows, wanted, prompt in zip(prefilled, expected, prompts, strict=True):
        assert torch.equal(rows, wanted[:prompt])
    compared = 0
    for _ in range(max(LENGTHS) - min(prompts)):
        step = cache.begin_step(np.arange(len(sequences)))
        positions = step.position_B.tolist()[: len(sequences)]
        ids = [int(s[p]) if p < len(s) else 0 for s, p in zip(sequences, positions, strict=True)]
        ids += [0] * (len(step.position_B) - len(ids))
        hidden_BD = decoder.decode(torch.tensor(ids), step, cache)
        for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            if position < len(sequence):
                assert torch.equal(hidden_BD[row], expected[row][position]), (row, position)
                compared += 1
    assert compared > 200


@torch.inference_mode()
def test_a_fork_goes_on_as_its_source_would(decoder: Decoder) -> None:
    prompt = random_sequences(decoder)[6][:70]
    cache = decoder.new_cache(capacity=8, max_tokens=192)
    decoder(*packed([prompt]), cache.extend([0], [len(prompt)]))
    cache.fork(0, range(1, 5))
    generator = torch.Generator().manual_seed(1)
    continuations = torch.randint(0, decoder.config.vocabulary_size, (5, 70), generator=generator)
    hidden = []
    for column in continuations.unbind(1):
        step = cache.begin_step(np.arange(5))
        hidden.append(decoder.decode(torch.cat((column, torch.zeros(3, dtype=torch.int64))), step, cache)[:5])
    decoded = torch.stack(hidden, dim=1)
    for row, continuation in enumerate(continuations):
        expected = decoder(*packed([torch.cat((prompt, continuation))]))[len(prompt) :]
        assert torch.equal(decoded[row], expected)
    for slot in range(5):
        cache.release(slot)
    assert cache.pages_in_use == 0


def test_products_of_this_policy_do_not_depend_on_the_row_count(decoder: Decoder) -> None:
    assert row_dependent_shapes([p.detach() for p in decoder.parameters() if p.dim() == 2]) == []


def test_slopes_are_m1s() -> None:
    slopes_H = lightning_slopes(64, 0, 80)
    assert slopes_H[0] == pytest.approx(2 ** (-1 / 8) * 1.00001)
    assert slopes_H[63] == pytest.approx(2**-8 * 1.00001)
    assert lightning_slopes(64, 78, 80)[0] == pytest.approx(2 ** (-1 / 8) * (1 - 78 / 79 + 1e-5), rel=1e-5)


def test_gradients_reach_every_parameter_and_repeat(decoder: Decoder) -> None:
    sequences = random_sequences(decoder)[:4]
    gradients = []
    for _ in range(2):
        decoder.zero_grad()
        (decoder(*packed(sequences)) @ decoder.head_weight.t()).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == {name for name, _ in decoder.named_parameters()}
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name
    decoder.zero_grad()
