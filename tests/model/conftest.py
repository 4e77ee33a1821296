"""Configurations of every family, for the tests of the model."""

from collections.abc import Mapping
from typing import Any

import pytest

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


@pytest.fixture(scope="session")
def family_configs() -> Mapping[str, dict[str, Any]]:
    """A small `config.json` of each family, without its model_type."""
    return CONFIGS
