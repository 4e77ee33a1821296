"""Weights on their way from the learner to the rollout workers: a version, a checksum, and the tensors.

A worker copies the tensors into its own parameters and answers with the checksum of what it then holds; the loop
compares. So a weight that never arrived, or arrived damaged, ends the run with a name instead of looking like
staleness.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from cispo.errors import BroadcastError
from cispo.kernels.digest import Part, digests


@dataclass(frozen=True, slots=True)
class Proof:
    """What a worker must say it holds."""

    version: int
    checksum: str


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Policy weights as Ray's object store shares them without copies: arrays by parameter name.

    bfloat16, which NumPy lacks, travels as its bits in int16; `dtypes` says what each array is.
    """

    version: int
    checksum: str
    arrays: Mapping[str, npt.NDArray[Any]]
    dtypes: Mapping[str, torch.dtype]

    @property
    def proof(self) -> Proof:
        """What shows that a worker holds them."""
        return Proof(self.version, self.checksum)

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def tensors(self) -> dict[str, Tensor]:
        """The weights as tensors of their own: PyTorch has no read-only ones, and Ray's memory must not be written."""
        return {name: torch.from_numpy(array.copy()).view(self.dtypes[name]) for name, array in self.arrays.items()}


def pack_weights(proof: Proof, weights: Iterable[tuple[str, Tensor]]) -> Weights:
    """Snapshot on the host of weights that come one after the other."""
    arrays, dtypes = {}, {}
    for name, tensor in weights:
        arrays[name], dtypes[name] = _array(tensor), tensor.dtype
    return Weights(proof.version, proof.checksum, arrays, dtypes)


def weights_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes, dtypes and bits of all tensors, whatever their order; the bits are read where they lie."""
    sums_P = digests([Part(tensor) for tensor in tensors.values()])
    return checksum_of({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, sums_P)


def checksum_of(kinds: Mapping[str, tuple[torch.Size, torch.dtype]], sums_P: Tensor) -> str:
    """The checksum of tensors whose digests are known. kinds: shape and dtype by name, in the order of the digests."""
    of_name = dict(zip(kinds, sums_P.tolist(), strict=True))
    hashed = hashlib.blake2b(digest_size=16)
    for name in sorted(kinds):
        shape, dtype = kinds[name]
        hashed.update(f"{name}|{tuple(shape)}|{dtype}|{of_name[name]}|".encode())
    return hashed.hexdigest()


def verify_receipt(worker: str, sent: Proof, version: int, checksum: str) -> None:
    """Compare what a worker says it holds with what was sent; BroadcastError names worker, version and both sums."""
    if (version, checksum) != (sent.version, sent.checksum):
        raise BroadcastError(
            f"{worker} holds weights version {version} with checksum {checksum} after the broadcast of version "
            f"{sent.version} with checksum {sent.checksum}; its samples would not be the policy's: "
            "check its log, then resume the run"
        )


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    host = tensor.detach().to("cpu").contiguous()
    array: npt.NDArray[Any] = (host.view(torch.int16) if host.dtype is torch.bfloat16 else host).numpy()
    return array
