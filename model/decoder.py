"""The MiniMax-M1 decoder on packed tokens.

    n1 = RMSNorm(h);  h = alpha n1 + beta Mixer(n1);  n2 = RMSNorm(h);  h = alpha n2 + beta Experts(n2)

The residual is the *normalised* input (post-norm, as in DeepNorm), so no stream passes a layer unnormalised. Nothing
here knows of padding: tokens of all sequences lie one after the other, and `cu_seqlens` says where each begins.

N packed tokens, B sequences, D model width, V vocabulary, E experts, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.kernels.chunks import ChunkGrid, chunk_grid
from cispo.kernels.experts import expert_layer
from cispo.kernels.head_loss import head_logits
from cispo.kernels.norm import residual_norm, rms_norm
from cispo.model.cache import DecodeCache, DecodeStep, PrefillTarget, State
from cispo.model.config import LIGHTNING, ModelConfig
from cispo.model.mixers import build_mixer, rotary_table


class Experts(nn.Module):
    """Top-k of E SwiGLU experts, dropless, with a float32 router (M1 report, section 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.router = nn.Parameter(torch.empty(config.experts, config.hidden_size, dtype=torch.float32))
        self.gate_up = nn.Parameter(torch.empty(config.experts, 2 * config.expert_width, config.hidden_size))
        self.down = nn.Parameter(torch.empty(config.experts, config.hidden_size, config.expert_width))

    def forward(self, x_ND: Tensor) -> Tensor:
        return expert_layer(x_ND, self.router, self.gate_up, self.down, self.experts_per_token)


class Layer(nn.Module):
    """A token mixer and a channel mixer, each on the normalised stream.

    Rows come in normalised by this layer's mixer_norm and leave normalised by `next_norm`, that of the next layer or
    the final one: a residual is only ever read through a norm, so both are computed in one pass.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        is_lightning = config.mixers[index] == LIGHTNING
        self.mixer_alpha = config.lightning_alpha if is_lightning else config.softmax_alpha
        self.mixer_beta = config.lightning_beta if is_lightning else config.softmax_beta
        self.expert_alpha, self.expert_beta = config.expert_alpha, config.expert_beta
        self.epsilon = config.norm_epsilon
        self.mixer_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.mixer = build_mixer(config, index)
        self.expert_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.experts = Experts(config)

    def forward(
        self,
        x_ND: Tensor,
        rotary: Tensor,
        grid: ChunkGrid,
        state: State | None,
        target: PrefillTarget | None,
        next_norm: Tensor,
    ) -> Tensor:
        return self._channel_mix(x_ND, self.mixer(x_ND, rotary, grid, state, target), next_norm)

    def decode(self, x_BD: Tensor, rotary: Tensor, step: DecodeStep, state: State, next_norm: Tensor) -> Tensor:
        return self._channel_mix(x_BD, self.mixer.decode(x_BD, rotary, step, state), next_norm)

    def _channel_mix(self, x_ND: Tensor, mixed_ND: Tensor, next_norm: Tensor) -> Tensor:
        x_ND = residual_norm(x_ND, mixed_ND, self.mixer_alpha, self.mixer_beta, self.expert_norm, self.epsilon)
        chosen_ND: Tensor = self.experts(x_ND)
        return residual_norm(x_ND, chosen_ND, self.expert_alpha, self.expert_beta, next_norm, self.epsilon)


class Decoder(nn.Module):
    """Token ids in, final hidden states out; logits only where they are asked for."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.final_norm = nn.Parameter(torch.ones(config.hidden_size))
        self._rotary_table: Tensor | None = None
        if not config.tie_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocabulary_size, config.hidden_size))

    @property
    def head_weight(self) -> Tensor:
        """The LM head [V, D]; the embedding itself where they are tied."""
        weight: Tensor = self.embedding if self.config.tie_embeddings else self.head
        return weight

    def initialise(self, seed: int) -> None:
        """Draw every matrix from N(0, initializer_range^2), in order of names; norms keep their ones."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    drawn = torch.randn(parameter.shape, generator=generator) * self.config.initializer_range
                    parameter.copy_(drawn)

    def forward(
        self,
        ids_N: Tensor,
        positions_N: Tensor,
        cu_seqlens: Tensor,
        cache: DecodeCache | None = None,
        target: PrefillTarget | None = None,
    ) -> Tensor:
        """Hidden states of packed tokens, after the final norm; [N, D] in the weights' dtype.

        ids_N: int64 token ids. positions_N: int64 positions, from 0 at the start of each sequence. cu_seqlens: int32
        [B + 1], where each sequence starts and the last one ends. cache and target: leave the state of every sequence
        there, for `decode` to go on from.
        """
        grid = chunk_grid(cu_seqlens.diff().tolist(), ids_N.device)
        rotary = self._rotary(max(grid.lengths)).index_select(0, positions_N)
        first_norm, *next_norms = self._norms()
        x_ND = rms_norm(F.embedding(ids_N, self.embedding), first_norm, self.config.norm_epsilon)
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            x_ND = layer(x_ND, rotary, grid, cache.layers[index] if cache else None, target, next_norm)
        return x_ND

    def decode(self, ids_B: Tensor, step: DecodeStep, cache: DecodeCache) -> Tensor:
        """Hidden state of one more token of each sequence in slots 0 .. B - 1; [B, D]."""
        rotary = self._rotary(step.positions).index_select(0, step.position_B)
        first_norm, *next_norms = self._norms()
        x_BD = rms_norm(F.embedding(ids_B, self.embedding), first_norm, self.config.norm_epsilon)
        for layer, state, next_norm in zip(self.layers, cache.layers, next_norms, strict=True):
            assert isinstance(layer, Layer)
            x_BD = layer.decode(x_BD, rotary, step, state, next_norm)
        return x_BD

    def _norms(self) -> list[Tensor]:
        """The norms that the rows of each layer come in with, and the final one."""
        return [*(layer.mixer_norm for layer in self.layers if isinstance(layer, Layer)), self.final_norm]

    def _rotary(self, positions: int) -> Tensor:
        """The rotary table of at least so many positions; it is kept, and doubled when it is too short."""
        table = self._rotary_table
        if table is None or table.shape[0] < positions or table.device != self.embedding.device:
            length = max(1024, 1 << (positions - 1).bit_length())
            # The engine steps in inference mode, and a table made there could take no part in the learner's backward.
            with torch.inference_mode(False):
                positions_P = torch.arange(length, device=self.embedding.device)
                table = rotary_table(positions_P, self.config.rotary_dim, self.config.rope_theta)
            self._rotary_table = table
        return table

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Float32 logits [N, V]."""
        return head_logits(hidden_ND, self.head_weight)

    def new_cache(self, *, capacity: int, max_tokens: int) -> DecodeCache:
        """An empty cache for `capacity` sequences of up to `max_tokens` tokens, on the weights' device."""
        specs = [layer.mixer.state_specs() for layer in self.layers if isinstance(layer, Layer)]
        return DecodeCache(specs, capacity=capacity, max_tokens=max_tokens, device=self.embedding.device)
