"""The decoder's settings, from and to a Hugging Face `config.json`.

Two spellings are read: MiniMax-M1's own (`model_type: minimax_m1` or `minimax_text_01`, `attn_type_list`, `rotary_dim`)
and that of transformers (`model_type: minimax`, `layer_types`), which rotates the whole head. What is written is M1's
own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cispo.errors import CheckpointError, CispoError, UnsupportedError

LIGHTNING, SOFTMAX = "lightning", "softmax"
_ORIGINAL_TYPES = ("minimax_m1", "minimax_text_01")
_ALPHA_BETA = {
    "lightning_alpha": ("layernorm_linear_attention_alpha", "linear_attn_alpha_factor"),
    "lightning_beta": ("layernorm_linear_attention_beta", "linear_attn_beta_factor"),
    "softmax_alpha": ("layernorm_full_attention_alpha", "full_attn_alpha_factor"),
    "softmax_beta": ("layernorm_full_attention_beta", "full_attn_beta_factor"),
    "expert_alpha": ("layernorm_mlp_alpha", "mlp_alpha_factor"),
    "expert_beta": ("layernorm_mlp_beta", "mlp_beta_factor"),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """MiniMax-M1's architecture at any size (arXiv 2506.13585; section numbers of the M1 report in the decoder).

    mixers: the token mixer of each layer, LIGHTNING or SOFTMAX. alpha and beta scale the normalised input and the
    sublayer's output in the residual. rotary_dim: leading dims of a softmax head that are rotated.
    """

    vocabulary_size: int
    hidden_size: int
    mixers: tuple[str, ...]
    heads: int
    key_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    expert_width: int
    experts: int
    experts_per_token: int
    norm_epsilon: float
    lightning_alpha: float
    lightning_beta: float
    softmax_alpha: float
    softmax_beta: float
    expert_alpha: float
    expert_beta: float
    initializer_range: float
    tie_embeddings: bool
    max_positions: int

    @property
    def layers(self) -> int:
        return len(self.mixers)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed `config.json`; UnsupportedError for another family, CheckpointError for what makes no model."""
        if not isinstance(config, Mapping):
            raise CheckpointError(f"config.json holds {type(config).__name__}, not an object of keys; restore it")
        kind = config.get("model_type")
        if kind not in (*_ORIGINAL_TYPES, "minimax"):
            raise UnsupportedError(
                f"model_type {kind!r} is not supported; this version has {', '.join((*_ORIGINAL_TYPES, 'minimax'))}"
            )
        try:
            read = cls._read(config, original=kind in _ORIGINAL_TYPES)
        except KeyError as error:
            raise CheckpointError(f"config.json lacks the key {error} that model_type {kind!r} needs") from error
        except CispoError:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise CheckpointError(f"config.json holds a value of the wrong kind ({error}); restore it") from error
        _refuse_impossible(read)
        return read

    @classmethod
    def _read(cls, config: Mapping[str, Any], *, original: bool) -> "ModelConfig":
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        _refuse_unsupported(config, original)
        if original:
            mixers = tuple(SOFTMAX if kind == 1 else LIGHTNING for kind in config["attn_type_list"])
            theta, rotary_dim = float(config["rope_theta"]), int(config["rotary_dim"])
        else:
            mixers = tuple(SOFTMAX if kind == "full_attention" else LIGHTNING for kind in config["layer_types"])
            theta, rotary_dim = float(config["rope_parameters"]["rope_theta"]), head_dim
        if len(mixers) != int(config["num_hidden_layers"]):
            raise CheckpointError(
                f"config.json names {len(mixers)} attention types for num_hidden_layers {config['num_hidden_layers']}; "
                "give one for each layer"
            )
        scales = {name: float(config[keys[0 if original else 1]]) for name, keys in _ALPHA_BETA.items()}
        return cls(
            vocabulary_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            mixers=mixers,
            heads=heads,
            key_heads=int(config["num_key_value_heads"]),
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rope_theta=theta,
            expert_width=int(config["intermediate_size"]),
            experts=int(config["num_local_experts"]),
            experts_per_token=int(config["num_experts_per_tok"]),
            norm_epsilon=float(config["rms_norm_eps"]),
            initializer_range=float(config.get("initializer_range", 0.02)),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_positions=int(config["max_position_embeddings"]),
            **scales,
        )

    def to_hf_config(self) -> dict[str, Any]:
        """The `config.json` of this model in MiniMax-M1's own keys."""
        return {
            "architectures": ["MiniMaxM1ForCausalLM"],
            "model_type": "minimax_m1",
            "vocab_size": self.vocabulary_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "attn_type_list": [1 if mixer == SOFTMAX else 0 for mixer in self.mixers],
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_dim,
            "rotary_dim": self.rotary_dim,
            "rope_theta": self.rope_theta,
            "intermediate_size": self.expert_width,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "rms_norm_eps": self.norm_epsilon,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
            "postnorm": True,
            "shared_intermediate_size": 0,
            "hidden_act": "silu",
            **{keys[0]: getattr(self, name) for name, keys in _ALPHA_BETA.items()},
        }


def _refuse_impossible(config: ModelConfig) -> None:
    """Sizes that make no decoder, found before they are a shape error deep in a layer."""
    sizes = {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.expert_width,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "max_position_embeddings": config.max_positions,
    }
    wrong = [f"{key} is {size}, must be at least 1" for key, size in sizes.items() if size < 1]
    if not wrong and config.heads % config.key_heads:
        wrong.append(f"num_attention_heads {config.heads} is no multiple of num_key_value_heads {config.key_heads}")
    if config.experts_per_token > config.experts:
        wrong.append(f"num_experts_per_tok is {config.experts_per_token} of {config.experts} num_local_experts")
    if config.rotary_dim % 2 or not 0 <= config.rotary_dim <= config.head_dim:
        wrong.append(f"rotary_dim is {config.rotary_dim}, must be even and at most head_dim {config.head_dim}")
    if wrong:
        raise CheckpointError(f"config.json makes no model: {'; '.join(wrong)}; restore it from its source")


def _refuse_unsupported(config: Mapping[str, Any], original: bool) -> None:
    """Settings whose effect this decoder does not have must not be ignored."""
    if original and not config.get("postnorm", True):
        raise UnsupportedError("config.json sets postnorm: false, which this version lacks; use a postnorm checkpoint")
    if config.get("shared_intermediate_size"):
        raise UnsupportedError("config.json asks for a shared expert, which this version lacks")
    rope = config.get("rope_parameters") or {}
    if config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise UnsupportedError("config.json asks for scaled rotary positions, which this version lacks")
    if config.get("sliding_window"):
        raise UnsupportedError("config.json asks for a sliding window, which this version lacks")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"config.json asks for hidden_act {config['hidden_act']!r}; this version has silu")
