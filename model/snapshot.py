"""A decoded sequence as a file: what a cache holds of it, to be gone on with by another process.

A safetensors file with the states and pages of every layer, the token ids behind them, and a fingerprint of the policy
that made them. Going on from a file gives the bits that going on in place would have given.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cispo.errors import CheckpointError
from cispo.model.cache import DecodeCache, State
from cispo.model.decoder import Decoder

_FORMAT = "cispo sequence 1"
_IDS = "token_ids"


def policy_fingerprint(decoder: Decoder) -> str:
    """What tells two policies apart: their configuration, and the bits of every weight, summed tensor by tensor."""
    digest = hashlib.blake2b(json.dumps(asdict(decoder.config), sort_keys=True).encode(), digest_size=16)
    for name, parameter in decoder.named_parameters():
        bits = parameter.detach().contiguous().view(torch.int16 if parameter.element_size() == 2 else torch.int32)
        digest.update(f"{name} {parameter.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()


def save_sequence(path: Path, decoder: Decoder, cache: DecodeCache, slot: int, token_ids: Sequence[int]) -> None:
    """Write the sequence in a slot, which has read `token_ids`; the file appears whole, by rename.

    Raises ValueError when the cache has read another number of tokens.
    """
    if len(token_ids) != cache.length(slot):
        raise ValueError(
            f"slot {slot} has read {cache.length(slot)} tokens and {len(token_ids)} ids were given; give all of them"
        )
    tensors = {
        f"layers.{index}.{name}": tensor.cpu().contiguous()
        for index, state in enumerate(cache.snapshot(slot))
        for name, tensor in state.items()
    }
    tensors[_IDS] = torch.tensor(token_ids, dtype=torch.int64)
    draft = path.with_name(f".{path.name}.draft")
    save_file(tensors, draft, metadata={"format": _FORMAT, "policy": policy_fingerprint(decoder)})
    draft.replace(path)


def load_sequence(
    path: Path, decoder: Decoder, cache: DecodeCache, slot: int, *, is_same_policy: bool = True
) -> list[int]:
    """Put the sequence of a file into an empty slot and return the token ids that it has read.

    is_same_policy: refuse a file that other weights have made; False goes on with the states of the old ones. Raises
    CheckpointError for a file that is damaged, is none of these, or is of another policy.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(f"{path} holds no decoded sequence; write one with save_sequence")
            if is_same_policy and metadata.get("policy") != policy_fingerprint(decoder):
                raise CheckpointError(
                    f"{path} was made by another policy or dtype; load that one, or pass is_same_policy=False to go on "
                    "with the states it left"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a decoded sequence ({error}); write it again") from error
    token_ids: list[int] = tensors.pop(_IDS).tolist()
    cache.restore(slot, len(token_ids), _by_layer(path, tensors, cache))
    return token_ids


def _by_layer(path: Path, tensors: dict[str, Tensor], cache: DecodeCache) -> list[State]:
    """The tensors of each layer under the names that the cache has for them; CheckpointError where they differ."""
    expected = {f"layers.{i}.{name}": x for i, state in enumerate(cache.layers) for name, x in state.items()}
    wrong = sorted(set(expected) ^ set(tensors))
    wrong += [
        name
        for name in sorted(set(expected) & set(tensors))
        if expected[name].shape[1:] != tensors[name].shape[-(expected[name].dim() - 1) :]
        or expected[name].dtype is not tensors[name].dtype
    ]
    if wrong:
        raise CheckpointError(f"{path} is of a policy of other sizes ({', '.join(wrong[:3])}); load that one")
    return [{name: tensors[f"layers.{i}.{name}"] for name in state} for i, state in enumerate(cache.layers)]
