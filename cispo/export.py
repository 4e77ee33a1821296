"""The policy of a run as a folder in Hugging Face layout, for transformers and for another run to start from."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from cispo.checkpoint import Checkpoint, best_step, list_checkpoints, load_checkpoint
from cispo.errors import RunFolderError
from cispo.model.tokenizer import Tokenizer
from cispo.run_folder import METRICS, RECIPE

DEFAULT_METRIC = "eval/heldout/pass@1"
"""What the best checkpoint is best in, where the run's recipe does not say."""
GENERATION = "generation_config.json"


def export_policy(run: Path, target: Path, *, step: int | None = None, best: bool = False) -> Checkpoint:
    """Write the policy of a run's checkpoint into `target`: the newest one, that of `step`, or the best one.

    Beside what a checkpoint holds stands generation_config.json, by which transformers knows where a completion ends.
    The folder appears by rename, whole. RunFolderError where there is no such run or checkpoint, or `target` is taken;
    CheckpointError for a damaged checkpoint.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFolderError(f"{target} exists already; name a folder that does not")
    checkpoint = load_checkpoint(_chosen(run, step, best))
    place = Path(os.path.abspath(target))
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        shutil.copytree(checkpoint.policy_path, draft, dirs_exist_ok=True)
        ends = {"eos_token_id": Tokenizer.load(draft).eos_id}
        (draft / GENERATION).write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
        draft.chmod(0o755)
        draft.replace(place)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return checkpoint


def _chosen(run: Path, step: int | None, best: bool) -> Path:
    paths = {int(path.name.removeprefix("step_")): path for path in list_checkpoints(run / "checkpoints")}
    if not paths:
        raise RunFolderError(f"{run} is no run folder with checkpoints; name one, such as runs/code")
    if best:
        metric = _metric(run)
        step = best_step((row for row in _rows(run / METRICS) if row["step"] in paths), metric)
        if step is None:
            raise RunFolderError(f"no checkpoint of {run} was measured by {metric}; choose one with --step")
    if step is None:
        step = max(paths)
    if step not in paths:
        raise RunFolderError(f"{run} has no checkpoint of step {step}; there is {', '.join(map(str, sorted(paths)))}")
    return paths[step]


def _metric(run: Path) -> str:
    recipe = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    return str(recipe.get("checkpoint", {}).get("keep_best") or DEFAULT_METRIC)


def _rows(file: Path) -> list[dict[str, Any]]:
    """The metrics' lines; one that is being written at this moment is left out."""
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
