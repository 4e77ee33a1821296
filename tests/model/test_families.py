"""Every family's `config.json`: what it means, that it is written back, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.errors import CheckpointError, UnsupportedError
from cispo.model.checkpoint import check_weights, load_policy, save_policy
from cispo.model.config import LIGHTNING, SOFTMAX, RopeScaling
from cispo.model.decoder import Decoder
from cispo.model.families import FAMILIES, read_hf_config, write_hf_config
from cispo.model.tensor_names import alternatives, named_views

FamilyConfigs = Mapping[str, dict[str, Any]]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_reads_back_the_same(family: str, family_configs: FamilyConfigs) -> None:
    config = read_hf_config({"model_type": family, **family_configs[family]})
    written = json.loads(json.dumps(write_hf_config(config)))
    assert written["model_type"] == family
    assert read_hf_config(written) == config


def test_what_each_family_means(family_configs: FamilyConfigs) -> None:
    configs = {family: read_hf_config({"model_type": family, **family_configs[family]}) for family in FAMILIES}
    assert configs["minimax_m1"].mixers == (LIGHTNING,) * 3 + (SOFTMAX,) == configs["minimax"].mixers
    assert (configs["minimax_m1"].rotary_dim, configs["minimax"].rotary_dim) == (8, 16)
    assert configs["llama"].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 256)
    assert [config.is_postnorm for config in configs.values()] == [True] * 3 + [False] * 4
    assert [family for family, config in configs.items() if config.has_qkv_bias] == ["qwen2"]
    assert [family for family, config in configs.items() if config.has_qk_norm] == ["qwen3", "qwen3_moe"]
    moe = configs["qwen3_moe"]
    assert [moe.channel_sizes(layer) for layer in (0, 1)] == [(4, 2, 24), (1, 1, 48)] and not moe.is_renormalised


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_name_and_survives_a_round_trip_in_shards(
    family: str, tmp_path: Path, family_configs: FamilyConfigs
) -> None:
    decoder = Decoder(read_hf_config({"model_type": family, **family_configs[family]}))
    decoder.initialise(1)
    views = named_views(decoder)
    assert sum(view.numel() for view in views.values()) == sum(p.numel() for p in decoder.parameters())
    save_policy(decoder, tmp_path, shard_bytes=20_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    again = load_policy(tmp_path, dtype=torch.float32, device="cpu")
    for (name, ours), (_, theirs) in zip(decoder.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    files[1].unlink()
    with pytest.raises(CheckpointError, match=files[1].name):
        load_policy(tmp_path, dtype=torch.float32, device="cpu")


def test_fused_expert_names_are_read_too(tmp_path: Path, family_configs: FamilyConfigs) -> None:
    from safetensors.torch import load_file, save_file

    decoder = Decoder(read_hf_config({"model_type": "minimax", **family_configs["minimax"]}))
    decoder.initialise(2)
    save_policy(decoder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, (view, covered) in alternatives(decoder).items():
        tensors[name] = view.clone()
        for own in covered:
            del tensors[own]
    save_file(tensors, tmp_path / "model.safetensors")
    again = load_policy(tmp_path, dtype=torch.float32, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), again.parameters(), strict=True))
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"][:2].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight has shape \[2, 32\], not \[4, 32\]"):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "text"),
    [
        ("minimax_m1", {"model_type": "gpt_oss"}, "this version has minimax_m1, minimax_text_01, minimax, llama"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ("qwen2", {"use_sliding_window": True}, "sliding window"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
        ("minimax", {"shared_intermediate_size": 8}, "shared expert"),
    ],
)
def test_what_the_decoder_is_not_is_refused(
    family: str, change: dict[str, Any], text: str, family_configs: FamilyConfigs
) -> None:
    with pytest.raises(UnsupportedError, match=text):
        read_hf_config({"model_type": family, **family_configs[family], **change})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_hidden_layers": 5}, "names 4 attention types for num_hidden_layers 5"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"head_dim": "wide"}, "value of the wrong kind"),
        ({"num_local_experts": 1}, "num_experts_per_tok is 2 of 1"),
    ],
)
def test_what_makes_no_model_is_named(change: dict[str, Any], text: str, family_configs: FamilyConfigs) -> None:
    with pytest.raises(CheckpointError, match=text):
        read_hf_config({"model_type": "minimax_m1", **family_configs["minimax_m1"], **change})
