"""Builds every task and writes the files: `sft.jsonl`, `train.jsonl`, `heldout.jsonl`, `sft_corpus.jsonl`.

The same seed gives the same bytes. `examples` and `tests` are JSON text within the row, since their values are of many
types and `datasets` wants one type a column; `cispo.data` decodes the columns that `json_columns` names.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from cispo.tasks.build import Task, build_task
from cispo.tasks.check import NoTestsError
from cispo.tasks.corpus import corpus_rows
from cispo.tasks.library import OPERATIONS
from cispo.tasks.operations import Operation
from cispo.tasks.splits import Groups, split_programs

CORPUS_ROWS = 16_000


def build_tasks(groups: Groups, seed: int) -> list[Task]:
    """One task a structure: the first of its programs that makes a sound one; none if no program does.

    Where a structure has a single operation, that one must make a sound task.
    """
    tasks = []
    for group in groups:
        for steps in group:
            try:
                tasks.append(build_task(steps, str(seed)))
                break
            except NoTestsError:
                if len(steps) == 1:
                    raise
    return tasks


def write_files(
    folder: Path,
    *,
    seed: int = 0,
    imperfect_share: float = 0.5,
    operations: Sequence[Operation] = OPERATIONS,
    corpus: int = CORPUS_ROWS,
) -> dict[str, int]:
    """Writes the four files into `folder` and returns the number of rows of each."""
    groups = split_programs(operations, Random(f"{seed}:splits"))
    rows = {split: [task.as_row(split) for task in build_tasks(groups[split], seed)] for split in groups}
    programs = [steps for group in groups["sft"] for steps in group]
    rows["sft_corpus"] = corpus_rows(programs, corpus, imperfect_share, str(seed))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {name: len(content) for name, content in rows.items()}
