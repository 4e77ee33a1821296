"""Policy folders: round trips, names, and every way a folder can be wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cispo.errors import CheckpointError, UnsupportedError
from cispo.model.checkpoint import load_policy, save_policy
from cispo.model.families import read_hf_config
from cispo.model.tensor_names import named_views
from cispo.model.tokenizer import Tokenizer


@pytest.fixture
def folder(small_policy_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_policy_folder, tmp_path / "policy"))


def load(folder: Path) -> None:
    load_policy(folder, dtype=torch.float32, device="cpu")


def test_round_trip_is_exact(folder: Path, tmp_path: Path) -> None:
    decoder = load_policy(folder, dtype=torch.float32, device="cpu")
    save_policy(decoder, tmp_path / "again")
    again = load_policy(tmp_path / "again", dtype=torch.float32, device="cpu")
    assert again.config == decoder.config
    for (name, ours), (_, theirs) in zip(decoder.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_names_are_minimax_m1s_and_cover_every_weight_once(folder: Path) -> None:
    decoder = load_policy(folder, dtype=torch.float32, device="cpu")
    views = named_views(decoder)
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(views)
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.self_attn.output_gate.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.block_sparse_moe.experts.3.w2.weight",
        "lm_head.weight",
    } <= names
    assert sum(view.numel() for view in views.values()) == sum(p.numel() for p in decoder.parameters())


def test_bfloat16_keeps_the_router_in_float32(folder: Path, tmp_path: Path) -> None:
    decoder = load_policy(folder, dtype=torch.bfloat16, device="cpu")
    dtypes = {name: p.dtype for name, p in decoder.named_parameters()}
    assert dtypes["layers.0.experts.router"] is torch.float32
    assert dtypes["layers.0.mixer.out"] is torch.bfloat16
    save_policy(load_policy(folder, dtype=torch.float32, device="cpu"), tmp_path / "half", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored["model.layers.0.block_sparse_moe.gate.weight"].dtype is torch.float32
    assert stored["lm_head.weight"].dtype is torch.bfloat16


def test_wrong_tensors_are_named_all_at_once(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:10].clone()
    tensors["stray.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for part in ("lm_head.weight has shape [10, 64]", "unknown tensor stray.weight", "model.norm.weight is missing"):
        assert part in str(caught.value)


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_tokenizer_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.load(folder)


def test_settings_without_effect_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    cases = [("model_type", "gpt2", "qwen3_moe"), ("postnorm", False, "postnorm"), ("hidden_act", "gelu", "gelu")]
    cases += [("sliding_window", 8, "sliding window"), ("rope_scaling", {"factor": 2.0}, "rotary")]
    for key, value, text in cases:
        with pytest.raises(UnsupportedError, match=text):
            read_hf_config({**config, key: value})
    del config["num_key_value_heads"]
    with pytest.raises(CheckpointError, match="num_key_value_heads"):
        read_hf_config(config)


def test_chat_rendering_and_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.render_prompt("hé{{ 1 + 1 }}")
    assert tokenizer.decode(ids) == "hé{{ 1 + 1 }}"
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "hé{{ 1 + 1 }}"
    assert len(ids) == len("hé{{ 1 + 1 }}".encode()) + 2
