"""Fixtures shared by all rooms: a small random policy of the M1 kind with its own tokenizer, as a folder on disk, and
the configurations of every family."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

# Threads that spin while they wait make every test slow on a busy machine; processes that tests start inherit this.
os.environ["OMP_NUM_THREADS"] = "1"

from cispo.model.arithmetic import prepare_products

prepare_products()

SMALL_CONFIG = {
    "model_type": "minimax_m1",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "attn_type_list": [0, 0, 0, 1],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "rope_theta": 10000.0,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "layernorm_linear_attention_alpha": 1.68,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_full_attention_alpha": 1.68,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_mlp_alpha": 1.68,
    "layernorm_mlp_beta": 1.0,
}

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "rms_norm_eps": 1e-6, "intermediate_size": 48, "max_position_embeddings": 512, "hidden_act": "silu",
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ORIGINAL = {
    **SIZES, **EXPERTS, "attn_type_list": [0, 0, 0, 1], "rotary_dim": 8, "rope_theta": 1e7, "postnorm": True,
    **{f"layernorm_{part}_{scale}": 2.5 for part in ("linear_attention", "full_attention", "mlp")
       for scale in ("alpha", "beta")},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "minimax_m1": ORIGINAL,
    "minimax_text_01": ORIGINAL,
    "minimax": {
        **SIZES, **EXPERTS, **ROPE, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        **{f"{part}_{scale}_factor": 1.5 for part in ("linear_attn", "full_attn", "mlp")
           for scale in ("alpha", "beta")},
    },
    "llama": {**SIZES, "rope_theta": 5e5, "attention_bias": False, "tie_word_embeddings": True, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256}},
    "qwen2": {**SIZES, **ROPE, "use_sliding_window": False, "sliding_window": 4096},
    "qwen3": {**SIZES, **ROPE, "attention_bias": False},
    "qwen3_moe": {**SIZES, **ROPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "mlp_only_layers": [1], "decoder_sparse_step": 1, "norm_topk_prob": False},
}  # fmt: skip

_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 bytes and four special tokens, trained on nothing."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "bos_token": "<|bos|>", "chat_template": _CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="session")
def small_policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy folder with random weights (seed 0), float32; read-only by convention."""
    import torch

    from cispo.model.checkpoint import initialise_policy, save_policy

    folder = tmp_path_factory.mktemp("small_policy")
    (folder / "config.json").write_text(json.dumps(SMALL_CONFIG), encoding="utf-8")
    save_policy(initialise_policy(folder, seed=0, dtype=torch.float32, device="cpu"), folder)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def run_left_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The short run of the code recipe (runs.SHORT_RUN) that nobody disturbs, and the seconds that it took."""
    from tests.runs import SHORT_RUN, finish, start_training

    folder = tmp_path_factory.mktemp("runs") / "alone"
    started = time.monotonic()
    finish(start_training(folder, "code", [*SHORT_RUN, "rollout.workers=1", "sandbox.workers=1"]), folder)
    return folder, time.monotonic() - started


@pytest.fixture(scope="session")
def family_configs() -> Mapping[str, dict[str, Any]]:
    """A small `config.json` of each family, without its model_type."""
    return CONFIGS
