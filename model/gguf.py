"""Reading a GGUF file: its metadata, and its tensors as float32, without any library of its makers.

The layout is version 3 of ggml's specification: a header, key-value pairs, one record a tensor, then the tensors' bytes
at offsets from an aligned start. Of the quantised kinds there are those in blocks of 32 weights that small models come
in: Q4_0, Q4_1 and Q8_0.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cispo.errors import CheckpointError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
BLOCK = 32
"""Weights of one quantised block."""
STRING, ARRAY = 8, 9
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""struct's format of each kind of number."""

Bytes = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a tensor's weights are stored: `weights` of them in `size_bytes`."""

    name: str
    weights: int
    size_bytes: int
    decode: Callable[[Bytes], Float32Array]
    """Blocks, one a row, to their weights, one block a row."""


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata of a file, and where its tensors lie; `tensors` reads them."""

    path: Path
    metadata: dict[str, Any]
    records: tuple[tuple[str, tuple[int, ...], Kind, int], ...]
    """Name, shape, kind, and the place of the first byte in the file."""

    def tensors(self) -> Iterator[tuple[str, Float32Array]]:
        """Every tensor, in the file's order, in float32; its last axis is the one that lies together."""
        data = np.memmap(self.path, dtype=np.uint8, mode="r")
        for name, shape, kind, start in self.records:
            size = prod(shape) // kind.weights * kind.size_bytes
            if start + size > len(data):
                raise CheckpointError(f"{self.path} ends within the tensor {name}; fetch the file anew")
            yield name, kind.decode(np.asarray(data[start : start + size]).reshape(-1, kind.size_bytes)).reshape(shape)


def read_gguf(path: Path) -> GgufFile:
    """The metadata and the list of tensors. CheckpointError where it is none, or holds what is not read."""
    with path.open("rb") as stream:
        try:
            return _read(path, stream)
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            what = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path} is damaged ({what}); fetch the file anew") from error


def _read(path: Path, stream: BinaryIO) -> GgufFile:
    if stream.read(4) != MAGIC:
        raise CheckpointError(f"{path} is no GGUF file; name one that ends in .gguf")
    version = _number(stream, "<I")
    if version != VERSION:
        raise CheckpointError(f"{path} is GGUF of version {version}; version {VERSION} is read")
    tensors, pairs = _number(stream, "<Q"), _number(stream, "<Q")
    metadata = {_text(stream): _value(stream, _number(stream, "<I")) for _ in range(pairs)}
    records = [_record(path, stream) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    start = -(-stream.tell() // alignment) * alignment
    return GgufFile(path, metadata, tuple((name, shape, kind, start + at) for name, shape, kind, at in records))


def _record(path: Path, stream: BinaryIO) -> tuple[str, tuple[int, ...], Kind, int]:
    name = _text(stream)
    # Sizes are written from the innermost axis outwards.
    shape = tuple(_number(stream, "<Q") for _ in range(_number(stream, "<I")))[::-1]
    code, offset = _number(stream, "<I"), _number(stream, "<Q")
    if code not in KINDS:
        known = ", ".join(kind.name for kind in KINDS.values())
        raise CheckpointError(f"{path}: the tensor {name} is stored as ggml type {code}; those read are {known}")
    kind = KINDS[code]
    if not shape or shape[-1] % kind.weights:
        raise CheckpointError(f"{path}: the tensor {name} of shape {shape} is not made of blocks of {kind.weights}")
    return name, shape, kind, offset


def _value(stream: BinaryIO, code: int) -> Any:
    if code == STRING:
        return _text(stream)
    if code == ARRAY:
        inner, count = _number(stream, "<I"), _number(stream, "<Q")
        return [_value(stream, inner) for _ in range(count)]
    return _number(stream, NUMBERS[code])


def _number(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(form, stream.read(struct.calcsize(form)))[0]


def _text(stream: BinaryIO) -> str:
    size = _number(stream, "<Q")
    data = stream.read(size)
    if len(data) != size:
        raise struct.error("a text is cut off")
    return data.decode()


def _half(blocks: Bytes, at: int) -> Float32Array:
    """The float16 at byte `at` of each block, as a column."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _nibbles(blocks: Bytes, at: int) -> Float32Array:
    """16 bytes from `at` on as 32 numbers of 4 bits: the lower halves, then the upper ones."""
    packed = blocks[:, at : at + BLOCK // 2]
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _decode_q4_0(blocks: Bytes) -> Float32Array:
    return _half(blocks, 0) * (_nibbles(blocks, 2) - np.float32(8))


def _decode_q4_1(blocks: Bytes) -> Float32Array:
    return _half(blocks, 0) * _nibbles(blocks, 4) + _half(blocks, 2)


def _decode_q8_0(blocks: Bytes) -> Float32Array:
    return _half(blocks, 0) * blocks[:, 2:].copy().view(np.int8).astype(np.float32)


def _decode_f16(blocks: Bytes) -> Float32Array:
    return _half(blocks, 0)


def _decode_f32(blocks: Bytes) -> Float32Array:
    return blocks.copy().view("<f4").astype(np.float32)


KINDS = {
    0: Kind("F32", 1, 4, _decode_f32),
    1: Kind("F16", 1, 2, _decode_f16),
    2: Kind("Q4_0", BLOCK, 18, _decode_q4_0),
    3: Kind("Q4_1", BLOCK, 20, _decode_q4_1),
    8: Kind("Q8_0", BLOCK, 34, _decode_q8_0),
}
"""By ggml's number of the type."""
