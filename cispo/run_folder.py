"""A run is a folder: its recipe, its metrics, its rollouts and its checkpoints, and everything shown is a view of it.

    recipe.yaml                     every setting as the run used it
    metrics.jsonl                   one JSON object a step, "step" first
    rollouts/step_000042.jsonl      one JSON object a completion
    checkpoints/step_000040/        written by `cispo.checkpoint`
    log.txt

A name is taken once: a folder that exists is only ever opened again to resume it. One process writes at a time, which a
file lock ensures that ends with the process, however it ends. Whole files appear by rename, so a kill leaves the old or
the new one; a kill in the middle of a metrics line leaves a torn last line, which resuming removes.
"""

import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml
from pydantic import BaseModel

from cispo.durable_files import (
    DRAFT_SUFFIX,
    append_line,
    drop_torn_line,
    last_line,
    read_lines,
    sync_folder,
    write_atomically,
)
from cispo.errors import RunFolderError
from cispo.types import Rollout, Score, ScoredGroup

RECIPE, METRICS, LOG, LOCK = "recipe.yaml", "metrics.jsonl", "log.txt", ".lock"
SCHEDULE, QUARANTINE = "schedule.jsonl", "quarantine.json"
STEP_NAME = re.compile(r"step_(\d+)(\.jsonl|\.npz)?")
MAY_CHANGE = frozenset({"steps", "checkpoint", "logging", "resources", "ray", "base_path"})
"""Top-level settings that may differ when a run is resumed: they say how long and where, not what is computed.

`steps` only while the learning rate is constant."""


class RunFolder:
    """The folder of one run, held by this process until `close` or its end."""

    def __init__(self, path: Path, lock: TextIO) -> None:
        """Use `create` or `open_for_resume`."""
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, path: Path, recipe: BaseModel) -> "RunFolder":
        """Make the folder with its resolved recipe, or raise RunFolderError if the name is taken.

        Of two processes that create the same name at once, one gets it.
        """
        path = Path(os.path.abspath(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The folder appears by rename with its recipe inside, so no run folder is ever half made.
            draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        except OSError as error:
            raise RunFolderError(f"cannot create the run folder {path} ({error}); choose another place") from error
        lock = _lock(draft, path)
        try:
            draft.chmod(0o755)
            (draft / "rollouts").mkdir()
            (draft / "checkpoints").mkdir()
            write_atomically(draft / RECIPE, resolved_yaml(recipe))
            (draft / METRICS).touch()
            draft.rename(path)
        except OSError as error:
            lock.close()
            shutil.rmtree(draft, ignore_errors=True)
            if not path.exists():
                raise RunFolderError(f"cannot create the run folder {path} ({error}); choose another place") from error
            raise RunFolderError(
                f"the run folder {path} exists already; choose another name with --name, or continue it with --resume"
            ) from error
        sync_folder(path.parent)
        return cls(path, lock)

    @classmethod
    def open_for_resume(cls, path: Path, recipe: BaseModel) -> "RunFolder":
        """Open the folder of an interrupted run, and drop a metrics line that a kill tore.

        Raises RunFolderError if there is no such run, if another process writes it, or if `recipe` differs from the
        run's in a setting outside MAY_CHANGE. The recipe stored is replaced by this one.
        """
        path = Path(os.path.abspath(path))
        if not (path / RECIPE).is_file():
            raise RunFolderError(f"there is no run to resume at {path}; start it without --resume")
        lock = _lock(path, path)
        try:
            _refuse_another_recipe(path, recipe)
            write_atomically(path / RECIPE, resolved_yaml(recipe))
            (path / METRICS).touch()
            for lines in (path / METRICS, path / SCHEDULE):
                if lines.exists():
                    drop_torn_line(lines)
        except BaseException:
            lock.close()
            raise
        return cls(path, lock)

    @property
    def log_path(self) -> Path:
        return self.path / LOG

    @property
    def metrics_path(self) -> Path:
        return self.path / METRICS

    def checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"

    def rollouts_path(self, step: int) -> Path:
        return self.path / "rollouts" / f"step_{step:06d}.jsonl"

    def batch_path(self, step: int) -> Path:
        """What the learner trained on in a step; only runs that sample ahead keep it."""
        return batch_path(self.path, step)

    def checkpoint_steps(self) -> list[int]:
        """Steps with a checkpoint, in ascending order."""
        return sorted(_steps(self.path / "checkpoints"))

    def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one line. Numbers that are not finite become null, since JSON has none. Steps must ascend."""
        last = self.last_step()
        if last is not None and step <= last:
            raise ValueError(f"metrics of step {step} after those of step {last}: there is one line a step")
        values = {name: _json_number(value) for name, value in metrics.items()}
        append_line(self.metrics_path, {"step": step, **values})

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every line of the metrics, oldest first."""
        return [record for _, record in read_lines(self.metrics_path)]

    def append_schedule(self, record: Mapping[str, Any], batch: bytes) -> None:
        """Keep what a step trained on, and then a line about it; `record` has the step and is JSON."""
        path = self.batch_path(record["step"])
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, batch)
        append_line(self.path / SCHEDULE, record)

    def last_step(self) -> int | None:
        """The step of the last metrics line, or None before the first."""
        line = last_line(self.metrics_path)
        return int(json.loads(line)["step"]) if line else None

    def write_rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Write what was sampled in a step, one line a completion; an existing file of that step is replaced."""
        lines = (json.dumps(record, default=_plain) + "\n" for group in groups for record in _records(step, group))
        write_atomically(self.rollouts_path(step), lines)

    def read_quarantine(self) -> dict[str, str]:
        """Prompts that the run samples no more, by id, with the reasons."""
        path = self.path / QUARANTINE
        if not path.is_file():
            return {}
        return {str(name): str(reason) for name, reason in json.loads(path.read_text(encoding="utf-8")).items()}

    def write_quarantine(self, prompts: Mapping[str, str]) -> None:
        """Keep them for a resumed run; nothing is written while there are none."""
        if prompts and dict(prompts) != self.read_quarantine():
            write_atomically(self.path / QUARANTINE, json.dumps(prompts, indent=1) + "\n")

    def truncate_after(self, step: int) -> None:
        """Forget lines and files of later steps, which a resumed run does again, and what a kill left."""
        for path in (self.metrics_path, self.path / SCHEDULE):
            if path.exists():
                write_atomically(path, [line for line, record in read_lines(path) if record["step"] <= step])
        for path_of in (self.rollouts_path, self.batch_path):
            for later in list(_steps(path_of(0).parent)):
                if later > step:
                    path_of(later).unlink()
        for place in (self.path, self.path / "rollouts", self.path / "batches"):
            for draft in place.glob(f".*{DRAFT_SUFFIX}"):
                draft.unlink()

    def discard_unused(self) -> None:
        """Give the name back after a start that failed: remove the folder if no step and no checkpoint came of it."""
        if self.last_step() is None and not self.checkpoint_steps():
            shutil.rmtree(self.path)

    def close(self) -> None:
        """Let another process open the folder."""
        self._lock.close()


def batch_path(run: Path, step: int) -> Path:
    """The file of a step's batch in a run's folder."""
    return run / "batches" / f"step_{step:06d}.npz"


def resolved_yaml(recipe: BaseModel) -> str:
    """Every setting of a recipe, defaults included, as YAML that loads to the same recipe."""
    return yaml.safe_dump(plain_settings(recipe), sort_keys=False, allow_unicode=True, width=120)


def plain_settings(value: Any) -> Any:
    """Settings as the dicts, lists and scalars that YAML has."""
    if isinstance(value, BaseModel):
        return {name: plain_settings(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): plain_settings(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_settings(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def differing_settings(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings that differ, each as `learner.learning_rate (was 1e-05, now 2e-05)`."""
    found: list[str] = []
    for key in dict.fromkeys((*before, *after)):
        old, new, name = before.get(key, "absent"), after.get(key, "absent"), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differing_settings(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} (was {old}, now {new})")
    return found


def _refuse_another_recipe(path: Path, recipe: BaseModel) -> None:
    try:
        stored = yaml.safe_load((path / RECIPE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path / RECIPE} is damaged; restore it, or start another run with --name") from error
    if not isinstance(stored, dict):
        raise RunFolderError(f"{path / RECIPE} holds no settings; restore it, or start another run with --name")
    given = yaml.safe_load(resolved_yaml(recipe))
    # A learning rate that falls over the run is another one at every step once the run has another length.
    is_shaped_by_length = (given.get("learner") or {}).get("schedule", "constant") != "constant"
    may_change = MAY_CHANGE - {"steps"} if is_shaped_by_length else MAY_CHANGE
    differing = differing_settings(_without(stored, may_change), _without(given, may_change))
    if differing:
        raise RunFolderError(
            f"the run at {path} was started with other settings: {'; '.join(differing)}; "
            f"resume with the run's own ({RECIPE} in it; only {', '.join(sorted(may_change))} may change), "
            "or start another run with --name"
        )


def _without(settings: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _lock(folder: Path, shown: Path) -> TextIO:
    lock = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise RunFolderError(f"another process is writing the run at {shown}; stop it first") from error
    return lock


def _steps(folder: Path) -> Iterator[int]:
    """Of the files in it; none where it is not there."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = STEP_NAME.fullmatch(entry.name)
        if match:
            yield int(match[1])


def _records(step: int, group: ScoredGroup) -> Iterator[dict[str, Any]]:
    for rollout, score in zip(group.rollouts, group.scores, strict=True):
        yield _record(step, group.prompt.text, rollout, score)


def _record(step: int, prompt: str, rollout: Rollout, score: Score) -> dict[str, Any]:
    versions = rollout.policy_versions_T[rollout.loss_mask_T]
    return {
        "step": step,
        "prompt_id": rollout.prompt_id,
        "completion_index": rollout.completion_index,
        "prompt": prompt,
        "completion": rollout.text,
        "reward": score.value,
        "status": score.status,
        "message": score.message,
        "parts": dict(score.parts),
        "info": dict(score.info),
        "stop_reason": rollout.stop_reason,
        "is_interrupted": rollout.is_interrupted,
        "completion_length_tokens": rollout.completion_length_tokens,
        "policy_version": {"min": int(versions.min()), "max": int(versions.max())} if len(versions) else None,
        "turns": len(rollout.turns),
    }


def _json_number(value: Any) -> Any:
    value = _plain(value) if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """NumPy's scalars and arrays, and anything else by its text: a rollout log must not end a run."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
