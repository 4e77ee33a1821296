"""`python -m cispo.tasks.docstrings OUT_DIR [--tasks FOLDER]` writes the function tasks as HumanEval asks.

A prompt is a signature with a docstring: what the function does, and two examples of a Python session. Half of the
signatures have annotations, as some of HumanEval's have. The tasks, with ids and hidden tests, are those of the files
that `python -m cispo.tasks` writes: held out is what is held out there, and training takes `sft` beside `train`. Single
operations, which are in `sft`, come with further names and constants: they are what a small policy that has not seen
that corpus solves first. No structure is in both files.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from random import Random
from string import Template

from cispo.resources import recipes_folder
from cispo.tasks.build import build_task
from cispo.tasks.compose import FRAMES, Steps, argument_kinds
from cispo.tasks.library import OPERATIONS
from cispo.tasks.operations import Kind

SPLITS = {"train": ("sft", "train"), "heldout": ("heldout",)}
"""Which splits of the tasks each file takes."""
ANNOTATIONS: dict[Kind, str] = {
    "int": "int", "ints": "list[int]", "str": "str", "words": "list[str]", "dict": "dict[str, int]", "bool": "bool",
}  # fmt: skip
"""Those that need no import."""
SINGLES = 7
"""How many further draws of each single operation training has."""
BY_NAME = {operation.name: operation for operation in OPERATIONS}

Row = dict[str, object]


def _frame_pattern(frame: str) -> re.Pattern[str]:
    text = re.escape(Template(frame).substitute(f="FUNCTION", p="PHRASE"))
    return re.compile(text.replace("FUNCTION", r"`(?P<signature>[^`]+)`").replace("PHRASE", "(?P<phrase>.+)"))


PATTERNS = tuple(map(_frame_pattern, FRAMES))


def docstring_prompt(prompt: str, kinds: tuple[Kind, ...], gives: Kind, examples: str, rng: Random) -> str:
    """The prompt of a task, written anew. kinds: of its arguments. examples: the row's column, JSON text.

    ValueError where the prompt is of none of the frames that the tasks have.
    """
    match = next((found for pattern in PATTERNS if (found := pattern.fullmatch(prompt))), None)
    if match is None:
        raise ValueError(f"the prompt {prompt!r} is of no known frame; write the tasks with python -m cispo.tasks")
    phrase = match["phrase"]
    name, _, rest = match["signature"].partition("(")
    arguments = rest.removesuffix(")").split(", ")
    result = ""
    if rng.random() < 0.5:
        arguments = [f"{argument}: {ANNOTATIONS[kind]}" for argument, kind in zip(arguments, kinds, strict=True)]
        result = f" -> {ANNOTATIONS[gives]}"
    lines = [f"def {name}({', '.join(arguments)}){result}:", f'    """ {phrase[:1].upper()}{phrase[1:]}.']
    for example in json.loads(examples):
        lines.append(f"    >>> {name}({', '.join(map(repr, example['args']))})")
        lines.append(f"    {example['expected']!r}")
    return "\n".join([*lines, '    """', ""])


def docstring_rows(tasks: Iterable[Row], seed: int) -> list[Row]:
    """The rows of a file from those of the tasks, in their order."""
    rows = []
    for task in tasks:
        steps: Steps = tuple(BY_NAME[name] for name in str(task["id"]).partition("#")[0].split("."))
        rng = Random(f"docstrings:{seed}:{task['id']}")
        prompt = docstring_prompt(
            str(task["prompt"]), argument_kinds(steps), steps[-1].gives, str(task["examples"]), rng
        )
        rows.append({"id": task["id"], "prompt": prompt, "entry_point": task["entry_point"], "tests": task["tests"]})
    return rows


def single_tasks(seed: int) -> list[Row]:
    """Single operations with other names and constants; each prompt once."""
    rows: dict[str, Row] = {}
    for draw, operation in itertools.product(range(1, SINGLES + 1), OPERATIONS):
        row = build_task((operation,), f"docstrings:{seed}:{draw}").as_row("train")
        rows.setdefault(str(row["prompt"]), row | {"id": f"{operation.name}#{draw}"})
    return list(rows.values())


def write_files(folder: Path, tasks: Path, seed: int) -> dict[str, int]:
    """Write the files into `folder`; the number of rows of each, by its name. Equal seeds give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, splits in SPLITS.items():
        lines = [line for split in splits for line in (tasks / f"{split}.jsonl").read_text("utf-8").splitlines()]
        further = single_tasks(seed) if name == "train" else []
        rows = docstring_rows([*map(json.loads, lines), *further], seed)
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        counts[file.name] = len(rows)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cispo.tasks.docstrings", description="Function tasks as signatures with docstrings."
    )
    parser.add_argument("folder", metavar="OUT_DIR", type=Path, help="where the files go")
    parser.add_argument(
        "--tasks", metavar="FOLDER", type=Path, default=recipes_folder() / "data" / "code",
        help="sft.jsonl, train.jsonl and heldout.jsonl of python -m cispo.tasks (default: those that come with it)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, count in write_files(options.folder, options.tasks, options.seed).items():
        print(f"{options.folder / name}: {count} rows")


if __name__ == "__main__":
    main()
