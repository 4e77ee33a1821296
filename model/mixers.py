"""Token mixers: lightning attention and softmax attention behind one seam.

A mixer maps normalised rows to rows, packed (`forward`) or one token a sequence (`decode`), and declares the state it
keeps between the two (`state_specs`), whether it takes branches of a shared prompt, and whether its `decode` asks
nothing of the host, so that a CUDA graph can hold it. A new kind of mixer is one
class with these methods.

N packed tokens, B sequences, D model width, H heads, K key heads, A head dim.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from cispo.kernels import cpu_library, lightning_cpu, softmax_cpu
from cispo.kernels.chunks import CHUNK_LENGTH, ChunkGrid
from cispo.kernels.cpu_library import unrecorded
from cispo.kernels.lightning_attention import (
    Decays,
    decays,
    gated_lightning_attention,
    keeps_copy,
    lightning_decode,
    lightning_prefill,
)
from cispo.kernels.norm import gated_norm
from cispo.kernels.product import product
from cispo.kernels.rows import add_bias, head_norms
from cispo.kernels.softmax_attention import is_for_triton, softmax_attention, softmax_decode, softmax_prefill
from cispo.kernels.softmax_cpu import Pages
from cispo.model.cache import DecodeStep, PrefillTarget, State, StateSpec
from cispo.model.config import LIGHTNING, ModelConfig, RopeScaling

_LIGHTNING_NORM_EPSILON = 1e-6
"""M1's own modelling code uses 1e-6 here and the configured epsilon in every other norm."""


class Mixer(Protocol):
    """What the decoder asks of a token mixer."""

    def state_specs(self) -> list[StateSpec]: ...

    @property
    def takes_branches(self) -> bool: ...

    @property
    def is_capturable(self) -> bool: ...

    def __call__(
        self, x_ND: Tensor, rotary_NA: Tensor, grid: ChunkGrid, state: State | None, target: PrefillTarget | None
    ) -> Tensor: ...

    def decode(self, x_BD: Tensor, rotary_BA: Tensor, step: DecodeStep, state: State) -> Tensor: ...


def lightning_slopes(heads: int, layer: int, layers: int) -> Tensor:
    """Decay rates s_{h,l} = 2^(-8 (h+1) / H) * (1 - l / (L - 1) + 1e-5), float32 [H]; l counts every layer.

    Source: MiniMax-M1's modelling code; H is a power of two there.
    """
    base_H = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64, device="cpu") / heads)
    return (base_H * (1 - layer / max(layers - 1, 1) + 1e-5)).float()


class LightningMixer(nn.Module):
    """Linear attention with fixed decay, output norm over all heads, and a sigmoid gate; no positions, no scale.

    `qkv_gate` holds the rows of M1's `qkv_proj` (per head: q, k, v) followed by those of `output_gate`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        inner = config.heads * config.head_dim
        self.qkv_gate = nn.Parameter(torch.empty(4 * inner, config.hidden_size))
        self.norm = nn.Parameter(torch.ones(inner))
        self.out = nn.Parameter(torch.empty(config.hidden_size, inner))
        self._slopes_H = lightning_slopes(config.heads, layer, config.layers)
        self._decays: Decays | None = None

    def decays(self, device: torch.device) -> Decays:
        """Float32 whatever the weights' dtype: rounded decays are wrong decays."""
        if self._decays is None or self._decays.within_HCC.device != device:
            # The engine steps in inference mode, and constants made there could take no part in the learner's backward.
            with torch.inference_mode(False), unrecorded():
                self._decays = decays(self._slopes_H.to(device))
        return self._decays

    def state_specs(self) -> list[StateSpec]:
        specs = [
            StateSpec("state", (self.heads, self.head_dim, self.head_dim), torch.float32, is_paged=False),
            StateSpec("k_recent", (self.heads, self.head_dim, CHUNK_LENGTH), self.out.dtype, is_paged=False),
            StateSpec("v_recent", (self.heads, CHUNK_LENGTH, self.head_dim), self.out.dtype, is_paged=False),
        ]
        if keeps_copy(self.head_dim, self.out.dtype, self.out.device):
            shape = (self.heads, self.head_dim, self.head_dim)
            specs.append(StateSpec("state_copy", shape, self.out.dtype, is_paged=False))
        return specs

    @property
    def is_capturable(self) -> bool:
        return keeps_copy(self.head_dim, self.out.dtype, self.out.device)

    @property
    def takes_branches(self) -> bool:
        return cpu_library.serves(self.qkv_gate, self.norm) and lightning_cpu.takes(self.head_dim)

    def _split(self, qkv_gate: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.heads * self.head_dim
        qkv, gate = qkv_gate.split([3 * inner, inner], dim=-1)
        return qkv, gate

    def _finish(self, out: Tensor, gate: Tensor) -> Tensor:
        return product(gated_norm(out.to(gate.dtype), gate, self.norm, _LIGHTNING_NORM_EPSILON), self.out)

    def forward(
        self, x_ND: Tensor, rotary_NA: Tensor, grid: ChunkGrid, state: State | None, target: PrefillTarget | None
    ) -> Tensor:
        qkv_gate, slopes = product(x_ND, self.qkv_gate), self.decays(x_ND.device)
        if state is not None and target is not None:
            qkv, gate = self._split(qkv_gate)
            caches = state["state"], state["k_recent"], state["v_recent"], state.get("state_copy")
            return self._finish(lightning_prefill(qkv, slopes, grid, target.slot_B, *caches), gate)
        return product(gated_lightning_attention(qkv_gate, self.norm, _LIGHTNING_NORM_EPSILON, slopes, grid), self.out)

    def decode(self, x_BD: Tensor, rotary_BA: Tensor, step: DecodeStep, state: State) -> Tensor:
        qkv, gate = self._split(product(x_BD, self.qkv_gate))
        caches = state["state"], state["k_recent"], state["v_recent"], state.get("state_copy")
        slopes = self.decays(x_BD.device)
        return self._finish(lightning_decode(qkv, slopes, step.slot_B, step.row_B, step.full_rows, *caches), gate)


def rotary_table(positions_N: Tensor, rotary_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Cosines and sines, float32 [N, 2, rotary_dim / 2]: angle_i = position * theta^(-2i / rotary_dim), scaled."""
    index = torch.arange(0, rotary_dim, 2, device=positions_N.device, dtype=torch.float64)
    frequency = theta ** (-index / rotary_dim)
    if scaling is not None:
        turns = scaling.original_positions * frequency / (2 * math.pi)
        fast = ((turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)).clamp(0, 1)
        frequency = frequency * (fast + (1 - fast) / scaling.factor)
    angle = (positions_N.double().unsqueeze(1) * frequency).float()
    return torch.stack((angle.cos(), angle.sin()), dim=1)


class SoftmaxMixer(nn.Module):
    """Grouped-query attention with partial rotary embedding; `qkv` holds the rows of q_proj, k_proj and v_proj.

    Qwen2 adds a bias to the three; Qwen3 normalises each head of queries and keys before it is rotated.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = config.heads, config.key_heads, config.head_dim
        rows = (config.heads + 2 * config.key_heads) * config.head_dim
        self.qkv = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.out = nn.Parameter(torch.empty(config.hidden_size, config.heads * config.head_dim))
        self.norm_epsilon = config.norm_epsilon
        self.qkv_bias = nn.Parameter(torch.zeros(rows)) if config.has_qkv_bias else None
        self.q_norm = nn.Parameter(torch.ones(config.head_dim)) if config.has_qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(config.head_dim)) if config.has_qk_norm else None

    def _project(self, x_ND: Tensor) -> Tensor:
        """Queries, keys and values of each row, ready to be rotated: [N, (H + 2 K) A]."""
        qkv = product(x_ND, self.qkv)
        if self.qkv_bias is not None:
            qkv = add_bias(qkv, self.qkv_bias)
        if self.q_norm is None or self.k_norm is None:
            return qkv
        return head_norms(qkv, self.q_norm, self.k_norm, self.norm_epsilon, self.heads, self.key_heads)

    def state_specs(self) -> list[StateSpec]:
        keys, values = (self.head_dim, CHUNK_LENGTH), (CHUNK_LENGTH, self.head_dim)
        return [
            StateSpec("k_pages", (self.key_heads, *keys), self.out.dtype, is_paged=True),
            StateSpec("v_pages", (self.key_heads, *values), self.out.dtype, is_paged=True),
        ]

    @property
    def is_capturable(self) -> bool:
        return is_for_triton(self.qkv, self.heads, self.key_heads, self.head_dim)

    @property
    def takes_branches(self) -> bool:
        return softmax_cpu.serves(self.qkv, self.out, self.head_dim)

    def forward(
        self, x_ND: Tensor, rotary_NA: Tensor, grid: ChunkGrid, state: State | None, target: PrefillTarget | None
    ) -> Tensor:
        qkv = self._project(x_ND)
        if state is not None and target is not None:
            pages = Pages(state["k_pages"], state["v_pages"], target.pages_BJ)
            out = softmax_prefill(qkv, rotary_NA, self.heads, self.key_heads, grid, pages)
        else:
            out = softmax_attention(qkv, rotary_NA, self.heads, self.key_heads, grid)
        return product(out.to(x_ND.dtype), self.out)

    def decode(self, x_BD: Tensor, rotary_BA: Tensor, step: DecodeStep, state: State) -> Tensor:
        pages = Pages(state["k_pages"], state["v_pages"], step.page_BJ)
        qkv = self._project(x_BD)
        out = softmax_decode(qkv, rotary_BA, self.heads, self.key_heads, pages, step.position_B, step.active)
        return product(out.to(x_BD.dtype), self.out)


def build_mixer(config: ModelConfig, layer: int) -> LightningMixer | SoftmaxMixer:
    """The mixer that the configuration names for a layer."""
    return LightningMixer(config, layer) if config.mixers[layer] == LIGHTNING else SoftmaxMixer(config)
