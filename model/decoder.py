"""The decoder on packed tokens: MiniMax-M1's, and with other settings that of Llama and Qwen.

    n1 = RMSNorm(h);  h = alpha n1 + beta Mixer(n1);  n2 = RMSNorm(h);  h = alpha n2 + beta Experts(n2)        (M1)
    h = h + Mixer(RMSNorm(h));  h = h + Experts(RMSNorm(h))                                               (the others)

M1's residual is the *normalised* input (post-norm, as in DeepNorm), so no stream passes a layer unnormalised. Nothing
here knows of padding: tokens of all sequences lie one after the other, and `cu_seqlens` says where each begins.

N packed tokens, B sequences, D model width, V vocabulary, E experts, F expert width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cispo.kernels.chunks import ChunkGrid, chunk_grid
from cispo.kernels.cpu_library import unrecorded
from cispo.kernels.experts import expert_layer
from cispo.kernels.head_loss import head_logits
from cispo.kernels.norm import residual_norm, rms_norm, sum_and_norm
from cispo.kernels.rows import select_rows
from cispo.model.cache import DecodeCache, DecodeStep, PrefillTarget, State
from cispo.model.config import LIGHTNING, ModelConfig
from cispo.model.mixers import build_mixer, rotary_table
from cispo.model.routing import LayerRouting, RoutingControl


class Experts(nn.Module):
    """Top-k of E SwiGLU experts, dropless, with a float32 router (M1 report, section 2); a dense layer has one."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        experts, self.experts_per_token, width = config.channel_sizes(layer)
        self.is_renormalised = config.is_renormalised
        is_dense = layer in config.dense_layers
        self.router = None if is_dense else nn.Parameter(torch.empty(experts, config.hidden_size, dtype=torch.float32))
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, config.hidden_size))
        self.down = nn.Parameter(torch.empty(experts, config.hidden_size, width))

    def forward(self, x_ND: Tensor, routing: LayerRouting | None = None) -> Tensor:
        return expert_layer(
            x_ND,
            self.router,
            self.gate_up,
            self.down,
            self.experts_per_token,
            is_renormalised=self.is_renormalised,
            threshold_N=routing.threshold_N if routing else None,
            given_ids_NK=routing.given_ids_NK if routing else None,
            observe=routing.observer(x_ND, self.router) if routing and self.router is not None else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What passes from sublayer to sublayer: the stream that outputs are added to, and its norm, which sublayers read.

    In M1's decoder they are one: the stream is the normalised rows.
    """

    stream_ND: Tensor
    x_ND: Tensor

    def select(self, rows_M: Tensor) -> "Rows":
        """Some of the rows, by index."""
        x_MD = self.x_ND.index_select(0, rows_M)
        return Rows(x_MD if self.stream_ND is self.x_ND else self.stream_ND.index_select(0, rows_M), x_MD)


class Layer(nn.Module):
    """A token mixer and a channel mixer, each on the normalised rows.

    Rows come in normalised by this layer's mixer_norm and leave normalised by `next_norm`, that of the next layer or
    the final one: what is added up is only ever read through a norm, so both are computed in one pass.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        is_lightning = config.mixers[index] == LIGHTNING
        self.mixer_alpha = config.lightning_alpha if is_lightning else config.softmax_alpha
        self.mixer_beta = config.lightning_beta if is_lightning else config.softmax_beta
        self.expert_alpha, self.expert_beta = config.expert_alpha, config.expert_beta
        self.epsilon, self.is_postnorm = config.norm_epsilon, config.is_postnorm
        self.mixer_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.mixer = build_mixer(config, index)
        self.expert_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.experts = Experts(config, index)

    def forward(
        self,
        rows: Rows,
        rotary: Tensor,
        grid: ChunkGrid,
        state: State | None,
        target: PrefillTarget | None,
        next_norm: Tensor,
        rows_M: Tensor | None,
        routing: LayerRouting | None,
    ) -> Rows:
        mixed_ND = self.mixer(rows.x_ND, rotary, grid, state, target)
        if rows_M is not None:
            rows, mixed_ND = rows.select(rows_M), mixed_ND.index_select(0, rows_M)
        return self._channel_mix(rows, mixed_ND, next_norm, routing)

    def decode(
        self,
        rows: Rows,
        rotary: Tensor,
        step: DecodeStep,
        state: State,
        next_norm: Tensor,
        routing: LayerRouting | None,
    ) -> Rows:
        return self._channel_mix(rows, self.mixer.decode(rows.x_ND, rotary, step, state), next_norm, routing)

    def _channel_mix(self, rows: Rows, mixed_ND: Tensor, next_norm: Tensor, routing: LayerRouting | None) -> Rows:
        rows = self._add(rows, mixed_ND, self.mixer_alpha, self.mixer_beta, self.expert_norm)
        return self._add(rows, self.experts(rows.x_ND, routing), self.expert_alpha, self.expert_beta, next_norm)

    def _add(self, rows: Rows, out_ND: Tensor, alpha: float, beta: float, norm: Tensor) -> Rows:
        """The stream with a sublayer's output in it, normalised for the next one."""
        if self.is_postnorm:
            x_ND = residual_norm(rows.x_ND, out_ND, alpha, beta, norm, self.epsilon)
            return Rows(x_ND, x_ND)
        return Rows(*sum_and_norm(rows.stream_ND, out_ND, norm, self.epsilon))


class Decoder(nn.Module):
    """Token ids in, final hidden states out; logits only where they are asked for.

    trained_ids: ids from here on have no trained row; all have one unless the policy's tokenizer ends before.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.final_norm = nn.Parameter(torch.ones(config.hidden_size))
        self._rotary_table: Tensor | None = None
        self._trained_rows: Tensor | None = None
        self.trained_ids = config.vocabulary_size
        if not config.tie_embeddings:
            self.head = nn.Parameter(torch.empty(config.vocabulary_size, config.hidden_size))

    @property
    def head_weight(self) -> Tensor:
        """The rows of the LM head that training has reached, [trained_ids, D]; the embedding's where they are tied.

        Embeddings are padded to round sizes. The rows past the tokenizer's last id hold zeros or noise, and would take
        part in every softmax: neither sampling nor the learner sees them.
        """
        weight: Tensor = self.embedding if self.config.tie_embeddings else self.head
        if self.trained_ids == self.config.vocabulary_size:
            return weight
        if torch.is_grad_enabled():
            return weight[: self.trained_ids]
        # One object as long as the weight lives: what is packed for the CPU kernels is kept by the tensor's identity.
        if self._trained_rows is None or self._trained_rows.data_ptr() != weight.data_ptr():
            self._trained_rows = weight.detach()[: self.trained_ids]
        return self._trained_rows

    @property
    def whole_layers(self) -> list[Layer]:
        """The layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @property
    def takes_branches(self) -> bool:
        """Whether `forward` takes families: a prompt packed once with the sequences that go on from it.

        The CPU kernels of attention do, in float32 and for the head dims they serve; their twins take whole sequences.
        """
        return all(layer.mixer.takes_branches for layer in self.whole_layers)

    def initialise(self, seed: int) -> None:
        """Draw every matrix from N(0, initializer_range^2), in order of names; norms are ones and biases zeros."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    drawn = torch.randn(parameter.shape, generator=generator) * self.config.initializer_range
                    parameter.copy_(drawn)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def forward(
        self,
        ids_N: Tensor,
        positions_N: Tensor,
        cu_seqlens: Tensor,
        cache: PrefillTarget | None = None,
        rows_M: Tensor | None = None,
        routing: RoutingControl | None = None,
        families: Sequence[int] | None = None,
    ) -> Tensor:
        """Hidden states of packed tokens, after the final norm; [N, D] in the weights' dtype, or [M, D].

        ids_N: int64 token ids. positions_N: int64 positions, from 0 at the start of each sequence. cu_seqlens: int32
        [B + 1], where each sequence starts and the last one ends. cache: what `DecodeCache.extend` gave for these
        lengths; then what is packed are pieces, which go on from what the cache holds of their sequences and leave
        there what the next piece, or `decode`, goes on from. rows_M: int64 indices of the tokens whose hidden states
        are asked for, if not all: what no other token reads of the last layer is computed for these alone; a row may be
        asked for more than once. routing: what to tell the routers, and what to read back from them. families: the
        first sequence of each family, where the others of a family are branches, whose tokens go on from the end of the
        first with positions to match (see `takes_branches`); None where all are whole.
        """
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("a forward that goes on from a cache has no gradients; call it under torch.no_grad()")
        grid = chunk_grid(cu_seqlens.diff().tolist(), ids_N.device, cache.starts if cache else None, families)
        ends = map(sum, zip(grid.starts, grid.lengths, strict=True))
        rotary = self._rotary(max(ends)).index_select(0, positions_N)
        rows, next_norms = self._normalise(F.embedding(ids_N, self.embedding))
        routed = routing.of_packed(self.config, cu_seqlens, ids_N.device) if routing else None
        asks_early = routing is None or not routing.needs_every_row
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            asked = rows_M if asks_early and index == self.config.layers - 1 else None
            if routed is not None and asked is not None:
                routed = routed.select(asked)
            state, steered = cache.layers[index] if cache else None, routed.of_layer(index) if routed else None
            rows = layer(rows, rotary, grid, state, cache, next_norm, asked, steered)
        return rows.x_ND if asks_early or rows_M is None else rows.x_ND.index_select(0, rows_M)

    def decode(
        self, ids_B: Tensor, step: DecodeStep, cache: DecodeCache, routing: RoutingControl | None = None
    ) -> Tensor:
        """Hidden state of one more token of each of the step's sequences; [B, D]. routing: as in `forward`."""
        rotary = select_rows(self._rotary(step.positions), step.position_B)
        rows, next_norms = self._normalise(select_rows(self.embedding, ids_B))
        routed = routing.of_step(self.config, len(ids_B), step.active, ids_B.device) if routing else None
        for index, (layer, state, next_norm) in enumerate(zip(self.layers, cache.layers, next_norms, strict=True)):
            assert isinstance(layer, Layer)
            steered = routed.of_layer(index) if routed else None
            rows = layer.decode(rows, rotary, step, state, next_norm, steered)
        return rows.x_ND

    def _normalise(self, h_ND: Tensor) -> tuple[Rows, list[Tensor]]:
        """The rows that the first layer reads, of embeddings, and the norm that each layer's rows leave with."""
        first_norm, *next_norms = [layer.mixer_norm for layer in self.whole_layers]
        x_ND = rms_norm(h_ND, first_norm, self.config.norm_epsilon)
        return Rows(x_ND if self.config.is_postnorm else h_ND, x_ND), [*next_norms, self.final_norm]

    def _rotary(self, positions: int) -> Tensor:
        """The rotary table of at least so many positions; it is kept, and doubled when it is too short."""
        table = self._rotary_table
        if table is None or table.shape[0] < positions or table.device != self.embedding.device:
            length = max(1024, 1 << (positions - 1).bit_length())
            # The engine steps in inference mode, and a table made there could take no part in the learner's backward.
            with torch.inference_mode(False), unrecorded():
                positions_P = torch.arange(length, device=self.embedding.device)
                config = self.config
                table = rotary_table(positions_P, config.rotary_dim, config.rope_theta, config.rope_scaling)
            self._rotary_table = table
        return table

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Float32 logits [N, V]; -inf for ids without a trained row."""
        trained_NV = head_logits(hidden_ND, self.head_weight)
        return F.pad(trained_NV, (0, self.config.vocabulary_size - self.trained_ids), value=float("-inf"))

    def new_cache(self, *, capacity: int, max_tokens: int, pages: int | None = None) -> DecodeCache:
        """An empty cache for `capacity` sequences of up to `max_tokens` tokens, on the weights' device.

        pages: of 64 tokens, in all sequences together; None has enough for all of them at their longest.
        """
        specs = [layer.mixer.state_specs() for layer in self.whole_layers]
        return DecodeCache(specs, capacity=capacity, max_tokens=max_tokens, device=self.embedding.device, pages=pages)
