"""Files written, hashed and made durable by several threads, and checked by as many; tensors among them.

A set of tensors becomes several safetensors files, because one thread hashes one file no faster than a core can. It is
cut in the order of names wherever a file would pass FILE_BYTES, so equal names and sizes give equal files, whatever the
number of threads. A tensor is never cut: one that is larger has a file of its own.

Beyond the tensors themselves writing takes BLOCK_BYTES of page-locked host memory a thread, 64 MiB in all, and that for
tensors on a device alone: each thread copies its own to the host block by block, while others hash and write. A tensor
that is not contiguous is copied whole, on its device, while it is being written. Checking takes a buffer a thread.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from cispo.model.weight_files import split_names

FILE_BYTES = 256 << 20
BLOCK_BYTES = 4 << 20
MAX_THREADS = 16

_STORED_AS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is recorded of a file: the SHA-256 of its contents, in hexadecimal, and its size."""

    sha256: str
    bytes: int


class HashedFolder:
    """A folder that threads fill, each with a file at a time; the folder itself is for the caller to sync.

    A context manager: once it is left no thread writes any more, and what an error found not begun stays undone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pool = _new_pool()
        self._started: dict[str, Future[Fingerprint]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start_tensors(self, stem: str, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write tensors as the files STEM-00001-of-00002.safetensors and so on; of no tensors, one file.

        They must stay as they are until `fingerprints` has returned. ValueError for a dtype that is not stored.
        """
        for dtype in {tensor.dtype for tensor in tensors.values()} - _STORED_AS.keys():
            raise ValueError(f"{dtype} is not stored; give tensors of {', '.join(map(str, _STORED_AS))}")
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            # The threads copy on streams of their own, which wait for nothing that the caller's has still to do.
            torch.cuda.synchronize(device)
        parts = split_names({name: tensors[name].nbytes for name in sorted(tensors)}, FILE_BYTES)
        for file, names in zip(_names(stem, len(parts)), parts, strict=True):
            part = {name: tensors[name] for name in names}
            self._started[file] = self._pool.submit(_write_tensors, self.path / file, part)

    def start_file(self, name: str) -> None:
        """Begin to hash and sync a file that is there already."""
        self._started[name] = self._pool.submit(_sync_file, self.path / name)

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Of every file by name, in the order of names, once all are durable; the first error that a thread met."""
        return {name: self._started[name].result() for name in sorted(self._started)}


def first_damage(folder: Path, expected: Mapping[str, Fingerprint]) -> str:
    """What is wrong with the first of the files, by name, that is not as it was; empty when all of them are."""
    # The largest first: begun last it would keep one thread busy when all others are done.
    by_size = sorted(expected, key=lambda name: (-expected[name].bytes, name))
    with _new_pool() as pool:
        checks = {name: pool.submit(_damage, folder, name, expected[name]) for name in by_size}
        return next((damage for name in sorted(checks) if (damage := checks[name].result())), "")


def tensor_files(stem: str, names: Iterable[str]) -> list[str]:
    """Every file of a set of tensors, by what the names of those among `names` say of their number; one at least."""
    pattern = re.compile(re.escape(stem) + r"-\d{5,}-of-(\d{5,})\.safetensors")
    counts = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
    return _names(stem, max([1, *counts]))


def read_tensors(files: Collection[Path]) -> dict[str, Tensor]:
    """The tensors of all files, on the CPU, mapped: a page takes memory when it is read, once for all processes.

    No hash is checked: that is for `first_damage`, before.
    """
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _new_pool() -> ThreadPoolExecutor:
    """Threads begin as files come, so there are never more than files."""
    return ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))), "hashed-files")


def _names(stem: str, count: int) -> list[str]:
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> Fingerprint:
    digest, size = hashlib.sha256(), 0
    with file.open("wb") as stream:
        for piece in _pieces(tensors):
            digest.update(piece)
            stream.write(piece)
            size += len(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return Fingerprint(digest.hexdigest(), size)


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file, in blocks that are good until the next is asked for."""
    # As the safetensors library has them: the widest first, so that each begins at a multiple of its item's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    yield memoryview(_header({name: tensors[name] for name in names}))
    staging = None
    if any(tensor.is_cuda for tensor in tensors.values()):
        staging = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    for name in names:
        flat = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
        for block in flat.split(BLOCK_BYTES):
            if staging is not None and block.is_cuda:
                block = staging[: len(block)].copy_(block)
            yield block.numpy().data


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries, start = {}, 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        entries[name] = {
            "dtype": _STORED_AS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
        start = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sync_file(file: Path) -> Fingerprint:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        os.fsync(stream.fileno())
        return Fingerprint(digest.hexdigest(), os.fstat(stream.fileno()).st_size)


def _damage(folder: Path, name: str, expected: Fingerprint) -> str:
    file = folder / name
    if not file.is_file():
        return f"{name} is missing"
    size = file.stat().st_size
    if size != expected.bytes:
        return f"{name} has {size} bytes, not {expected.bytes}"
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return "" if sha256 == expected.sha256 else f"the contents of {name} have changed since it was written"
