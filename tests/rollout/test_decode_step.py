"""A decode step's plan: the bits of the code it was recorded from, for every family, whatever changes between steps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cispo.kernels.head_loss import head_logprobs
from cispo.model.cache import DecodeCache
from cispo.model.decoder import Decoder
from cispo.model.families import FAMILIES, read_hf_config
from cispo.rollout import decode_step
from cispo.rollout.decode_step import DecodeStepper

WHOLE_LANES = {"moe_intermediate_size": 32, "norm_topk_prob": True}
PROMPTS = (3, 60, 64, 65, 100)
STEPS = 70

Sampled = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


def family_decoder(family: str, configs: Mapping[str, dict[str, Any]], **changes: Any) -> Decoder:
    decoder = Decoder(read_hf_config({"model_type": family, **configs[family], **changes}))
    decoder.initialise(3)
    return decoder


def prompt_ids(row: int) -> torch.Tensor:
    return torch.randint(0, 64, (PROMPTS[row],), generator=torch.Generator().manual_seed(row))


def prefilled(decoder: Decoder) -> DecodeCache:
    cache = decoder.new_cache(capacity=len(PROMPTS) + 2, max_tokens=max(PROMPTS) + STEPS)
    positions_N = torch.cat([torch.arange(length) for length in PROMPTS])
    cu_seqlens = torch.tensor([0, *np.cumsum(PROMPTS)], dtype=torch.int32)
    ids_N = torch.cat([prompt_ids(row) for row in range(len(PROMPTS))])
    decoder(ids_N, positions_N, cu_seqlens, cache.extend(range(len(PROMPTS)), PROMPTS))
    return cache


@torch.inference_mode()
def sample(decoder: Decoder, steps: int, temperature: float = 0.9) -> tuple[DecodeStepper, Sampled]:
    """Ids and logprobs [steps, B] of all prompts; the first tokens given are zeros. The last slot ends half-way."""
    cache = prefilled(decoder)
    stepper = DecodeStepper(decoder, cache)
    generator = np.random.default_rng(0)
    ids, logprobs = [np.zeros(len(PROMPTS), np.int64)], []
    for index in range(steps):
        if index == steps // 2:
            cache.release(len(PROMPTS) - 1)
        active = len(PROMPTS) - (index >= steps // 2)
        uniform_B = generator.random(len(PROMPTS))[:active]
        launched = stepper.launch(np.arange(active), uniform_B, np.full(active, temperature, np.float32))
        ids_B, logprob_B = launched.wait()
        ids.append(ids_B.copy())
        logprobs.append(logprob_B.copy())
    rows = len(PROMPTS) - 1
    return stepper, (np.stack([row[:rows] for row in ids]), np.stack([row[:rows] for row in logprobs]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_plan_with_the_bits_of_its_forward(
    family: str, family_configs: Mapping[str, dict[str, Any]]
) -> None:
    decoder = family_decoder(family, family_configs, **WHOLE_LANES)
    stepper, (ids, logprobs) = sample(decoder, STEPS)
    assert stepper._plan is not None
    for row in range(ids.shape[1]):
        sequence = torch.cat((prompt_ids(row), torch.from_numpy(ids[:, row])))
        length = len(sequence)
        hidden_ND = decoder(sequence, torch.arange(length), torch.tensor([0, length], dtype=torch.int32))
        asked = slice(PROMPTS[row], length - 1)
        expected_N, _ = head_logprobs(
            hidden_ND[asked], decoder.head_weight, sequence[asked.start + 1 :], temperature=0.9
        )
        np.testing.assert_array_equal(logprobs[:, row], expected_N.numpy())


@pytest.mark.parametrize(("family", "dtype"), [("qwen3_moe", torch.float32), ("minimax_m1", torch.bfloat16)])
def test_a_step_that_pytorch_computes_part_of_has_no_plan(
    family: str, dtype: torch.dtype, family_configs: Mapping[str, dict[str, Any]]
) -> None:
    """Experts of 24 columns, and bfloat16, have no CPU kernels."""
    stepper, (_, logprobs) = sample(family_decoder(family, family_configs).to(dtype), 3)
    assert stepper._plan is None
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("how", ["in place", "data", "parameter"])
def test_weights_that_change_between_steps_are_noticed(
    how: str, family_configs: Mapping[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = family_decoder("minimax_m1", family_configs)
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}

    def change(factor: float) -> None:
        for name, parameter in list(decoder.named_parameters()):
            new = before[name] * factor
            if how == "in place":
                with torch.no_grad():
                    parameter.copy_(new)
            elif how == "data":
                parameter.data = new
                torch.autograd.graph.increment_version(parameter)
            else:
                owner, _, attribute = name.rpartition(".")
                setattr(decoder.get_submodule(owner), attribute, torch.nn.Parameter(new))

    def run() -> list[npt.NDArray[np.float32]]:
        outputs = []
        with torch.inference_mode():
            cache = prefilled(decoder)
            stepper = DecodeStepper(decoder, cache)
            inputs = np.arange(len(PROMPTS)), np.full(len(PROMPTS), 0.4), np.ones(len(PROMPTS), np.float32)
            for factor in (1.0, 1.0, 1.1, 1.1, 0.9):
                with torch.inference_mode(False):
                    change(factor)
                outputs.append(stepper.launch(*inputs).wait()[1].copy())
        change(1.0)
        return outputs

    planned = run()
    monkeypatch.setattr(decode_step, "record", lambda code: None)
    np.testing.assert_array_equal(planned, run())
    assert not np.array_equal(planned[1], planned[2])


@torch.inference_mode()
def test_ids_without_a_trained_row_are_in_no_plan(family_configs: Mapping[str, dict[str, Any]]) -> None:
    decoder = family_decoder("minimax_m1", family_configs)
    stepper = DecodeStepper(decoder, prefilled(decoder))
    inputs = np.arange(len(PROMPTS)), np.full(len(PROMPTS), 0.999), np.ones(len(PROMPTS), np.float32)
    assert stepper.launch(*inputs).wait()[0].max() > 40
    decoder.trained_ids = 40
    assert stepper.launch(*inputs).wait()[0].max() < 40
    assert stepper._plan is not None


def test_threads_may_change_between_steps(family_configs: Mapping[str, dict[str, Any]]) -> None:
    decoder, before = family_decoder("minimax_m1", family_configs), torch.get_num_threads()
    _, expected = sample(decoder, 6)
    try:
        torch.set_num_threads(3)
        _, actual = sample(decoder, 6)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(actual[1], expected[1])
