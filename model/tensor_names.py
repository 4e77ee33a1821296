"""Every stored tensor of a policy by its Hugging Face name, as a view into one of the decoder's parameters.

One map serves both ways: saving reads the views and loading writes them. What the decoder fuses (q, k, v and gate; gate
and up of all experts) is slices of it. `alternatives` adds the fused names that transformers holds in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from cispo.model.config import LIGHTNING, ModelConfig

if TYPE_CHECKING:
    from cispo.model.decoder import Decoder

ROUTER_SUFFIXES = ("block_sparse_moe.gate.weight", "mlp.gate.weight")
"""Routers are stored in float32 whatever the dtype of the rest, as MiniMax-M1 stores them."""

_DERIVED_SUFFIXES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay", "rotary_emb.inv_freq")
"""Constants that other libraries store beside the weights; they follow from the configuration."""


@dataclass(frozen=True, slots=True)
class _ExpertNames:
    """How a family names a layer's channel mixer: its prefix, and gate, up and down of one expert."""

    prefix: str
    gate: str
    up: str
    down: str


_MINIMAX = _ExpertNames("block_sparse_moe", "w1", "w3", "w2")
_OTHERS = _ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")


def is_derived(name: str) -> bool:
    return name.endswith(_DERIVED_SUFFIXES)


def named_views(decoder: "Decoder") -> dict[str, Tensor]:
    """Every tensor of the policy by its Hugging Face name; each parameter is covered exactly once."""
    config = decoder.config
    views = {"model.embed_tokens.weight": decoder.embedding.data, "model.norm.weight": decoder.final_norm.data}
    if not config.tie_embeddings:
        views["lm_head.weight"] = decoder.head.data
    for index, layer in enumerate(_layers(decoder)):
        prefix = f"model.layers.{index}."
        views[f"{prefix}input_layernorm.weight"] = layer["mixer_norm"]
        views[f"{prefix}post_attention_layernorm.weight"] = layer["expert_norm"]
        mixer = _lightning(layer) if config.mixers[index] == LIGHTNING else _softmax(layer, config)
        views |= {f"{prefix}self_attn.{name}": view for name, view in mixer.items()}
        views |= {f"{prefix}{name}": view for name, view in _channel(layer, config, index).items()}
    return views


def alternatives(decoder: "Decoder") -> dict[str, tuple[Tensor, list[str]]]:
    """Names that may stand in a file instead: the tensor, and the names of `named_views` that it stands for."""
    config, found = decoder.config, {}
    if _expert_names(config) is not _MINIMAX:
        return {}
    for index, layer in enumerate(_layers(decoder)):
        prefix = f"model.layers.{index}."
        own = [f"{prefix}{name}" for name in _channel(layer, config, index)]
        found[f"{prefix}mlp.gate.weight"] = (layer["experts.router"], [n for n in own if n.endswith(ROUTER_SUFFIXES)])
        gate_up = [name for name in own if name.endswith((".w1.weight", ".w3.weight"))]
        found[f"{prefix}mlp.experts.gate_up_proj"] = (layer["experts.gate_up"], gate_up)
        found[f"{prefix}mlp.experts.down_proj"] = (layer["experts.down"], [n for n in own if n.endswith(".w2.weight")])
    return found


def _expert_names(config: ModelConfig) -> _ExpertNames:
    return _MINIMAX if config.is_postnorm else _OTHERS


def _layers(decoder: "Decoder") -> Iterator[dict[str, Tensor]]:
    """The parameters of each layer by the decoder's own names."""
    layers: list[dict[str, Tensor]] = [{} for _ in decoder.config.mixers]
    for name, parameter in decoder.named_parameters():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            layers[int(index)][rest] = parameter.data
    yield from layers


def _lightning(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    fused = layer["mixer.qkv_gate"]
    qkv, gate = fused.split([fused.shape[0] // 4 * 3, fused.shape[0] // 4])
    named = {"qkv_proj": qkv, "output_gate": gate, "norm": layer["mixer.norm"], "out_proj": layer["mixer.out"]}
    return {f"{name}.weight": view for name, view in named.items()}


def _softmax(layer: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    rows = [heads * config.head_dim for heads in (config.heads, config.key_heads, config.key_heads)]
    parts = ("q_proj", "k_proj", "v_proj")
    named = {f"{part}.weight": view for part, view in zip(parts, layer["mixer.qkv"].split(rows), strict=True)}
    named["o_proj.weight"] = layer["mixer.out"]
    if config.has_qkv_bias:
        named |= {f"{part}.bias": view for part, view in zip(parts, layer["mixer.qkv_bias"].split(rows), strict=True)}
    if config.has_qk_norm:
        named |= {"q_norm.weight": layer["mixer.q_norm"], "k_norm.weight": layer["mixer.k_norm"]}
    return named


def _channel(layer: dict[str, Tensor], config: ModelConfig, index: int) -> dict[str, Tensor]:
    names = _expert_names(config)
    experts, _, width = config.channel_sizes(index)
    is_dense = index in config.dense_layers
    named = {} if is_dense else {f"{names.prefix}.gate.weight": layer["experts.router"]}
    for expert in range(experts):
        prefix = names.prefix if is_dense else f"{names.prefix}.experts.{expert}"
        gate, up = layer["experts.gate_up"][expert].split([width, width])
        named |= {f"{prefix}.{names.gate}.weight": gate, f"{prefix}.{names.up}.weight": up}
        named[f"{prefix}.{names.down}.weight"] = layer["experts.down"][expert]
    return named
