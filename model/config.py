"""The decoder's settings, whatever family of checkpoints they come from (see cispo.model.families)."""

from dataclasses import dataclass

from cispo.errors import CheckpointError

LIGHTNING, SOFTMAX = "lightning", "softmax"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1's stretch of rotary angles: slow ones by `factor`, fast ones not, and a ramp between.

    An angle is slow when it turns fewer than low_turns times within original_positions, fast above high_turns.
    """

    factor: float
    low_turns: float
    high_turns: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of MiniMax-M1's kind at any size (arXiv 2506.13585), or, with other settings, Llama or Qwen.

    mixers: the token mixer of each layer, LIGHTNING or SOFTMAX. rotary_dim: leading dims of a softmax head that are
    rotated. expert_width, experts, experts_per_token: the sparse layers'. The alphas and betas scale the normalised
    input and the sublayer's output in M1's residual; a decoder without is_postnorm adds the sublayer's output to the
    stream itself. family: the model_type under whose keys and tensor names it is stored.
    dense_layers: layers with one SwiGLU of dense_width in place of experts. is_renormalised: the gate weights of the
    chosen experts are scaled to sum to 1. has_qkv_bias, has_qk_norm: of the softmax mixers; the norm is over each head.
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
    family: str = "minimax_m1"
    is_postnorm: bool = True
    dense_layers: tuple[int, ...] = ()
    dense_width: int = 0
    is_renormalised: bool = True
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    rope_scaling: RopeScaling | None = None

    @property
    def layers(self) -> int:
        return len(self.mixers)

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose experts have a router."""
        return tuple(layer for layer in range(self.layers) if layer not in self.dense_layers)

    def channel_sizes(self, layer: int) -> tuple[int, int, int]:
        """Experts, experts a token and width of a layer's channel mixer; a dense one is one expert."""
        if layer in self.dense_layers:
            return 1, 1, self.dense_width
        return self.experts, self.experts_per_token, self.expert_width


def refuse_impossible(config: ModelConfig) -> None:
    """Sizes that make no decoder, found before they are a shape error deep in a layer; CheckpointError names all."""
    sizes = {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
    }
    if len(config.dense_layers) < config.layers:
        sizes |= {
            "the width of an expert": config.expert_width,
            "the number of experts": config.experts,
            "num_experts_per_tok": config.experts_per_token,
        }
    if config.dense_layers:
        sizes["intermediate_size"] = config.dense_width
    wrong = [f"{key} is {size}, must be at least 1" for key, size in sizes.items() if size < 1]
    if not wrong and config.heads % config.key_heads:
        wrong.append(f"num_attention_heads {config.heads} is no multiple of num_key_value_heads {config.key_heads}")
    if config.experts_per_token > config.experts:
        wrong.append(f"num_experts_per_tok is {config.experts_per_token} of {config.experts} experts")
    if config.rotary_dim % 2 or not 0 <= config.rotary_dim <= config.head_dim:
        wrong.append(f"rotary_dim is {config.rotary_dim}, must be even and at most head_dim {config.head_dim}")
    if wrong:
        raise CheckpointError(f"config.json makes no model: {'; '.join(wrong)}; restore it from its source")
