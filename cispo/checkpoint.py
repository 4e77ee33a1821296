"""Checkpoints of a run: written whole or not at all, verified before they are used.

    step_000040/
        manifest.json           SHA-256 and size of every other file, written last
        policy/                 config.json, model.safetensors, tokenizer: a policy folder in Hugging Face layout
        learner-*.safetensors   masters, moments, counters, as `cispo.hashed_files` cuts them
        loop.json               whatever else the loop needs to go on
    best.json                   the step whose checkpoint is kept for being the best, where one is

A checkpoint is written into a hidden folder beside its place, made durable, and renamed. A kill at any moment leaves
the checkpoints that were there and perhaps a hidden folder, which the next save removes.

In checkpoints of format 1, which are read but not written any more, learner.safetensors is the learner's one file.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cispo.errors import CheckpointError
from cispo.hashed_files import Fingerprint, HashedFolder, first_damage, read_tensors, tensor_files
from cispo.model.checkpoint import save_policy
from cispo.model.decoder import Decoder
from cispo.model.tokenizer import Tokenizer

MANIFEST, POLICY, LEARNER, LOOP = "manifest.json", "policy", "learner", "loop.json"
BEST = "best.json"
FORMAT = 2
ONE_FILE_FORMAT = 1
_STEP_NAME = re.compile(r"step_(\d+)")
_HIDDEN_NAME = re.compile(r"\.step_\d+\.(writing|removing)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    step: int
    loop_state: Mapping[str, Any]
    learner_files: tuple[str, ...]

    @property
    def policy_path(self) -> Path:
        """The policy folder, for `load_policy` and `Tokenizer.load`."""
        return self.path / POLICY

    @property
    def learner_state(self) -> dict[str, Tensor]:
        """What was given when it was saved, read from the files, on the CPU."""
        return read_tensors([self.path / name for name in self.learner_files])


def save_checkpoint(
    path: Path,
    *,
    decoder: Decoder,
    tokenizer: Tokenizer,
    learner_state: Mapping[str, Tensor],
    loop_state: Mapping[str, Any],
    keep: int,
) -> None:
    """Write the checkpoint `path` as `write_checkpoint` does, then remove all but the `keep` newest and the best."""

    def write_policy(folder: Path) -> None:
        save_policy(decoder, folder)
        tokenizer.save(folder)

    write_checkpoint(path, write_policy=write_policy, learner_state=learner_state, loop_state=loop_state)
    prune_checkpoints(path.parent, keep=keep)


def write_checkpoint(
    path: Path,
    *,
    write_policy: Callable[[Path], None],
    learner_state: Mapping[str, Tensor],
    loop_state: Mapping[str, Any],
) -> None:
    """Write the checkpoint `path`, whose name is `step_` and a number; one that is there already is replaced.

    write_policy fills an empty folder with a policy and its tokenizer, while threads write the learner's state.
    loop_state must be JSON. Hidden folders that a killed write left beside it are removed.
    """
    _step_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    draft = path.with_name(f".{path.name}.writing")
    (draft / POLICY).mkdir(parents=True)
    (draft / LOOP).write_text(json.dumps(loop_state, allow_nan=False) + "\n", encoding="utf-8")
    with HashedFolder(draft) as folder:
        folder.start_file(LOOP)
        folder.start_tensors(LEARNER, learner_state)
        write_policy(draft / POLICY)
        for file in (draft / POLICY).rglob("*"):
            if file.is_file():
                folder.start_file(str(file.relative_to(draft)))
        files = {name: asdict(fingerprint) for name, fingerprint in folder.fingerprints().items()}
    manifest = {"format": FORMAT, "step": _step_of(path), "files": files}
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for name in (MANIFEST, POLICY, "."):
        _sync(draft / name)
    if path.exists():
        _remove(path)
    draft.rename(path)
    _sync(path.parent)


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint, every byte of it.

    Raises CheckpointError that names what is damaged and the newest good checkpoint before it, if there is one.
    """
    damage, learner_files = _verify(path)
    if damage:
        good = newest_good_checkpoint(path.parent, before=_step_of(path))
        if good:
            advice = f"the newest good one before it is {good.name}: remove {path} to resume from there"
        else:
            advice = "there is no good one before it: start the run again under another name"
        raise CheckpointError(f"checkpoint {path} is damaged: {damage}; {advice}")
    loop_state = json.loads((path / LOOP).read_text(encoding="utf-8"))
    return Checkpoint(path=path, step=_step_of(path), loop_state=loop_state, learner_files=learner_files)


def load_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a folder, verified as by `load_checkpoint`; None where there is none."""
    paths = list_checkpoints(folder)
    return load_checkpoint(paths[-1]) if paths else None


def newest_good_checkpoint(folder: Path, *, before: int) -> Path | None:
    """The newest checkpoint of an earlier step that passes verification."""
    earlier = [path for path in list_checkpoints(folder) if _step_of(path) < before]
    return next((path for path in reversed(earlier) if not _verify(path)[0]), None)


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a folder by step, verified or not."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name)), key=_step_of)


def prune_checkpoints(folder: Path, *, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the best one, where `keep_best` named it."""
    best = best_checkpoint(folder)
    for path in list_checkpoints(folder)[:-keep]:
        if path != best:
            _remove(path)


def keep_best(folder: Path, measured: Iterable[Mapping[str, Any]], metric: str) -> None:
    """Of the checkpoints there are, keep from now on the one where `metric` was highest; the earliest of equal ones.

    measured: rows of the run's metrics, with their `step`. To be called before each save, as saving removes others.
    """
    there = {_step_of(path) for path in list_checkpoints(folder)}
    step = best_step((row for row in measured if row["step"] in there), metric)
    if step is not None:
        draft = folder / f".{BEST}"
        draft.write_text(json.dumps({"step": step, "metric": metric}) + "\n", encoding="utf-8")
        _sync(draft)
        draft.replace(folder / BEST)


def best_step(measured: Iterable[Mapping[str, Any]], metric: str) -> int | None:
    """The step of the row in which a metric is highest, the earliest of equal ones; None where no row has it."""
    values = {int(row["step"]): row[metric] for row in measured if row.get(metric) is not None}
    return max(values, key=lambda step: (values[step], -step), default=None)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `keep_best` chose last; None where none was chosen or it is gone."""
    file = folder / BEST
    if not file.is_file():
        return None
    try:
        step = json.loads(file.read_text(encoding="utf-8"))["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); remove it, then resume the run") from error
    return next((path for path in list_checkpoints(folder) if _step_of(path) == step), None)


def _step_of(path: Path) -> int:
    match = _STEP_NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is no checkpoint; its name must be step_ and a number, such as step_000040")
    return int(match[1])


def _verify(path: Path) -> tuple[str, tuple[str, ...]]:
    """What is wrong with a checkpoint, empty when it is whole, and the names of the learner's files."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, step, version = manifest["files"], manifest["step"], manifest["format"]
        expected = {name: Fingerprint(entry["sha256"], int(entry["bytes"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing", ()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})", ()
    if version not in (ONE_FILE_FORMAT, FORMAT):
        return f"{MANIFEST} has format {version}, this version reads {ONE_FILE_FORMAT} and {FORMAT}", ()
    if step != _step_of(path):
        return f"{MANIFEST} is of step {step}", ()
    learner_files = [f"{LEARNER}.safetensors"] if version == ONE_FILE_FORMAT else tensor_files(LEARNER, expected)
    absent = {*learner_files, LOOP} - expected.keys()
    if absent:
        return f"{MANIFEST} does not name {min(absent)}", ()
    return first_damage(path, expected), tuple(learner_files)


def _remove(path: Path) -> None:
    """Hide it first: what is being removed must never look like a damaged checkpoint."""
    hidden = path.with_name(f".{path.name}.removing")
    if hidden.exists():
        shutil.rmtree(hidden)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if _HIDDEN_NAME.fullmatch(path.name):
            shutil.rmtree(path)


def _sync(path: Path) -> None:
    with _opened(path) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
