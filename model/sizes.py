"""What a model of a configuration holds and costs: parameters, operations and state, counted and not measured.

An operation count is of multiplications and additions apart (2 a multiply-add); norms, activations, softmax and rotary
angles are left out, as is usual. Lengths are in tokens. Loads no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cispo.model.config import LIGHTNING, SOFTMAX, ModelConfig

CHUNK_LENGTH = 64
STATE_BYTES = 4
"""States of lightning layers are float32 whatever the weights are."""

PRESETS = {
    "minimax-m1": ModelConfig(
        vocabulary_size=200_064,
        hidden_size=6144,
        mixers=((LIGHTNING,) * 7 + (SOFTMAX,)) * 10,
        heads=64,
        key_heads=8,
        head_dim=128,
        rotary_dim=64,
        rope_theta=1e7,
        expert_width=9216,
        experts=32,
        experts_per_token=2,
        norm_epsilon=1e-5,
        lightning_alpha=160**0.25,
        lightning_beta=1.0,
        softmax_alpha=160**0.25,
        softmax_beta=1.0,
        expert_alpha=160**0.25,
        expert_beta=1.0,
        initializer_range=0.02,
        tie_embeddings=False,
        max_positions=10_240_000,
    )
}
"""Sizes that are known by name; MiniMax-M1's are those of its report (arXiv 2506.13585) and released configuration."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """total: of the checkpoint. active: what a token meets but embedding and LM head, as M1's report counts."""

    total: int
    active: int


def parameters(config: ModelConfig) -> Parameters:
    """Counts from the configuration alone."""
    total = active = config.hidden_size
    for layer in range(config.layers):
        mixer = _mixer_parameters(config, config.mixers[layer])
        experts, per_token, width = config.channel_sizes(layer)
        router = 0 if layer in config.dense_layers else experts * config.hidden_size
        shared = mixer + router + 2 * config.hidden_size
        total += shared + experts * 3 * config.hidden_size * width
        active += shared + per_token * 3 * config.hidden_size * width
    embeddings = config.vocabulary_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return Parameters(total + embeddings, active)


def _mixer_parameters(config: ModelConfig, mixer: str) -> int:
    inner = config.heads * config.head_dim
    if mixer == LIGHTNING:
        return 5 * inner * config.hidden_size + inner
    qkv = (config.heads + 2 * config.key_heads) * config.head_dim
    extra = qkv * config.has_qkv_bias + 2 * config.head_dim * config.has_qk_norm
    return (qkv + inner) * config.hidden_size + extra


def generation_flops(config: ModelConfig, length: int) -> float:
    """Operations to generate a completion of this length, token by token, from an empty prompt."""
    products = 2.0 * (_product_parameters(config) + config.vocabulary_size * config.hidden_size)
    # Each token decays, updates and reads a D x D state in every lightning head.
    lightning = config.mixers.count(LIGHTNING) * config.heads * 5.0 * config.head_dim**2
    softmax = config.mixers.count(SOFTMAX) * 4.0 * config.heads * config.head_dim
    return (products + lightning) * length + softmax * length * length / 2


def training_flops(config: ModelConfig, lengths: Sequence[int], loss_tokens: int) -> float:
    """Operations of one forward and backward over packed sequences of these lengths.

    The backward counts twice the forward, and a recomputation nothing, so that a share of the device's peak made of it
    is a model's (MFU). A token meets its active parameters, those of the LM head and the last channel mixer only where
    it has a loss. Lightning attention is counted by chunks, both attentions at what causality leaves of them.
    """
    tokens = sum(lengths)
    _, per_token, width = config.channel_sizes(config.layers - 1)
    last_mixer = per_token * 3 * config.hidden_size * width
    products = (_product_parameters(config) - last_mixer) * tokens
    products += (last_mixer + config.vocabulary_size * config.hidden_size) * loss_tokens
    # In a chunk a token meets half the others on average, and the state once when it is read and once when it grows.
    lightning = config.heads * (2 * config.head_dim**2 + CHUNK_LENGTH * config.head_dim) * tokens
    softmax = config.heads * config.head_dim * sum(length * length for length in lengths)
    attention = config.mixers.count(LIGHTNING) * lightning + config.mixers.count(SOFTMAX) * softmax
    return 3 * 2.0 * (products + attention)


def _product_parameters(config: ModelConfig) -> int:
    """Weights of the matrix products that a token takes part in: all that are active but norms and biases."""
    lightning, softmax = config.mixers.count(LIGHTNING), config.mixers.count(SOFTMAX)
    qkv = (config.heads + 2 * config.key_heads) * config.head_dim
    vectors = (
        (1 + 2 * config.layers) * config.hidden_size
        + lightning * config.heads * config.head_dim
        + softmax * (qkv * config.has_qkv_bias + 2 * config.head_dim * config.has_qk_norm)
    )
    return parameters(config).active - vectors


def slot_bytes(config: ModelConfig, *, element_bytes: int, has_copy: bool) -> int:
    """What the lightning layers keep of one sequence: a float32 state a head, and up to a chunk of recent rows.

    element_bytes: of one number of the weights, in which rows are kept. has_copy: the state is kept rounded as well, as
    the Triton kernels of decode read it.
    """
    state = config.head_dim**2 * (STATE_BYTES + element_bytes * has_copy)
    recent = 2 * CHUNK_LENGTH * config.head_dim * element_bytes
    return config.mixers.count(LIGHTNING) * config.heads * (state + recent)


def page_bytes(config: ModelConfig, *, element_bytes: int) -> int:
    """What the softmax layers keep of up to 64 tokens of a sequence: keys and values."""
    return config.mixers.count(SOFTMAX) * 2 * config.key_heads * config.head_dim * CHUNK_LENGTH * element_bytes


def cache_bytes(config: ModelConfig, *, capacity: int, max_tokens: int, element_bytes: int, has_copy: bool) -> int:
    """Of the cache of an engine (`DecodeCache`) with pages for `capacity` sequences at their longest, and the spare."""
    pages = capacity * -(-max_tokens // CHUNK_LENGTH) + 1
    per_slot = slot_bytes(config, element_bytes=element_bytes, has_copy=has_copy)
    return (capacity + 1) * per_slot + pages * page_bytes(config, element_bytes=element_bytes)


def state_bytes(config: ModelConfig, length: int, *, key_bytes: int) -> int:
    """What one sequence of this length keeps for decoding: states and up to a chunk of recent rows, and pages of keys.

    key_bytes: bytes of one number of recent rows and of a softmax layer's keys and values.
    """
    pages = -(-length // CHUNK_LENGTH)
    per_slot = slot_bytes(config, element_bytes=key_bytes, has_copy=False)
    return per_slot + pages * page_bytes(config, element_bytes=key_bytes)


def softmax_twin(config: ModelConfig) -> ModelConfig:
    """The same sizes with softmax attention in every layer: what the lightning layers are there to avoid."""
    return replace(config, mixers=(SOFTMAX,) * config.layers)
