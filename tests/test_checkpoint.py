import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cispo.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from cispo.errors import CheckpointError

STATE = {"updates": torch.tensor(3), "master/a": torch.arange(600, dtype=torch.float32), "b": torch.ones(2, 2).t()}


def write_policy(path: Path) -> None:
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 40)


def save(folder: Path, step: int, state: dict[str, Tensor] = STATE) -> Path:
    path = folder / f"step_{step:06d}"
    write_checkpoint(path, write_policy=write_policy, learner_state=state, loop_state={"step": step, "cursor": [1, 2]})
    return path


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 40)
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


@pytest.mark.parametrize("name", ["manifest.json", "loop.json", "learner.safetensors", "policy/model.safetensors"])
def test_a_truncated_or_missing_file_is_named_and_the_good_one_before_it_offered(tmp_path: Path, name: str) -> None:
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


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
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
    (path / "learner.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no good one before it"):
        load_checkpoint(path)


def test_a_renamed_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 4).rename(tmp_path / "step_000005")
    with pytest.raises(CheckpointError, match=r"manifest\.json is of step 4"):
        load_checkpoint(tmp_path / "step_000005")
    with pytest.raises(CheckpointError, match="must be step_ and a number"):
        write_checkpoint(tmp_path / "best", write_policy=write_policy, learner_state={}, loop_state={})
    manifest = tmp_path / "step_000005" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": 5, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2"):
        load_checkpoint(tmp_path / "step_000005")


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


WRITER = """
import sys, time, torch
from pathlib import Path
from cispo.checkpoint import prune_checkpoints, write_checkpoint

def write_policy(path):
    with (path / "model.safetensors").open("wb") as file:
        for part in range(8):
            file.write(bytes([part]) * 50_000)
            file.flush()
            time.sleep(0.0005)

folder = Path(sys.argv[1])
for step in range(int(sys.argv[2]), 10_000):
    state = {"step": torch.full((100_000,), float(step))}
    path = folder / f"step_{step:06d}"
    write_checkpoint(path, write_policy=write_policy, learner_state=state, loop_state={"s": step})
    prune_checkpoints(folder, keep=2)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_good_checkpoints_only(tmp_path: Path) -> None:
    rng = random.Random(1)
    done = 0
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(done + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True) as writer:
            assert writer.stdout is not None
            done = int(writer.stdout.readline())
            time.sleep(rng.uniform(0.0, 0.05))
            os.killpg(writer.pid, signal.SIGKILL)
            reported = [int(line) for line in writer.stdout.read().split()]
        done = max([done, *reported])
        paths = list_checkpoints(tmp_path)
        for path in paths:
            checkpoint = load_checkpoint(path)
            assert float(checkpoint.learner_state["step"][-1]) == checkpoint.loop_state["s"] == checkpoint.step
        newest = load_checkpoint(paths[-1]).step
        assert newest in (done, done + 1), "what was reported as saved is there"
        done = newest
    save(tmp_path, done + 1)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
