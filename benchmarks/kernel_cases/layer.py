"""A whole decoder layer of M1's kind, and what batch invariance costs it: beside the same layer on library calls.

The peers are the layer with its products by the library at every row count and, where there is one, the library's
softmax attention in place of ours: none of them promises a row the same bits in training and decode. fla's lightning
attention, beside ours in `lightning.py`, would make the layer slower. Errors are the median over tokens of the
difference to such a layer, since a token near a router's tie may take another expert.

N packed tokens, B sequences, H heads, K key heads, D head dim.
"""

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels.chunks import ChunkGrid, chunk_grid
from cispo.kernels.gpu import experts
from cispo.kernels.gpu.rotary import rotate, rotate_back
from cispo.kernels.softmax_cpu import Pages
from cispo.model import mixers
from cispo.model.cache import DecodeCache
from cispo.model.config import LIGHTNING, SOFTMAX, ModelConfig
from cispo.model.decoder import Layer, Rows
from cispo.model.mixers import rotary_table
from kernel_cases import Case, Machine, graphed

Work = Callable[[], object]
Works = Mapping[str, Work]
SEQUENCES, LENGTH = 4, 4096
BATCH, CONTEXT = 64, 4000
CHECKED_LENGTHS = (700, 1, 64, 259)
DEVICE = torch.device("cuda")
CONFIG = ModelConfig(
    vocabulary_size=8, hidden_size=2048, mixers=(LIGHTNING, SOFTMAX), heads=16, key_heads=4, head_dim=128,
    rotary_dim=64, rope_theta=1e6, expert_width=1408, experts=32, experts_per_token=2, norm_epsilon=1e-5,
    lightning_alpha=1.68, lightning_beta=1.0, softmax_alpha=1.68, softmax_beta=1.0, expert_alpha=1.68,
    expert_beta=1.0, initializer_range=0.02, tie_embeddings=True, max_positions=8192,
)  # fmt: skip


def _layer(mixer: str) -> Layer:
    layer = Layer(CONFIG, CONFIG.mixers.index(mixer)).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=CONFIG.initializer_range, generator=generator)
        if not name.endswith("router"):
            parameter.data = parameter.data.bfloat16()
    return layer


def _rows(tokens: int) -> Rows:
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    x = torch.randn(tokens, CONFIG.hidden_size, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    return Rows(x, x)


def _rotary(positions: Tensor) -> Tensor:
    return rotary_table(positions, CONFIG.rotary_dim, CONFIG.rope_theta)


class _Rotated(torch.autograd.Function):
    """Our rotation, with a gradient: the library has none of its own."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotary: Tensor) -> Tensor:
        ctx.save_for_backward(rotary)
        return rotate(qkv, rotary, CONFIG.heads, CONFIG.key_heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dqk,), (rotary,) = gradients, ctx.saved_tensors
        dqkv = dqk.new_zeros(len(dqk), (CONFIG.heads + 2 * CONFIG.key_heads) * CONFIG.head_dim)
        rotate_back(dqk.float(), rotary, CONFIG.heads, CONFIG.key_heads, dqkv)
        return dqkv, None


def _turned(qkv: Tensor, rotary: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys, rotated, and values; [N, H or K, D]."""
    qk = _Rotated.apply(qkv, rotary)
    heads, key_heads, dim = CONFIG.heads, CONFIG.key_heads, CONFIG.head_dim
    q, k = qk.unflatten(1, (-1, dim)).split([heads, key_heads], dim=1)
    return q, k, qkv[:, qk.shape[1] :].unflatten(1, (-1, dim))


def _sdpa(qkv: Tensor, rotary: Tensor, heads: int, key_heads: int, grid: ChunkGrid) -> Tensor:
    """The library's attention, for sequences of one length."""
    batched = (x.unflatten(0, (len(grid.lengths), -1)).transpose(1, 2) for x in _turned(qkv, rotary))
    out = F.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(len(qkv), -1)


def _sdpa_decode(context: int) -> Callable[..., Tensor]:
    """The library's attention of one query a sequence, on keys and values that lie in one piece, not in pages."""
    shape = (BATCH, CONFIG.key_heads, context + 1, CONFIG.head_dim)
    keys, values = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def attend(
        qkv: Tensor, rotary: Tensor, heads: int, key_heads: int, pages: Pages, position_B: Tensor, active: int
    ) -> Tensor:
        q, keys[:, :, context], values[:, :, context] = _turned(qkv, rotary)
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True).flatten(1)

    return attend


def _patched(work: Work, **of_mixer: Callable[..., Tensor]) -> Work:
    """The work with the library's products, and these functions of the mixers replaced."""

    def run() -> object:
        with patch.multiple(mixers, product=F.linear, **of_mixer), patch.object(experts, "product", F.linear):
            return work()

    return run


def _forward(layer: Layer, lengths: tuple[int, ...]) -> Callable[[], Tensor]:
    grid, rows = chunk_grid(lengths, DEVICE), _rows(sum(lengths))
    rotary = _rotary(torch.cat([torch.arange(length, device=DEVICE) for length in lengths]))
    norm = torch.ones(CONFIG.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    return lambda: layer(rows, rotary, grid, None, None, norm, None, None).x_ND


def _peers(mixer: str, work: Work) -> Works:
    found: dict[str, Work] = {"library products": _patched(work)}
    if mixer == SOFTMAX:
        found["library products and SDPA"] = _patched(work, softmax_attention=_sdpa)
    return found


def _training(mixer: str, *, has_gradient: bool) -> Works:
    layer = _layer(mixer)
    # Rows come in normalised: the layer's first norm is computed with the layer before it.
    parameters = [parameter for name, parameter in layer.named_parameters() if name != "mixer_norm"]
    forward = _forward(layer, (LENGTH,) * SEQUENCES)
    dout = torch.randn(SEQUENCES * LENGTH, CONFIG.hidden_size, device=DEVICE, dtype=torch.bfloat16)

    def work() -> object:
        if has_gradient:
            return torch.autograd.grad(forward(), parameters, dout)
        with torch.no_grad():
            return forward()

    return {"cispo": work} | dict(_peers(mixer, work))


@torch.no_grad()
def _error(mixer: str) -> float:
    """Of sequences of many lengths, to the layer on plain library products; both kinds of rows in bfloat16."""
    work = _forward(_layer(mixer), CHECKED_LENGTHS)
    ours, theirs = work().double(), _patched(work)()
    assert isinstance(theirs, Tensor)
    return float(((ours - theirs.double()).norm(dim=1) / ours.norm(dim=1)).median())


@torch.no_grad()
def _decode(mixer: str) -> Works:
    layer, rows = _layer(mixer), _rows(BATCH)
    cache = DecodeCache([layer.mixer.state_specs()], capacity=BATCH, max_tokens=CONTEXT + 1, device=DEVICE)
    for tensor in cache.layers[0].values():
        tensor.normal_()
    cache.extend(range(BATCH), [CONTEXT] * BATCH)
    step = cache.begin_step(np.arange(BATCH))
    rotary = _rotary(step.position_B)
    norm = torch.ones(CONFIG.hidden_size, device=DEVICE, dtype=torch.bfloat16)

    @torch.no_grad()
    def work() -> object:
        return layer.decode(rows, rotary, step, cache.layers[0], norm, None).x_ND

    works = {"cispo": graphed(work), "library products": graphed(_patched(work))}
    if mixer == SOFTMAX:
        works["library products and SDPA"] = graphed(_patched(work, softmax_decode=_sdpa_decode(CONTEXT)))
    return works


def _training_floor(mixer: str, passes: int, machine: Machine) -> float:
    """Its products alone, and attention's."""
    tokens, width, inner = SEQUENCES * LENGTH, CONFIG.hidden_size, CONFIG.heads * CONFIG.head_dim
    keys = CONFIG.key_heads * CONFIG.head_dim
    projected = 5 * inner if mixer == LIGHTNING else 2 * inner + 2 * keys
    each = 2 * width * projected + 6 * width * CONFIG.expert_width * CONFIG.experts_per_token
    if mixer == SOFTMAX:
        each += 2 * LENGTH * inner
    return passes * tokens * each / machine.products_flops_per_s


def _decode_floor(mixer: str, machine: Machine) -> float:
    """The weights, and what the sequences keep, read once."""
    width, inner = CONFIG.hidden_size, CONFIG.heads * CONFIG.head_dim
    keys = CONFIG.key_heads * CONFIG.head_dim
    weights = width * (5 * inner if mixer == LIGHTNING else 2 * inner + 2 * keys)
    weights += 3 * CONFIG.experts * width * CONFIG.expert_width
    kept = inner * (CONFIG.head_dim + 2 * (CONTEXT % 64)) if mixer == LIGHTNING else 2 * CONTEXT * keys
    return 2 * (weights + BATCH * kept) / machine.copy_bytes_per_s


def _cases(mixer: str) -> list[Case]:
    def training(name: str, passes: int, *, has_gradient: bool) -> Case:
        return Case(
            name=f"{mixer} layer {name}, {SEQUENCES} x {LENGTH} tokens",
            floor_s=lambda machine: _training_floor(mixer, passes, machine),
            reach_ms=None,
            prepare=lambda: _training(mixer, has_gradient=has_gradient),
            error=lambda: _error(mixer),
            extra={"to reach": "1.05 x the fastest"},
        )

    decode = Case(
        name=f"{mixer} layer decode, batch {BATCH}, context {CONTEXT}",
        floor_s=lambda machine: _decode_floor(mixer, machine),
        reach_ms=None,
        prepare=lambda: _decode(mixer),
        error=lambda: _error(mixer),
        extra={"to reach": "1.1 x the fastest"},
    )
    return [training("forward", 1, has_gradient=False), training("forward and gradient", 3, has_gradient=True), decode]


CASES = [case for mixer in (LIGHTNING, SOFTMAX) for case in _cases(mixer)]
