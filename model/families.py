"""Families of checkpoints: what a Hugging Face `config.json` means as a ModelConfig, and back.

MiniMax-M1 and Text-01 in their own keys, MiniMax as transformers spells it (which rotates the whole head), and the
softmax decoders people have: Llama, Qwen2, Qwen3 and Qwen3-MoE. Anything else is refused, and so is any setting whose
effect the decoder does not have. The tensors' names are in cispo.model.tensor_names. Loads no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cispo.errors import CheckpointError, CispoError, UnsupportedError
from cispo.model.config import LIGHTNING, SOFTMAX, ModelConfig, RopeScaling, refuse_impossible

Json = Mapping[str, Any]

_ORIGINAL_SCALES = {
    "lightning_alpha": "layernorm_linear_attention_alpha",
    "lightning_beta": "layernorm_linear_attention_beta",
    "softmax_alpha": "layernorm_full_attention_alpha",
    "softmax_beta": "layernorm_full_attention_beta",
    "expert_alpha": "layernorm_mlp_alpha",
    "expert_beta": "layernorm_mlp_beta",
}
_TRANSFORMERS_SCALES = {
    "lightning_alpha": "linear_attn_alpha_factor",
    "lightning_beta": "linear_attn_beta_factor",
    "softmax_alpha": "full_attn_alpha_factor",
    "softmax_beta": "full_attn_beta_factor",
    "expert_alpha": "mlp_alpha_factor",
    "expert_beta": "mlp_beta_factor",
}
_NO_SCALES = dict.fromkeys(_ORIGINAL_SCALES, 1.0)
_MIXER_OF_LAYER_TYPE = {"full_attention": SOFTMAX, "linear_attention": LIGHTNING}


@dataclass(frozen=True, slots=True)
class Family:
    """One model_type: `read` gives what differs between families as fields of ModelConfig, `write` the keys for it."""

    architecture: str
    read: Callable[[Json], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def read_hf_config(config: object) -> ModelConfig:
    """A parsed `config.json`; UnsupportedError for what the decoder is not, CheckpointError for what makes no model."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"config.json holds {type(config).__name__}, not an object of keys; restore it")
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UnsupportedError(f"model_type {kind!r} is not supported; this version has {', '.join(FAMILIES)}")
    try:
        _refuse_unsupported(config)
        read = ModelConfig(**_common(config) | {"family": kind} | family.read(config))
        layers = int(config["num_hidden_layers"])
    except KeyError as error:
        raise CheckpointError(f"config.json lacks the key {error} that model_type {kind!r} needs") from error
    except CispoError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"config.json holds a value of the wrong kind ({error}); restore it") from error
    if read.layers != layers:
        raise CheckpointError(
            f"config.json names {read.layers} attention types for num_hidden_layers {layers}; give one for each layer"
        )
    refuse_impossible(read)
    return read


def write_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, in its family's own keys."""
    family = FAMILIES[config.family]
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        **family.write(config),
    }


def _common(config: Json) -> dict[str, Any]:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    theta, scaling = _rope(config)
    return {
        "vocabulary_size": int(config["vocab_size"]),
        "hidden_size": int(config["hidden_size"]),
        "heads": heads,
        "key_heads": heads if config["num_key_value_heads"] is None else int(config["num_key_value_heads"]),
        "head_dim": head_dim,
        "rotary_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_epsilon": float(config["rms_norm_eps"]),
        "initializer_range": float(config.get("initializer_range", 0.02)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "max_positions": int(config["max_position_embeddings"]),
    }


def _rope(config: Json) -> tuple[float, RopeScaling | None]:
    """Base and scaling, which older files keep apart and newer ones keep together."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"])
    kind = rope.get("rope_type") or rope.get("type") or ("default" if rope.keys() <= {"rope_theta"} else None)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedError(f"config.json asks for rotary positions of type {kind!r}; this version has llama3's")
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_turns=float(rope["low_freq_factor"]),
        high_turns=float(rope["high_freq_factor"]),
        original_positions=int(rope["original_max_position_embeddings"]),
    )


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_turns,
            "high_freq_factor": config.rope_scaling.high_turns,
            "original_max_position_embeddings": config.rope_scaling.original_positions,
        }
    return {"rope_parameters": rope}


def _minimax_experts(config: Json) -> dict[str, Any]:
    return {
        "expert_width": int(config["intermediate_size"]),
        "experts": int(config["num_local_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
    }


def _write_minimax_experts(config: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size": config.expert_width,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
    }


def _read_original(config: Json) -> dict[str, Any]:
    if not config.get("postnorm", True):
        raise UnsupportedError("config.json sets postnorm: false, which this version lacks; use a postnorm checkpoint")
    return {
        "mixers": tuple(SOFTMAX if kind == 1 else LIGHTNING for kind in config["attn_type_list"]),
        "rotary_dim": int(config["rotary_dim"]),
        **_minimax_experts(config),
        **{name: float(config[key]) for name, key in _ORIGINAL_SCALES.items()},
    }


def _write_original(config: ModelConfig) -> dict[str, Any]:
    return {
        "attn_type_list": [1 if mixer == SOFTMAX else 0 for mixer in config.mixers],
        "rotary_dim": config.rotary_dim,
        "rope_theta": config.rope_theta,
        "postnorm": True,
        "shared_intermediate_size": 0,
        **_write_minimax_experts(config),
        **{key: getattr(config, name) for name, key in _ORIGINAL_SCALES.items()},
    }


def _read_minimax(config: Json) -> dict[str, Any]:
    return {
        "mixers": _mixers(config["layer_types"]),
        **_minimax_experts(config),
        **{name: float(config[key]) for name, key in _TRANSFORMERS_SCALES.items()},
    }


def _write_minimax(config: ModelConfig) -> dict[str, Any]:
    names = {mixer: name for name, mixer in _MIXER_OF_LAYER_TYPE.items()}
    return {
        "layer_types": [names[mixer] for mixer in config.mixers],
        **_write_rope(config),
        **_write_minimax_experts(config),
        **{key: getattr(config, name) for name, key in _TRANSFORMERS_SCALES.items()},
    }


def _mixers(layer_types: Any) -> tuple[str, ...]:
    unknown = sorted({str(kind) for kind in layer_types} - _MIXER_OF_LAYER_TYPE.keys())
    if unknown:
        raise UnsupportedError(
            f"config.json has layers of type {', '.join(unknown)}; this version has {', '.join(_MIXER_OF_LAYER_TYPE)}"
        )
    return tuple(_MIXER_OF_LAYER_TYPE[kind] for kind in layer_types)


def _softmax_decoder(config: Json) -> dict[str, Any]:
    """What Llama and the Qwens share: softmax everywhere, pre-norm, one dense SwiGLU a layer."""
    layers = int(config["num_hidden_layers"])
    return {
        "mixers": _mixers(config.get("layer_types") or ["full_attention"] * layers),
        "is_postnorm": False,
        "dense_layers": tuple(range(layers)),
        "dense_width": int(config["intermediate_size"]),
        **{"expert_width": 0, "experts": 1, "experts_per_token": 1},
        **_NO_SCALES,
    }


def _write_softmax_decoder(config: ModelConfig) -> dict[str, Any]:
    return {"intermediate_size": config.dense_width, **_write_rope(config)}


def _read_llama(config: Json) -> dict[str, Any]:
    _refuse(config, "attention_bias", "mlp_bias")
    return _softmax_decoder(config)


def _read_qwen2(config: Json) -> dict[str, Any]:
    return _softmax_decoder(config) | {"has_qkv_bias": True}


def _read_qwen3(config: Json) -> dict[str, Any]:
    _refuse(config, "attention_bias")
    return _softmax_decoder(config) | {"has_qk_norm": True}


def _read_qwen3_moe(config: Json) -> dict[str, Any]:
    layers, every = int(config["num_hidden_layers"]), int(config.get("decoder_sparse_step", 1))
    dense = set(config.get("mlp_only_layers") or ())
    return _read_qwen3(config) | {
        "dense_layers": tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % every),
        "expert_width": int(config["moe_intermediate_size"]),
        "experts": int(config["num_experts"] if "num_experts" in config else config["num_local_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "is_renormalised": bool(config.get("norm_topk_prob", False)),
    }


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return _write_softmax_decoder(config) | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        "moe_intermediate_size": config.expert_width,
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.is_renormalised,
    }


def _refuse(config: Json, *keys: str) -> None:
    for key in keys:
        if config.get(key):
            raise UnsupportedError(f"config.json sets {key}, which this version lacks")


def _refuse_unsupported(config: Json) -> None:
    """Settings whose effect this decoder does not have must not be ignored."""
    if config.get("shared_intermediate_size"):
        raise UnsupportedError("config.json asks for a shared expert, which this version lacks")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise UnsupportedError("config.json asks for a sliding window, which this version lacks")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"config.json asks for hidden_act {config['hidden_act']!r}; this version has silu")


FAMILIES = {
    "minimax_m1": Family("MiniMaxM1ForCausalLM", _read_original, _write_original),
    "minimax_text_01": Family("MiniMaxText01ForCausalLM", _read_original, _write_original),
    "minimax": Family("MiniMaxForCausalLM", _read_minimax, _write_minimax),
    "llama": Family("LlamaForCausalLM", _read_llama, _write_softmax_decoder),
    "qwen2": Family("Qwen2ForCausalLM", _read_qwen2, _write_softmax_decoder),
    "qwen3": Family("Qwen3ForCausalLM", _read_qwen3, _write_softmax_decoder),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe),
}
