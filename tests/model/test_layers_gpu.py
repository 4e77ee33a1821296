"""On a GPU in bfloat16: a decoder layer of each kind gives a token the same bits in training, in pieces and in decode.

One set of sequences is packed, prefilled in pieces, forked after a shared prompt, and decoded from the first token.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from cispo.model.cache import DecodeCache
from cispo.model.config import LIGHTNING, SOFTMAX, ModelConfig
from cispo.model.decoder import Decoder

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
VOCABULARY = 97
PROMPT, LENGTH = 150, 230
"""Neither is a multiple of the chunk, and between them is a chunk's boundary."""
BRANCHES = 4
LENGTHS = [LENGTH] * BRANCHES + [1, 64, 317]
PIECES = [1, 63, 64, 70, 200]
"""Lengths of pieces, taken in turn: within a chunk, up to its boundary, from there, and over it."""


def one_layer(mixer: str, head_dim: int, *, is_dense: bool) -> Decoder:
    """A decoder of one layer, its matrices bfloat16 but for the router."""
    config = ModelConfig(
        vocabulary_size=VOCABULARY, hidden_size=256, mixers=(mixer,), heads=4, key_heads=2, head_dim=head_dim,
        rotary_dim=head_dim // 2, rope_theta=1e4, expert_width=136, experts=8, experts_per_token=2, norm_epsilon=1e-5,
        lightning_alpha=1.68, lightning_beta=1.0, softmax_alpha=1.68, softmax_beta=1.0, expert_alpha=1.68,
        expert_beta=1.0, initializer_range=0.1, tie_embeddings=True, max_positions=512,
        dense_layers=(0,) if is_dense else (), dense_width=384,
    )  # fmt: skip
    decoder = Decoder(config)
    decoder.initialise(seed=0)
    for name, parameter in decoder.named_parameters():
        parameter.data = parameter.data.to(CUDA, torch.float32 if name.endswith("router") else torch.bfloat16)
    return decoder


def sequences() -> list[Tensor]:
    """The first ones have their prompt in common."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, VOCABULARY, (length,), generator=generator).to(CUDA) for length in LENGTHS]
    return [torch.cat((drawn[0][:PROMPT], ids[PROMPT:])) if b < BRANCHES else ids for b, ids in enumerate(drawn)]


def bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(decoder: Decoder, ids: list[Tensor]) -> list[Tensor]:
    """Hidden states of each sequence, by the forward that training differentiates."""
    lengths = [len(row) for row in ids]
    positions_N = torch.cat([torch.arange(length, device=CUDA) for length in lengths])
    with torch.enable_grad():
        hidden_ND = decoder(torch.cat(ids), positions_N, bounds(lengths))
    assert hidden_ND.requires_grad
    return list(hidden_ND.detach().split(lengths))


def spans(length: int) -> Iterator[slice]:
    start = 0
    while start < length:
        for piece in PIECES:
            if start < length:
                yield slice(start, min(start + piece, length))
                start += piece


def in_pieces(decoder: Decoder, ids: list[Tensor]) -> list[Tensor]:
    """Every sequence at its own slot; the first piece of each is packed with the others' first, and so on."""
    cache = decoder.new_cache(capacity=len(ids), max_tokens=max(LENGTHS))
    rows: list[list[Tensor]] = [[] for _ in ids]
    steps = [list(spans(len(row))) for row in ids]
    for step in range(max(map(len, steps))):
        slots = [slot for slot in range(len(ids)) if step < len(steps[slot])]
        taken = [steps[slot][step] for slot in slots]
        lengths = [span.stop - span.start for span in taken]
        ids_N = torch.cat([ids[slot][span] for slot, span in zip(slots, taken, strict=True)])
        positions_N = torch.cat([torch.arange(span.start, span.stop, device=CUDA) for span in taken])
        hidden_ND = decoder(ids_N, positions_N, bounds(lengths), cache.extend(slots, lengths))
        for slot, part in zip(slots, hidden_ND.split(lengths), strict=True):
            rows[slot].append(part)
    return [torch.cat(parts) for parts in rows]


def decoded(decoder: Decoder, ids: list[Tensor], cache: DecodeCache, start: int) -> list[Tensor]:
    """The branches' hidden states from a position on, a token of each at a time."""
    ids_BT, slots = torch.stack(ids[:BRANCHES]), np.arange(BRANCHES)
    steps = [decoder.decode(ids_BT[:, at], cache.begin_step(slots), cache) for at in range(start, LENGTH)]
    return list(torch.stack(steps, dim=1))


def forked(decoder: Decoder, ids: list[Tensor]) -> list[Tensor]:
    """The branches' hidden states after the prompt, which is prefilled once and forked."""
    cache = decoder.new_cache(capacity=BRANCHES, max_tokens=LENGTH)
    positions_P = torch.arange(PROMPT, device=CUDA)
    decoder(ids[0][:PROMPT], positions_P, bounds([PROMPT]), cache.extend([0], [PROMPT]))
    cache.fork(0, range(1, BRANCHES))
    return decoded(decoder, ids, cache, PROMPT)


def token_by_token(decoder: Decoder, ids: list[Tensor]) -> list[Tensor]:
    """The branches' hidden states, every token decoded, from the first."""
    return decoded(decoder, ids, decoder.new_cache(capacity=BRANCHES, max_tokens=LENGTH), 0)


@torch.no_grad()
@pytest.mark.parametrize("is_dense", [False, True], ids=["experts", "dense"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mixer", [LIGHTNING, SOFTMAX])
def test_packed_pieces_forks_and_tokens_have_the_same_bits(mixer: str, head_dim: int, is_dense: bool) -> None:
    decoder, ids = one_layer(mixer, head_dim, is_dense=is_dense), sequences()
    wanted = packed(decoder, ids)
    for hidden, alone in zip(wanted, [packed(decoder, [row])[0] for row in ids], strict=True):
        assert hidden.isfinite().all()
        assert torch.equal(hidden, alone)
    for hidden, pieces in zip(wanted, in_pieces(decoder, ids), strict=True):
        assert torch.equal(hidden, pieces)
    for hidden, branch in zip(wanted[:BRANCHES], forked(decoder, ids), strict=True):
        assert torch.equal(hidden[PROMPT:], branch)
    for hidden, tokens in zip(wanted[:BRANCHES], token_by_token(decoder, ids), strict=True):
        assert torch.equal(hidden, tokens)
