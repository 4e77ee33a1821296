"""A sequence has the same bits in one forward, in pieces, token by token, forked, and gone on with from a file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cispo.errors import CheckpointError
from cispo.model.cache import DecodeCache
from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder
from cispo.model.snapshot import load_sequence, save_sequence

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(small_policy_folder: Path) -> Decoder:
    return load_policy(small_policy_folder, dtype=torch.float32, device="cpu")


def random_ids(decoder: Decoder, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, decoder.config.vocabulary_size, (length,), generator=generator)


def forward(
    decoder: Decoder, pieces: list[Tensor], cache: DecodeCache | None = None, slots: list[int] | None = None
) -> list[Tensor]:
    """Hidden states of packed pieces: whole sequences, or what the sequences in these slots go on with."""
    lengths = [len(piece) for piece in pieces]
    target = cache.extend(slots, lengths) if cache is not None and slots is not None else None
    starts = target.starts if target else [0] * len(pieces)
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return list(decoder(torch.cat(pieces), positions, cu_seqlens, target).split(lengths))


def decode(decoder: Decoder, cache: DecodeCache, columns: Tensor) -> Tensor:
    """Hidden states [sequences, tokens, D] of so many tokens decoded in slots 0, 1, .."""
    hidden = []
    for ids in columns.unbind(1):
        step = cache.begin_step(np.arange(len(columns)))
        padded = torch.cat((ids, ids.new_zeros(len(step.position_B) - len(ids))))
        hidden.append(decoder.decode(padded, step, cache)[: len(columns)])
    return torch.stack(hidden, dim=1)


@torch.inference_mode()
@pytest.mark.parametrize("piece", [1, 7, 64, 300])
def test_pieces_of_every_size_are_bitwise_equal_to_one_shot(decoder: Decoder, piece: int) -> None:
    ids = random_ids(decoder, 700 if piece > 1 else 150)
    (wanted,) = forward(decoder, [ids])
    cache = decoder.new_cache(capacity=1, max_tokens=len(ids))
    pieces = [forward(decoder, [part], cache, [0])[0] for part in ids.split(piece)]
    assert torch.equal(torch.cat(pieces), wanted)


@torch.inference_mode()
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    decoded=st.integers(1, 12),
    forks=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_packing_chunking_and_fork_gives_the_bits_of_one_shot(
    decoder: Decoder, lengths: list[int], cuts: list[int], decoded: int, forks: int, seed: int
) -> None:
    """Sequences grow side by side in pieces of drawn sizes; then the first is forked, and all are decoded on."""
    sequences = [random_ids(decoder, length + decoded, seed + i) for i, length in enumerate(lengths)]
    branches = [random_ids(decoder, decoded, seed + 100 + i) for i in range(forks)]
    wholes = [*sequences, *(torch.cat((sequences[0][: lengths[0]], branch)) for branch in branches)]
    wanted = forward(decoder, wholes)
    cache = decoder.new_cache(capacity=len(wholes), max_tokens=200)
    done, turn = [0] * len(lengths), 0
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        slots = [slot for slot, (at, length) in enumerate(zip(done, lengths, strict=True)) if at < length]
        taken = [min(cuts[(turn + slot) % len(cuts)], lengths[slot] - done[slot]) for slot in slots]
        pieces = [sequences[slot][done[slot] : done[slot] + n] for slot, n in zip(slots, taken, strict=True)]
        for slot, rows in zip(slots, forward(decoder, pieces, cache, slots), strict=True):
            assert torch.equal(rows, wanted[slot][done[slot] : done[slot] + len(rows)])
            done[slot] += len(rows)
        turn += 1
    cache.fork(0, range(len(lengths), len(wholes)))
    hidden = decode(decoder, cache, torch.stack([whole[-decoded:] for whole in wholes]))
    for rows, expected in zip(hidden, wanted, strict=True):
        assert torch.equal(rows, expected[-decoded:])


@torch.inference_mode()
def test_a_fork_of_an_unfinished_page_goes_on_in_pieces_of_its_own(decoder: Decoder) -> None:
    prompt, tails = random_ids(decoder, 70), [random_ids(decoder, 90, seed) for seed in (1, 2)]
    wanted = forward(decoder, [torch.cat((prompt, tail)) for tail in tails])
    cache = decoder.new_cache(capacity=2, max_tokens=200)
    forward(decoder, [prompt], cache, [0])
    cache.fork(0, [1])
    for rows, expected in zip(forward(decoder, tails, cache, [0, 1]), wanted, strict=True):
        assert torch.equal(rows, expected[70:])
    cache.release(0), cache.release(1)
    assert cache.pages_in_use == 0


_GO_ON = """
import sys, torch
from pathlib import Path
from cispo.model.checkpoint import load_policy
from cispo.model.snapshot import load_sequence
policy, file, out = map(Path, sys.argv[1:4])
decoder = load_policy(policy, dtype=torch.float32, device="cpu")
cache = decoder.new_cache(capacity=4, max_tokens=300)
with torch.inference_mode():
    read = load_sequence(file, decoder, cache, 0)
    ids = torch.tensor([int(x) for x in sys.argv[4].split(",")])
    target = cache.extend([0], [len(ids)])
    positions = torch.arange(len(read), len(read) + len(ids))
    torch.save(decoder(ids, positions, torch.tensor([0, len(ids)]).int(), target), out)
"""


@torch.inference_mode()
@pytest.mark.parametrize("length", [100, 128, 20])
def test_another_process_goes_on_from_a_file_bit_for_bit(
    decoder: Decoder, small_policy_folder: Path, tmp_path: Path, length: int
) -> None:
    ids = random_ids(decoder, length + 80)
    (wanted,) = forward(decoder, [ids])
    cache = decoder.new_cache(capacity=3, max_tokens=300)
    forward(decoder, [ids[:30], ids[:length]], cache, [0, 2])
    save_sequence(tmp_path / "sequence.safetensors", decoder, cache, 2, ids[:length].tolist())
    assert [path.name for path in tmp_path.iterdir()] == ["sequence.safetensors"]
    rest = ",".join(map(str, ids[length:].tolist()))
    arguments = [small_policy_folder, tmp_path / "sequence.safetensors", tmp_path / "out.pt", rest]
    subprocess.run([sys.executable, "-c", _GO_ON, *map(str, arguments)], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), wanted[length:])


@torch.inference_mode()
def test_a_file_of_another_policy_or_none_is_refused(
    decoder: Decoder, small_policy_folder: Path, tmp_path: Path
) -> None:
    cache, file = decoder.new_cache(capacity=2, max_tokens=100), tmp_path / "sequence.safetensors"
    ids = random_ids(decoder, 70)
    forward(decoder, [ids], cache, [0])
    with pytest.raises(ValueError, match="has read 70 tokens and 69 ids"):
        save_sequence(file, decoder, cache, 0, ids[1:].tolist())
    save_sequence(file, decoder, cache, 0, ids.tolist())
    other = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    other.layers[0].mixer_norm.data[0] += 1
    with pytest.raises(CheckpointError, match="another policy"):
        load_sequence(file, other, other.new_cache(capacity=2, max_tokens=100), 0)
    assert (
        load_sequence(file, other, other.new_cache(capacity=2, max_tokens=100), 0, is_same_policy=False) == ids.tolist()
    )
    short = other.new_cache(capacity=2, max_tokens=64)
    with pytest.raises(ValueError, match="70 tokens long"):
        load_sequence(file, decoder, short, 0)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_sequence(file, decoder, cache, 1)


def test_a_forward_from_a_cache_asks_for_no_gradients(decoder: Decoder) -> None:
    cache = decoder.new_cache(capacity=1, max_tokens=64)
    with pytest.raises(ValueError, match="no_grad"):
        forward(decoder, [random_ids(decoder, 3)], cache, [0])


@torch.inference_mode()
def test_lightning_memory_is_constant_in_length(decoder: Decoder) -> None:
    """Only pages grow: a lightning layer of a sequence takes as much at 64 tokens as at 4,096."""
    short, long = (decoder.new_cache(capacity=4, max_tokens=tokens) for tokens in (64, 4096))
    for mixer, few, many in zip(decoder.config.mixers, short.layers, long.layers, strict=True):
        sizes = [sum(tensor.numel() for tensor in state.values()) for state in (few, many)]
        assert (sizes[0] == sizes[1]) == (mixer == "lightning")
