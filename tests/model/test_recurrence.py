"""MiniMax-M1 against itself, written out: one token after the other in float64, from the checkpoint's own tensors.

Other implementations differ where it matters (transformers rotates the whole head, some decay by one token too many
between blocks), so this follows the formulas of the report and of the model's own code, with nothing chunked or packed.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cispo.model.checkpoint import initialise_policy, load_policy, save_policy

LENGTHS = (1, 63, 64, 65, 150)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * x / (x.square().mean() + epsilon).sqrt()


def rotated(x_HD: Tensor, position: int, rotary_dim: int, theta: float) -> Tensor:
    """The first rotary_dim dims of each head turned, dim i with i + rotary_dim / 2; the others pass through."""
    half = rotary_dim // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x_HD[:, :half], x_HD[:, half:rotary_dim]
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat((*turned, x_HD[:, rotary_dim:]), dim=1)


class Reference:
    """One sequence, a token at a time: a state of each lightning layer, all keys and values of the others."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config, self.tensors = config, {name: tensor.double() for name, tensor in tensors.items()}
        heads, dim = config["num_attention_heads"], config["head_dim"]
        self.states = [torch.zeros(heads, dim, dim, dtype=torch.float64) for _ in config["attn_type_list"]]
        self.keys: list[list[Tensor]] = [[] for _ in self.states]
        self.values: list[list[Tensor]] = [[] for _ in self.states]
        self.position = 0

    def logits(self, token: int) -> Tensor:
        """Logits after one more token."""
        config, epsilon = self.config, self.config["rms_norm_eps"]
        h = self.tensors["model.embed_tokens.weight"][token]
        for layer, kind in enumerate(config["attn_type_list"]):
            part = "full_attention" if kind else "linear_attention"
            n = norm(h, self.weight(layer, "input_layernorm"), epsilon)
            mixed = self.softmax(layer, n) if kind else self.lightning(layer, n)
            h = config[f"layernorm_{part}_alpha"] * n + config[f"layernorm_{part}_beta"] * mixed
            n = norm(h, self.weight(layer, "post_attention_layernorm"), epsilon)
            h = config["layernorm_mlp_alpha"] * n + config["layernorm_mlp_beta"] * self.experts(layer, n)
        self.position += 1
        return self.tensors["lm_head.weight"] @ norm(h, self.tensors["model.norm.weight"], epsilon)

    def weight(self, layer: int, name: str) -> Tensor:
        return self.tensors[f"model.layers.{layer}.{name}.weight"]

    def lightning(self, layer: int, x: Tensor) -> Tensor:
        heads, layers = self.config["num_attention_heads"], len(self.states)
        q, k, v = torch.nn.functional.silu(self.weight(layer, "self_attn.qkv_proj") @ x).view(heads, -1).chunk(3, dim=1)
        slope_H = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
        slope_H = slope_H * (1 - layer / (layers - 1) + 1e-5)
        decayed = torch.exp(-slope_H).view(-1, 1, 1) * self.states[layer]
        self.states[layer] = decayed + k.unsqueeze(2) * v.unsqueeze(1)
        y = norm((q.unsqueeze(1) @ self.states[layer]).flatten(), self.weight(layer, "self_attn.norm"), 1e-6)
        gate = torch.sigmoid(self.weight(layer, "self_attn.output_gate") @ x)
        return self.weight(layer, "self_attn.out_proj") @ (gate * y)

    def softmax(self, layer: int, x: Tensor) -> Tensor:
        config, dim = self.config, self.config["head_dim"]
        rotary = config["rotary_dim"], config["rope_theta"]
        q, k, v = ((self.weight(layer, f"self_attn.{name}_proj") @ x).view(-1, dim) for name in "qkv")
        self.keys[layer].append(rotated(k, self.position, *rotary))
        self.values[layer].append(v)
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        keys, values = (torch.stack(x).repeat_interleave(group, 1) for x in (self.keys[layer], self.values[layer]))
        scores_HT = torch.einsum("hd,thd->ht", rotated(q, self.position, *rotary), keys) / math.sqrt(dim)
        out = torch.einsum("ht,thd->hd", scores_HT.softmax(-1), values).flatten()
        return self.weight(layer, "self_attn.o_proj") @ out

    def experts(self, layer: int, x: Tensor) -> Tensor:
        probability_E = (self.weight(layer, "block_sparse_moe.gate") @ x).softmax(-1)
        chosen = probability_E.topk(self.config["num_experts_per_tok"])
        y = torch.zeros_like(x)
        for weight, expert in zip(chosen.values / chosen.values.sum(), chosen.indices.tolist(), strict=True):
            w1, w2, w3 = (self.weight(layer, f"block_sparse_moe.experts.{expert}.w{i}") for i in (1, 2, 3))
            y += weight * (w2 @ (torch.nn.functional.silu(w1 @ x) * (w3 @ x)))
        return y


@pytest.mark.parametrize("rotary_dim", [8, 4, 16])
def test_logits_equal_the_written_out_model(
    rotary_dim: int, family_configs: Mapping[str, dict[str, Any]], tmp_path: Path
) -> None:
    config = {**family_configs["minimax_m1"], "model_type": "minimax_m1", "rotary_dim": rotary_dim}
    config["initializer_range"] = 0.2
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_policy(initialise_policy(tmp_path, seed=1, dtype=torch.float32, device="cpu"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "model.safetensors")
    decoder = load_policy(tmp_path, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(0, config["vocab_size"], (length,), generator=generator) for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.inference_mode():
        hidden = decoder(torch.cat(sequences), positions, torch.tensor([0, *LENGTHS]).cumsum(0).int())
        logits = decoder.logits(hidden).double().split(LENGTHS)
    for sequence, rows in zip(sequences, logits, strict=True):
        reference = Reference(config, tensors)
        for token, row in zip(sequence.tolist(), rows, strict=True):
            torch.testing.assert_close(row, reference.logits(token), atol=1e-4, rtol=0)
