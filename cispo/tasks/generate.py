"""Builds every task and writes the files: `sft.jsonl`, `train.jsonl`, `heldout.jsonl`, `sft_corpus.jsonl.gz`.

The same seed gives the same bytes. `examples` and `tests` are JSON text within the row, since their values are of many
types and `datasets` wants one type a column; `cispo.data` decodes the columns that `json_columns` names.
"""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from cispo.tasks.build import Task, build_task
from cispo.tasks.check import NoTestsError
from cispo.tasks.compose import Steps
from cispo.tasks.corpus import corpus_rows
from cispo.tasks.library import OPERATIONS
from cispo.tasks.operations import Operation
from cispo.tasks.splits import Groups, split_programs
from cispo.tasks.structure import structure

CORPUS_ROWS = 48_000
REPEATS = 3
"""In how many sft compositions each operation is first at least, and in how many second, where so many are sound."""


def build_tasks(groups: Groups, seed: int, *, repeats: int = 0) -> list[Task]:
    """A task for each single operation, and one for each structure that only compositions have.

    That is a composition of operations that are still rare, each counted in its place. Where `repeats` is given,
    further compositions of the structure follow if one of their operations is rarer than that. A structure without a
    sound task is left out.
    """
    tasks: list[Task] = []
    seen: Counter[tuple[str, int]] = Counter()
    for group in groups:
        singles = [steps for steps in group if len(steps) == 1]
        tasks += [build_task(steps, str(seed)) for steps in singles]
        found = bool(singles)
        for steps in sorted((steps for steps in group if len(steps) == 2), key=lambda steps: _rarest(steps, seen)):
            if not found or _rarest(steps, seen) < repeats:
                task = _build_if_sound(steps, seed)
                if task is not None:
                    tasks.append(task)
                    seen.update(_roles(steps))
                    found = True
    return tasks


def _rarest(steps: Steps, seen: Counter[tuple[str, int]]) -> int:
    return min(seen[role] for role in _roles(steps))


def _roles(steps: Steps) -> list[tuple[str, int]]:
    return [(step.name, place) for place, step in enumerate(steps)]


def _build_if_sound(steps: Steps, seed: int) -> Task | None:
    try:
        return build_task(steps, str(seed))
    except NoTestsError:
        return None


def write_files(
    folder: Path,
    *,
    seed: int = 0,
    imperfect_share: float = 0.6,
    operations: Sequence[Operation] = OPERATIONS,
    corpus: int = CORPUS_ROWS,
) -> dict[str, int]:
    """Writes the four files into `folder` and returns the number of rows of each."""
    groups = split_programs(operations, Random(f"{seed}:splits"))
    tasks = {split: build_tasks(groups[split], seed, repeats=REPEATS if split == "sft" else 0) for split in groups}
    rows = {split: [task.as_row(split) for task in tasks[split]] for split in tasks}
    programs = [steps for group in groups["sft"] for steps in group]
    unseen = {structure(task.solution) for split in ("train", "heldout") for task in tasks[split]}
    rows["sft_corpus"] = corpus_rows(programs, corpus, imperfect_share, unseen, str(seed))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode()
        if name == "sft_corpus":
            # Seven times smaller; without a time in it, so that the same rows give the same bytes.
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        else:
            (folder / f"{name}.jsonl").write_bytes(lines)
    return {name: len(content) for name, content in rows.items()}
