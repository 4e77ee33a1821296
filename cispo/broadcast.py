"""Weights on their way from the learner to the rollout workers: a version, a checksum, and the tensors.

A worker copies the tensors into its own parameters and answers with the checksum of what it then holds; the loop
compares. So a weight that never arrived, or arrived damaged, ends the run with a name instead of looking like
staleness.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from cispo.errors import BroadcastError


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


def pack_weights(version: int, tensors: Mapping[str, Tensor]) -> Weights:
    """Snapshot of the tensors on the host."""
    arrays = {name: _array(tensor) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return Weights(version, weights_checksum(tensors), arrays, dtypes)


def weights_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes, dtypes and bytes of all tensors, in order of names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_array(tensor).data)
    return digest.hexdigest()


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
