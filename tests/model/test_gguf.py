"""Reading GGUF files that the test writes: metadata, kinds of weights, and one-line errors for what is no such file."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cispo.errors import CheckpointError
from cispo.model.gguf import read_gguf

Tensor = tuple[str, tuple[int, ...], int, bytes]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(value: Any) -> bytes:
    """A value with the number of its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list):
        inner = [field(item) for item in value]
        return struct.pack("<IIQ", 9, *struct.unpack("<I", inner[0][:4]), len(value)) + b"".join(x[4:] for x in inner)
    return struct.pack("<IB", 7, value) if isinstance(value, bool) else struct.pack("<Ii", 5, value)


def gguf_bytes(metadata: dict[str, Any], tensors: list[Tensor]) -> bytes:
    """A file as the specification has it; shapes are given outermost first, as in PyTorch."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + field(value) for key, value in metadata.items())
    data = b""
    for name, shape, kind, content in tensors:
        data += bytes(-len(data) % 32)
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += text(name) + sizes + struct.pack("<IQ", kind, len(data))
        data += content
    return head + bytes(-len(head) % 32) + data


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_bytes(content: bytes) -> Path:
        (tmp_path / "x.gguf").write_bytes(content)
        return tmp_path / "x.gguf"

    return write_bytes


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


def test_metadata_of_every_kind(write: Callable[[bytes], Path]) -> None:
    metadata = {"name": "é", "rate": 0.5, "count": -3, "flag": True, "words": ["a", "bc"], "ids": [1, 2, 3]}
    assert read_gguf(write(gguf_bytes(metadata, []))).metadata == metadata


def test_weights_of_every_kind(write: Callable[[bytes], Path]) -> None:
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    nibbles = bytes(low | (15 - low) << 4 for low in range(16))
    counted = np.array([*range(16), *range(15, -1, -1)], dtype=np.float32)
    signed = np.arange(-16, 16, dtype=np.int8)
    tensors: list[Tensor] = [
        ("f32", (2, 3), 0, plain.tobytes()),
        ("f16", (3, 2), 1, plain.astype(np.float16).tobytes()),
        ("q4_0", (1, 32), 2, half(0.5) + nibbles),
        ("q4_1", (2, 32), 3, half(0.5) + half(-1.0) + nibbles + half(2.0) + half(0.25) + nibbles),
        ("q8_0", (32,), 8, half(0.125) + signed.tobytes()),
    ]
    read = dict(read_gguf(write(gguf_bytes({"a": 1}, tensors))).tensors())
    np.testing.assert_array_equal(read["f32"], plain)
    np.testing.assert_array_equal(read["f16"], plain.reshape(3, 2))
    np.testing.assert_array_equal(read["q4_0"], (counted - 8)[None] * 0.5)
    np.testing.assert_array_equal(read["q4_1"], np.stack([counted * 0.5 - 1, counted * 2 + 0.25]))
    np.testing.assert_array_equal(read["q8_0"], signed * np.float32(0.125))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK..", "is no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 2, 0, 0), "is GGUF of version 2; version 3 is read"),
        (gguf_bytes({"name": "x" * 50}, [])[:60], "is damaged"),
        (gguf_bytes({}, [("w", (32,), 14, bytes(64))]), "the tensor w is stored as ggml type 14"),
        (gguf_bytes({}, [("w", (2, 16), 8, bytes(34))]), "is not made of blocks of 32"),
    ],
)
def test_what_cannot_be_read(write: Callable[[bytes], Path], content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_gguf(write(content))


def test_a_file_that_ends_within_a_tensor(write: Callable[[bytes], Path]) -> None:
    source = read_gguf(write(gguf_bytes({}, [("w", (32,), 8, bytes(20))])))
    with pytest.raises(CheckpointError, match="ends within the tensor w"):
        list(source.tensors())
