"""Tensors and files that threads write and check: the same bytes for any number of threads, and no damage unseen."""

import hashlib
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from cispo import hashed_files
from cispo.hashed_files import Fingerprint, HashedFolder, first_damage, read_tensors, tensor_files


def mixed_tensors() -> dict[str, Tensor]:
    """Of every kind: large and small, empty, without dims, not contiguous, in need of a gradient, two of one memory."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(700, 3, generator=generator)
    return {
        "master/large": large,
        "master/turned": large.t(),
        "master/parameter": torch.nn.Parameter(torch.randn(30, 30, generator=generator)),
        "moment/half": torch.randn(333, generator=generator).bfloat16(),
        "moment/ünï": torch.randn(5, 7, generator=generator).double(),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 4),
        "updates": torch.tensor(17),
    }


def write(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Fingerprint]:
    with HashedFolder(folder) as hashed:
        hashed.start_tensors("state", tensors)
        return hashed.fingerprints()


def read(folder: Path, fingerprints: dict[str, Fingerprint]) -> dict[str, Tensor]:
    assert first_damage(folder, fingerprints) == ""
    names = tensor_files("state", fingerprints)
    assert names == sorted(fingerprints)
    return read_tensors([folder / name for name in names])


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype is tensor.dtype and actual[name].device.type == "cpu"
        assert torch.equal(actual[name], tensor.detach().cpu())


@pytest.mark.parametrize("file_bytes", [1, 4000, 1 << 30])
@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_what_was_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int, block_bytes: int
) -> None:
    monkeypatch.setattr(hashed_files, "FILE_BYTES", file_bytes)
    monkeypatch.setattr(hashed_files, "BLOCK_BYTES", block_bytes)
    tensors = mixed_tensors()
    fingerprints = write(tmp_path, tensors)
    assert len(fingerprints) == {1: 8, 4000: 5, 1 << 30: 1}[file_bytes]
    for name, fingerprint in fingerprints.items():
        content = (tmp_path / name).read_bytes()
        assert fingerprint == Fingerprint(hashlib.sha256(content).hexdigest(), len(content))
    assert_same(read(tmp_path, fingerprints), tensors)


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    fingerprints = write(tmp_path, {})
    assert list(fingerprints) == ["state-00001-of-00001.safetensors"]
    assert read(tmp_path, fingerprints) == {}


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(7), "updates": torch.tensor(3), "ü/half": torch.ones(3).bfloat16(),
    }  # fmt: skip
    write(tmp_path, tensors)
    assert (tmp_path / "state-00001-of-00001.safetensors").read_bytes() == save(tensors)


def test_files_are_cut_by_the_order_of_names_and_a_large_tensor_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashed_files, "FILE_BYTES", 400)
    sizes = {"c": 101, "a": 50, "e": 60, "b": 50, "d": 40, "f": 1}
    tensors = {name: torch.full((size,), float(size)) for name, size in sizes.items()}
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    fingerprints = write(tmp_path / "one", tensors)
    held = [set(load_file(tmp_path / "one" / name)) for name in fingerprints]
    assert held == [{"a", "b"}, {"c"}, {"d", "e"}, {"f"}]
    monkeypatch.setattr(hashed_files, "MAX_THREADS", 1)
    assert write(tmp_path / "other", dict(reversed(tensors.items()))) == fingerprints


def test_files_are_written_at_the_same_time_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_files, "FILE_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    together = threading.Barrier(3, timeout=30)
    synced: set[int] = set()
    fsync = os.fsync

    def meet(descriptor: int) -> None:
        together.wait()
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", meet)
    write(tmp_path, {name: torch.ones(9) for name in "abcdef"})
    assert synced == {file.stat().st_ino for file in tmp_path.iterdir()} and len(synced) == 6


def test_files_of_others_are_hashed_beside_the_tensors(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    with HashedFolder(tmp_path) as hashed:
        hashed.start_tensors("state", mixed_tensors())
        (tmp_path / "policy" / "weights").write_bytes(b"abc")
        hashed.start_file("policy/weights")
        fingerprints = hashed.fingerprints()
    assert list(fingerprints) == ["policy/weights", "state-00001-of-00001.safetensors"]
    assert fingerprints["policy/weights"] == Fingerprint(hashlib.sha256(b"abc").hexdigest(), 3)


def test_what_goes_wrong_in_a_thread_is_raised_and_nothing_is_begun_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashed_files, "FILE_BYTES", 1)
    monkeypatch.setattr(hashed_files, "MAX_THREADS", 1)
    going_on = threading.Event()

    def full(descriptor: int) -> None:
        assert going_on.wait(30)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), HashedFolder(tmp_path) as hashed:
        hashed.start_tensors("state", {"a": torch.ones(9)})
        going_on.set()
        hashed.fingerprints()
    going_on.clear()
    with pytest.raises(KeyError, match="meanwhile"), HashedFolder(tmp_path) as hashed:
        hashed.start_tensors("others", {name: torch.ones(9) for name in "abcdefgh"})
        threading.Timer(0.2, going_on.set).start()
        raise KeyError("meanwhile")
    assert len(list(tmp_path.glob("others-*"))) <= 1
    with pytest.raises(ValueError, match=r"torch\.complex64 is not stored"), HashedFolder(tmp_path) as hashed:
        hashed.start_tensors("state", {"a": torch.ones(9, dtype=torch.complex64)})


def test_damage_is_told_of_the_first_file_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_files, "FILE_BYTES", 1)
    fingerprints = write(tmp_path, {"a": torch.ones(9), "b": torch.ones(900), "c": torch.ones(9)})
    first, second, third = (tmp_path / name for name in fingerprints)
    assert first_damage(tmp_path, fingerprints) == ""
    content = second.read_bytes()
    third.unlink()
    for damaged, told in (
        (content[:-1], f"{second.name} has {len(content) - 1} bytes, not {len(content)}"),
        (content[:-1] + b"!", f"the contents of {second.name} have changed since it was written"),
        (content, f"{third.name} is missing"),
    ):
        second.write_bytes(damaged)
        assert first_damage(tmp_path, fingerprints) == told
    # Without a size, and no read at its beginning succeeds: as a file on a broken disk.
    first.unlink()
    first.symlink_to("/proc/self/mem")
    told = first_damage(tmp_path, {**fingerprints, first.name: Fingerprint("", 0)})
    assert told.startswith(f"{first.name} cannot be read (") and "\n" not in told


def test_the_number_of_files_is_told_by_their_names() -> None:
    second = "state-00002-of-00003.safetensors"
    assert tensor_files("state", ["loop.json", "estate-00001-of-00009.safetensors", second]) == [
        "state-00001-of-00003.safetensors", second, "state-00003-of-00003.safetensors",
    ]  # fmt: skip
    assert tensor_files("state", []) == ["state-00001-of-00001.safetensors"]


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_read_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_files, "FILE_BYTES", 8 << 20)
    generator = torch.Generator().manual_seed(1)
    large = {f"large/{index}": torch.randn(1_500_000 + index, generator=generator) for index in range(12)}
    expected = mixed_tensors() | large
    tensors = {name: tensor.detach().cuda() for name, tensor in expected.items()} | {"updates": expected["updates"]}
    with torch.cuda.stream(torch.cuda.Stream()):
        # Its last values are still being computed when the writing is asked for.
        product = torch.eye(4096, device="cuda")
        for _ in range(50):
            product = product @ product
        tensors["late"] = product
        fingerprints = write(tmp_path, tensors)
    assert len(fingerprints) > 12
    assert_same(read(tmp_path, fingerprints), expected | {"late": torch.eye(4096)})
