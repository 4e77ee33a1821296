"""A policy folder out of a small GGUF file of SmolLM2's form, held against transformers."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cispo.errors import CheckpointError
from cispo.model.checkpoint import load_policy
from cispo.model.gguf import read_gguf
from cispo.model.tokenizer import Tokenizer
from cispo.smollm2 import LAYER_NAMES, write_policy
from tests.model.test_gguf import Tensor, gguf_bytes

WIDTH, HEADS, KV_HEADS, INNER = 32, 4, 2, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def metadata() -> dict[str, Any]:
    alphabet = importlib.import_module("tokenizers").pre_tokenizers.ByteLevel.alphabet()
    tokens = [*SPECIAL, *sorted(alphabet), "an", "12"]
    return {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 1000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": ["a n", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def weights(vocabulary: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    rng = np.random.default_rng(0)
    kv = WIDTH // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocabulary, WIDTH), "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,),
        "blk.0.attn_q": (WIDTH, WIDTH), "blk.0.attn_k": (kv, WIDTH), "blk.0.attn_v": (kv, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH), "blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
    }  # fmt: skip
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("smollm2")
    data = metadata()
    tensors: list[Tensor] = [
        (f"{name}.weight", array.shape, 0, array.tobytes())
        for name, array in weights(len(data["tokenizer.ggml.tokens"])).items()
    ]
    (place / "x.gguf").write_bytes(gguf_bytes(data, tensors))
    count = write_policy(read_gguf(place / "x.gguf"), place / "policy")
    assert count == sum(array.size for array in weights(len(data["tokenizer.ggml.tokens"])).values())
    return place


def test_transformers_and_our_decoder_read_the_same_model(folder: Path) -> None:
    transformers = importlib.import_module("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    ours = load_policy(folder / "policy", dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.tensor([5, 17, 90, 3, 41, 8])
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
        hidden = ours(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]))
        found = hidden.float() @ ours.head_weight.float().T
    torch.testing.assert_close(found, wanted[:, : found.shape[1]], rtol=1e-4, atol=1e-4)


def test_rotary_pairs_are_put_where_hugging_face_has_them(folder: Path) -> None:
    """Row 2 i and 2 i + 1 of a head in GGUF are rows i and i + half of it."""
    stored = importlib.import_module("safetensors.torch").load_file(folder / "policy" / "model.safetensors")
    given = weights(len(metadata()["tokenizer.ggml.tokens"]))
    size = WIDTH // HEADS
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        for head in range(heads):
            for pair in range(size // 2):
                for side in range(2):
                    row = stored[f"model.layers.0.self_attn.{name}_proj.weight"][head * size + side * size // 2 + pair]
                    wanted = torch.from_numpy(given[f"blk.0.attn_{name}"][head * size + 2 * pair + side])
                    assert torch.equal(row, wanted.to(torch.bfloat16))


def test_digits_are_tokens_of_their_own_and_markers_are_special(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "policy")
    assert len(tokenizer.encode("12an")) == 3 and tokenizer.decode(tokenizer.encode("12an é")) == "12an é"
    assert tokenizer.eos_id == 2
    ids = tokenizer.render_prompt("a", [("user", "b"), ("assistant", "n")])
    assert ids.count(1) == 4 and ids.count(2) == 3
    theirs = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder / "policy")
    messages = [{"role": "user", "content": "12 and a"}]
    assert tokenizer.render_prompt("12 and a") == theirs(
        theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ).input_ids


def test_every_layer_tensor_has_a_name_once() -> None:
    assert len(set(LAYER_NAMES.values())) == len(LAYER_NAMES)


@pytest.mark.parametrize(
    ("change", "tensor", "message"),
    [
        ({"general.architecture": "phi3"}, "output_norm.weight", "architecture 'phi3'"),
        ({}, "output.weight", "tied embeddings"),
        ({}, "blk.0.attn_rot.weight", "holds a tensor 'blk.0.attn_rot.weight'"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: dict[str, Any], tensor: str, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(metadata() | change, [(tensor, (4,), 0, bytes(16))]))
    with pytest.raises(CheckpointError, match=message):
        write_policy(read_gguf(tmp_path / "x.gguf"), tmp_path / "policy")


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no")
    command = [sys.executable, "-m", "cispo.smollm2", str(tmp_path / "out"), "--gguf", str(tmp_path / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("is no GGUF file; name one that ends in .gguf")
    assert not (tmp_path / "out").exists()
