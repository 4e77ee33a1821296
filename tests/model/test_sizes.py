"""Counts from the configuration, against the model itself and against MiniMax-M1's published figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.cli import main
from cispo.model.config import LIGHTNING, SOFTMAX
from cispo.model.decoder import Decoder
from cispo.model.families import FAMILIES, read_hf_config
from cispo.model.sizes import PRESETS, generation_flops, parameters, softmax_twin, state_bytes, training_flops


def test_minimax_m1_has_the_parameters_it_is_known_for() -> None:
    counted = parameters(PRESETS["minimax-m1"])
    assert (counted.total, counted.active) == (456_089_655_296, 45_944_920_064)


@pytest.mark.slow
def test_minimax_m1_on_the_meta_device_has_as_many() -> None:
    with torch.device("meta"):
        decoder = Decoder(PRESETS["minimax-m1"])
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 456_089_655_296


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_is_that_of_the_decoder(family: str, family_configs: Mapping[str, dict[str, Any]]) -> None:
    config = read_hf_config({"model_type": family, **family_configs[family]})
    with torch.device("meta"):
        decoder = Decoder(config)
    assert parameters(config).total == sum(parameter.numel() for parameter in decoder.parameters())


def test_operations_and_state_of_minimax_m1() -> None:
    m1 = PRESETS["minimax-m1"]
    # 2 (active weights + V d) + 70 lightning layers of 64 heads 5 D^2 a token, and 10 softmax layers 4 n H D.
    assert generation_flops(m1, 65_536) == pytest.approx(6.91e15, rel=2e-3)
    growth = state_bytes(m1, 1 << 20, key_bytes=2) - state_bytes(m1, 1 << 10, key_bytes=2)
    assert growth == ((1 << 20) - (1 << 10)) * 10 * 2 * 8 * 128 * 2
    twin = softmax_twin(m1)
    assert set(twin.mixers) == {SOFTMAX} and generation_flops(twin, 10**6) > 4 * generation_flops(m1, 10**6)


def test_inspect_prints_and_draws(tmp_path: Path, capsys: Any) -> None:
    assert main(["inspect", "minimax-m1", "--plot", str(tmp_path / "plot.svg")]) == 0
    assert "456,089,655,296 in all, 45,944,920,064 active" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_inspect_of_nothing_is_one_line(capsys: Any) -> None:
    assert main(["inspect", "nowhere"]) == 2
    assert (
        capsys.readouterr().err.strip() == "there is no nowhere; name a policy folder, its config.json, or minimax-m1"
    )


def test_training_takes_six_operations_a_weight_and_what_attention_needs() -> None:
    config = PRESETS["minimax-m1"]
    tokens = 4096
    whole, halves = training_flops(config, [tokens], tokens), training_flops(config, [tokens // 2] * 2, tokens)
    inner = config.heads * config.head_dim
    assert whole - halves == pytest.approx(6 * config.mixers.count(SOFTMAX) * inner * tokens**2 / 2, rel=1e-6)
    products = 6 * (parameters(config).active + config.vocabulary_size * config.hidden_size) * tokens
    softmax = 6 * config.mixers.count(SOFTMAX) * inner * tokens**2
    lightning = 6 * config.mixers.count(LIGHTNING) * inner * (2 * config.head_dim + 64) * tokens
    assert whole == pytest.approx(products + softmax + lightning, rel=1e-4)


def test_a_token_without_a_loss_needs_no_head_and_no_last_channel_mixer() -> None:
    config = PRESETS["minimax-m1"]
    spared = config.vocabulary_size * config.hidden_size + 2 * 3 * config.hidden_size * config.expert_width
    assert training_flops(config, [100], 100) - training_flops(config, [100], 60) == pytest.approx(6 * 40 * spared)
