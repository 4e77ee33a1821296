"""Policies that benchmarks make for themselves: random weights in transformers' own files, and a tokenizer of bytes."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

HYBRID: dict[str, Any] = {
    "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 1408, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 2,
    "full_attn_alpha_factor": 2.38, "linear_attn_alpha_factor": 2.38, "mlp_alpha_factor": 2.38,
    "initializer_range": 0.02,
    "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 2,
}  # fmt: skip
"""0.68 billion parameters: 16 layers, one of eight softmax attention, 8 experts of width 1408, top 2."""


TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
    "full_attn_alpha_factor": 1.68, "linear_attn_alpha_factor": 1.68, "mlp_alpha_factor": 1.68,
    "initializer_range": 0.1, "block_size": 64, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}  # fmt: skip
"""2.0 million parameters, for a CPU."""
SIZES = {"tiny": TINY, "hybrid": HYBRID}


def write_minimax(folder: Path, **changes: Any) -> None:
    """A random MiniMax and a tokenizer with a token for every row. changes: to transformers' configuration."""
    import transformers

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "max_position_embeddings": 1 << 17, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes,
    }  # fmt: skip
    settings["num_hidden_layers"] = len(settings["layer_types"])
    config = transformers.MiniMaxConfig(**settings)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.MiniMaxForCausalLM(config)
    model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte tokenizer and a template that is the message alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<end>", "<pad>"])
    # Every row of the embedding has a token, or only the other side would sample from all of them.
    fast.add_tokens([f"<{index}>" for index in range(fast.get_vocab_size(), vocabulary)])
    fast.save(str(folder / "tokenizer.json"))
    template = "{{ messages[0]['content'] }}"
    settings = {"eos_token": "<end>", "pad_token": "<pad>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
