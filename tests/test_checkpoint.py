import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cispo import hashed_files
from cispo.checkpoint import (
    best_checkpoint,
    best_step,
    keep_best,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from cispo.errors import CheckpointError

STATE = {"updates": torch.tensor(3), "master/a": torch.arange(600, dtype=torch.float32), "b": torch.ones(2, 2).t()}


@pytest.fixture
def several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size that the state has two of."""
    monkeypatch.setattr(hashed_files, "FILE_BYTES", 2420)


def write_policy(path: Path) -> None:
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 40)


def save(folder: Path, step: int, state: dict[str, Tensor] = STATE) -> Path:
    path = folder / f"step_{step:06d}"
    write_checkpoint(path, write_policy=write_policy, learner_state=state, loop_state={"step": step, "cursor": [1, 2]})
    return path


def save_in_one_file(folder: Path, step: int) -> Path:
    """A checkpoint of format 1, as it was written before the learner's state had several files."""
    path = folder / f"step_{step:06d}"
    (path / "policy").mkdir(parents=True)
    write_policy(path / "policy")
    save_file({name: tensor.contiguous() for name, tensor in STATE.items()}, path / "learner.safetensors")
    (path / "loop.json").write_text(json.dumps({"step": step, "cursor": [1, 2]}) + "\n")
    files = {
        str(file.relative_to(path)): {
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "bytes": file.stat().st_size,
        }
        for file in files_of(path)
    }
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}, indent=1) + "\n")
    return path


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("write", [save, save_in_one_file])
def test_what_was_saved_is_loaded(tmp_path: Path, write: Callable[[Path, int], Path]) -> None:
    path = write(tmp_path, 40)
    checkpoint = load_checkpoint(path)
    assert (checkpoint.step, checkpoint.loop_state) == (40, {"step": 40, "cursor": [1, 2]})
    assert (checkpoint.policy_path / "config.json").read_text() == "{}"
    state = checkpoint.learner_state
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
    assert [file.name for file in tmp_path.iterdir()] == ["step_000040"]


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = save(tmp_path, 3, {"updates": torch.tensor(4)})
    assert load_checkpoint(path).learner_state.keys() == {"updates"}


def test_the_newest_is_loaded_and_the_oldest_pruned(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 100, 1_000_000):
        save(tmp_path, step)
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 1_000_000
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000100", "step_1000000"]
    prune_checkpoints(tmp_path, keep=5)
    assert len(list_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "loop.json", "learner-00001-of-00002.safetensors", "learner-00002-of-00002.safetensors",
     "policy/model.safetensors"],
)  # fmt: skip
def test_a_truncated_or_missing_file_is_named_and_the_good_one_before_it_offered(
    tmp_path: Path, name: str, several_files: None
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = save(tmp_path, 3)
    (tmp_path / "step_000002" / "loop.json").unlink()
    content = (path / name).read_bytes()
    for shorter in (content[:-1], content[: len(content) // 2], b"", None):
        (path / name).unlink()
        if shorter is not None:
            (path / name).write_bytes(shorter)
        if name == "manifest.json" and shorter == content[:-1]:
            continue  # only the final newline is gone: nothing is lost
        with pytest.raises(
            CheckpointError, match=rf"step_000003 is damaged: .*{name}.*good one before it is step_000001"
        ):
            load_newest_checkpoint(tmp_path)
        (path / name).write_bytes(content)
    load_checkpoint(path)


@pytest.mark.parametrize("write", [save, save_in_one_file])
def test_any_flipped_bit_is_noticed(tmp_path: Path, write: Callable[[Path, int], Path], several_files: None) -> None:
    path = write(tmp_path, 7)
    rng = random.Random(0)
    for file in files_of(path):
        content = file.read_bytes()
        for _ in range(60):
            flipped = bytearray(content)
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError, match="step_000007 is damaged"):
                load_checkpoint(path)
        file.write_bytes(content)
    load_checkpoint(path)


def test_without_an_earlier_checkpoint_a_new_run_is_the_advice(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "learner-00001-of-00001.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no good one before it"):
        load_checkpoint(path)


def test_a_renamed_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 4).rename(tmp_path / "step_000005")
    with pytest.raises(CheckpointError, match=r"manifest\.json is of step 4"):
        load_checkpoint(tmp_path / "step_000005")
    with pytest.raises(CheckpointError, match="must be step_ and a number"):
        write_checkpoint(tmp_path / "best", write_policy=write_policy, learner_state={}, loop_state={})
    manifest = tmp_path / "step_000005" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": 5, "format": 3}))
    with pytest.raises(CheckpointError, match="format 3, this version reads 1 and 2"):
        load_checkpoint(tmp_path / "step_000005")


def test_a_manifest_must_name_every_file_of_the_learner(tmp_path: Path, several_files: None) -> None:
    for path, name in (
        (save(tmp_path, 1), "learner-00002-of-00002.safetensors"),
        (save_in_one_file(tmp_path, 2), "learner.safetensors"),
    ):
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["files"][name]
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=rf"manifest\.json does not name {name}"):
            load_checkpoint(path)


def test_a_run_of_one_file_goes_on_in_several(tmp_path: Path, several_files: None) -> None:
    state = load_checkpoint(save_in_one_file(tmp_path, 3)).learner_state
    path = save(tmp_path, 4, state)
    prune_checkpoints(tmp_path, keep=1)
    again = load_checkpoint(path).learner_state
    assert again.keys() == STATE.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in STATE.items())
    assert [file.name for file in files_of(path)][:2] == [
        "learner-00001-of-00002.safetensors",
        "learner-00002-of-00002.safetensors",
    ]


def test_a_failing_write_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def fail(path: Path) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path / "step_000001", write_policy=fail, learner_state=STATE, loop_state={})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_checkpoint(
            tmp_path / "step_000002", write_policy=write_policy, learner_state=STATE, loop_state={"x": float("nan")}
        )
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None and newest.step == 1
    save(tmp_path, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_000001", "step_000002"]


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from cispo import hashed_files
from cispo.checkpoint import list_checkpoints, load_checkpoint, prune_checkpoints, write_checkpoint

hashed_files.FILE_BYTES = 30_000

def write_policy(path):
    with (path / "model.safetensors").open("wb") as file:
        for part in range(4):
            file.write(bytes([part]) * 20_000)
            file.flush()
            time.sleep(0.0005)

def write_for_ever(folder, step, done):
    while True:
        path = folder / f"step_{step:06d}"
        state = {name: torch.full((5_000,), float(step)) for name in ("first", "second", "third", "fourth")}
        write_checkpoint(path, write_policy=write_policy, learner_state=state, loop_state={"step": step})
        prune_checkpoints(folder, keep=2)
        os.write(done, b"x")
        step += 1

folder, rng, step = Path(sys.argv[1]), random.Random(0), 0
for _ in range(25):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        write_for_ever(folder, step + 1, writer)
    os.close(writer)
    reported = len(os.read(reader, 1))
    time.sleep(rng.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 4096):
        reported += len(more)
    os.close(reader)
    checkpoints = [load_checkpoint(path) for path in list_checkpoints(folder)]
    for checkpoint in checkpoints:
        assert len(checkpoint.learner_files) == 4 and checkpoint.loop_state["step"] == checkpoint.step
        assert all((tensor == checkpoint.step).all() for tensor in checkpoint.learner_state.values())
    newest = checkpoints[-1].step
    assert newest - step - reported in (0, 1), "what was reported as saved is there"
    step = newest
print(step)
"""


def test_a_kill_at_any_moment_leaves_good_checkpoints_only(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, check=False)
    assert killed.returncode == 0, killed.stderr
    save(tmp_path, int(killed.stdout) + 1)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_the_best_checkpoint_outlives_the_newest(tmp_path: Path) -> None:
    rows = [{"step": 0}, {"step": 1, "a": 0.5}, {"step": 2, "a": None}, {"step": 3, "a": 0.5}, {"step": 4, "a": 0.1}]
    for step in range(5):
        keep_best(tmp_path, rows, "a")
        save(tmp_path, step)
        prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000001", "step_000004"]
    assert best_checkpoint(tmp_path) == tmp_path / "step_000001"
    keep_best(tmp_path, [*rows, {"step": 4, "a": 0.9}], "a")
    save(tmp_path, 5)
    prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000004", "step_000005"]


def test_the_best_is_among_those_measured(tmp_path: Path) -> None:
    assert best_step([], "a") is None and best_step([{"step": 1, "b": 2.0}], "a") is None
    assert best_checkpoint(tmp_path) is None
    save(tmp_path, 1)
    keep_best(tmp_path, [{"step": 2, "a": 1.0}], "a")
    assert best_checkpoint(tmp_path) is None, "the best step has no checkpoint"
    (tmp_path / "best.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        prune_checkpoints(tmp_path, keep=1)
