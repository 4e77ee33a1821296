"""Rows of a task of the package reasoning-gym: `data.path: reasoning_gym:chain_sum?size=500&seed=3&max_terms=4`.

`size` is how many rows there are (1000 in the split `train`, 200 in `heldout`), `seed` which ones; whatever else stands
there is a setting of the task. A row has `prompt` (the question and how to mark the answer), `question`, `task` and
`entry`, all that the reward `reasoning_gym` needs to know, as the text of a Python literal.

The same path gives the same rows. The splits are drawn from seeds of their own, and a question belongs to one of them
by its hash: whatever sizes, seeds and settings two sets have, no question of one split is in the other.
"""

import ast
import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any
from urllib.parse import parse_qsl

from cispo.errors import DataError

PREFIX = "reasoning_gym:"
ANSWER_FORM = "Give the final answer between <answer> and </answer>."
DEFAULT_SIZES = {"train": 1000, "heldout": 200}
# Most tasks draw the item i from the seed seed + i: sets with neighbouring seeds would share nearly all items.
SEEDS_A_SET, MAX_SEED = 1_000_000, 2000
HELDOUT_SEEDS_BEGIN = 500_000
HELDOUT_SHARE_OF_256 = 64
# Items drawn for each row that is wanted, before a task counts as having too few questions.
MAX_DRAWN_A_ROW = 40
REFUSED_TASKS = {
    "game_of_life_halting": "its scorer gives full marks to any text",
    "composite": "it has no scorer of its own; name the tasks one by one",
}


@dataclass(frozen=True)
class GymTask:
    """The rows that a data path and split mean."""

    path: str
    name: str
    split: str
    size: int
    seed: int
    settings: dict[str, Any]


def parse_gym_path(path: str, split: str | None) -> GymTask:
    """Raises DataError for a size, seed or split that there is not. The package is not imported."""
    name, _, query = path.removeprefix(PREFIX).partition("?")
    values = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    split = split or "train"
    if split not in DEFAULT_SIZES:
        raise DataError(f"data.split is {split!r}, but {PREFIX}{name} has the splits train and heldout")
    size, seed = values.pop("size", DEFAULT_SIZES[split]), values.pop("seed", 0)
    if type(size) is not int or size < 1:
        raise DataError(f"{path}: size must be a whole number of at least 1, got {size!r}")
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise DataError(f"{path}: seed must be a whole number from 0 to {MAX_SEED}, got {seed!r}")
    return GymTask(path, name, split, size, seed, values)


def read_gym(task: GymTask) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and values of each row. DataError for a missing package, task or setting, or too few questions."""
    dataset, module = _open(task)
    found = drawn = 0
    seen: set[str] = set()
    while found < task.size and drawn < MAX_DRAWN_A_ROW * task.size:
        item = dataset[drawn]
        drawn += 1
        question = str(item["question"])
        if question in seen or split_of(question) != task.split:
            continue
        seen.add(question)
        entry = repr({"module": module, "settings": task.settings, "item": _plain(item)})
        if not _is_literal(entry):
            raise DataError(f"{task.path}: an entry of this task holds something else than plain values; take another")
        yield f"{task.path} row {found}", {
            "id": f"{task.name}-{task.split}-{task.seed}-{drawn - 1}",
            "prompt": f"{question}\n\n{ANSWER_FORM}",
            "question": question,
            "task": task.name,
            "entry": entry,
        }
        found += 1
    if found < task.size:
        raise DataError(
            f"{task.path}: {drawn} draws gave {found} different questions of the split {task.split}; ask for a smaller "
            "size, or set what makes the task larger"
        )


def split_of(question: str) -> str:
    share = hashlib.sha256(question.encode("utf-8", "surrogatepass")).digest()[0]
    return "heldout" if share < HELDOUT_SHARE_OF_256 else "train"


def _open(task: GymTask) -> tuple[Any, str]:
    """The task's own data set and the module that defines it."""
    try:
        package = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise DataError(
            f"{task.path}: the package reasoning-gym cannot be imported ({error}); "
            "run: pip install 'cispo[reasoning-gym]'"
        ) from error
    tasks = package.factory.DATASETS
    if task.name in REFUSED_TASKS:
        raise DataError(f"{task.path}: this task cannot be used, since {REFUSED_TASKS[task.name]}")
    if task.name not in tasks:
        near = get_close_matches(task.name, tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(sorted(tasks))}"
        raise DataError(f"{task.path}: there is no task {task.name!r}; {hint}")
    first_seed = task.seed * SEEDS_A_SET + (HELDOUT_SEEDS_BEGIN if task.split == "heldout" else 0)
    try:
        dataset = package.create_dataset(
            task.name, **task.settings, seed=first_seed, size=MAX_DRAWN_A_ROW * task.size
        )
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{task.path}: the task refuses its settings ({reason}); mend what follows the '?'") from error
    return dataset, tasks[task.name][0].__module__


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _plain(value: Any) -> Any:
    """The value without the types of numpy, whose numbers and texts are those of Python by another name."""
    if isinstance(value, dict):
        return {_plain(key): _plain(content) for key, content in value.items()}
    for kind in (list, tuple, set):
        if type(value) is kind:
            return kind(map(_plain, value))
    if isinstance(value, str):
        return str(value)
    return value.item() if type(value).__module__ == "numpy" else value


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return True
