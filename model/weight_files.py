"""The safetensors files of a policy folder: which they are, what their headers say, and plain reads. Loads no torch.

Tensors are read by position rather than through a memory map, so loading holds what it loads and nothing else.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cispo.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in its file. dtype: as safetensors names it (F32, BF16, ...). start, end: bytes from 0."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read_into(self, target: memoryview) -> None:
        """Fill `target` with the tensor's bytes; CheckpointError when the file ends early."""
        if target.nbytes != self.end - self.start:
            raise ValueError(f"{self.name} has {self.end - self.start} bytes, the target {target.nbytes}")
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            while target.nbytes:
                count = file.readinto(target)
                if not count:
                    raise CheckpointError(f"{self.file} ends within {self.name}; restore it from its source")
                target = target[count:]


def weight_files(folder: Path) -> list[Path]:
    """The files, which need not exist; CheckpointError for an index that cannot be read."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return [folder / WEIGHTS_NAME]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of weights ({type(error).__name__}: {error}); restore it from its source"
        ) from error


def missing_weights(folder: Path) -> list[str]:
    """Names of the files that are not there."""
    return [file.name for file in weight_files(folder) if not file.is_file()]


def stored_tensors(file: Path) -> Iterator[StoredTensor]:
    """What a file's header lists, in order of position; CheckpointError for a file that is damaged."""
    try:
        with file.open("rb") as opened:
            header, first = _header(opened)
        size = file.stat().st_size
        found = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape = tuple(int(length) for length in entry["shape"])
            found.append(StoredTensor(file, name, str(entry["dtype"]), shape, first + int(begin), first + int(end)))
        found.sort(key=lambda tensor: tensor.start)
        for tensor in found:
            if not first <= tensor.start <= tensor.end <= size:
                raise ValueError(f"{tensor.name} lies at bytes {tensor.start} to {tensor.end} of {size}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); restore it from its source") from error
    yield from found


def split_names(sizes_bytes: Mapping[str, int], limit_bytes: int) -> list[list[str]]:
    """Names of tensors in their order, a list for each file, cut where the next would go over the limit.

    One list at least; a tensor over the limit has one of its own.
    """
    files: list[list[str]] = [[]]
    room = limit_bytes
    for name, size in sizes_bytes.items():
        if size > room and files[-1]:
            files.append([])
            room = limit_bytes
        files[-1].append(name)
        room -= size
    return files


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the data begins."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes")
    text = file.read(length)
    if len(text) < length:
        raise ValueError(f"it ends within its header of {length} bytes")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError(f"its header holds {type(header).__name__}")
    return header, 8 + length
