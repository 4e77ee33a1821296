"""The task files that come with the package: what they promise, checked on every row."""

import ast
import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cispo.data_files import read_rows
from cispo.resources import recipes_folder
from cispo.tasks.check import Case, load_function, same, try_mutant
from cispo.tasks.library import OPERATIONS
from cispo.tasks.structure import structure

SPLITS = ("sft", "train", "heldout")
FOLDER = recipes_folder() / "data" / "code"
COLUMNS = {
    "id", "split", "family", "prompt", "entry_point", "examples", "tests", "solution", "mutants",
}  # fmt: skip


FILES = {name: FOLDER / f"{name}.jsonl" for name in SPLITS} | {"sft_corpus": FOLDER / "sft_corpus.jsonl.gz"}


def read(name: str) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(FILES[name])]


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[dict[str, Any]]]:
    return {split: read(split) for split in SPLITS}


def cases(row: dict[str, Any], column: str = "tests") -> list[Case]:
    return [Case(tuple(case["args"]), case["expected"]) for case in json.loads(row[column])]


def pair(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row["id"].split("."))


def test_counts_columns_and_families(tasks: dict[str, list[dict[str, Any]]]) -> None:
    assert len(tasks["sft"]) >= 1500 and len(tasks["train"]) >= 1200 and len(tasks["heldout"]) >= 300
    rows = [row for split in SPLITS for row in tasks[split]]
    assert all(set(row) == COLUMNS for row in rows)
    assert all(row["split"] == split for split in SPLITS for row in tasks[split])
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({structure(row["solution"]) for row in rows}) >= 3000
    assert len({family for row in rows for family in row["family"].split(" + ")}) >= 16


def test_no_structure_and_no_pair_is_in_two_splits(tasks: dict[str, list[dict[str, Any]]]) -> None:
    for key in (pair, lambda row: structure(row["solution"])):
        found = {split: {key(row) for row in tasks[split]} for split in SPLITS}
        assert not found["sft"] & found["train"]
        assert not found["sft"] & found["heldout"]
        assert not found["train"] & found["heldout"]


def test_operations_of_train_and_heldout_are_known_from_sft(tasks: dict[str, list[dict[str, Any]]]) -> None:
    singles = {pair(row)[0] for row in tasks["sft"] if len(pair(row)) == 1}
    assert singles == {operation.name for operation in OPERATIONS}
    seen = Counter((name, place) for row in tasks["sft"] if len(pair(row)) == 2 for place, name in enumerate(pair(row)))
    for split in ("train", "heldout"):
        for row in tasks[split]:
            assert len(pair(row)) == 2
            for place, name in enumerate(pair(row)):
                assert seen[name, place] >= 2, (row["id"], place)


def test_no_structure_of_train_or_heldout_is_in_the_corpus(tasks: dict[str, list[dict[str, Any]]]) -> None:
    later = {structure(row["solution"]) for split in ("train", "heldout") for row in tasks[split]}
    assert not later & {structure(code_of(row["completion"])) for row in read("sft_corpus")}


def test_references_pass_and_mutants_are_killed(tasks: dict[str, list[dict[str, Any]]]) -> None:
    for split in SPLITS:
        for row in tasks[split]:
            reference = load_function(row["solution"], row["entry_point"])
            hidden = cases(row)
            assert len(hidden) >= 8 and len(cases(row, "examples")) == 2
            for case in [*hidden, *cases(row, "examples")]:
                assert same(reference(*case.arguments), case.expected), row["id"]
            assert len({json.dumps(case.expected) for case in hidden}) > 1, row["id"]
            assert len(set(row["mutants"])) == 3
            for mutant in row["mutants"]:
                assert try_mutant(hidden, mutant, row["entry_point"]).killers, (row["id"], mutant)


def test_examples_are_not_among_the_hidden_tests(tasks: dict[str, list[dict[str, Any]]]) -> None:
    for split in SPLITS:
        for row in tasks[split]:
            hidden = {repr(case.arguments) for case in cases(row)}
            assert not hidden & {repr(case.arguments) for case in cases(row, "examples")}, row["id"]
            assert len(hidden) == len(cases(row)), row["id"]


def test_the_prompt_names_the_signature(tasks: dict[str, list[dict[str, Any]]]) -> None:
    for split in SPLITS:
        for row in tasks[split]:
            function = ast.parse(row["solution"]).body[-1]
            assert isinstance(function, ast.FunctionDef) and function.name == row["entry_point"]
            signature = f"`{function.name}({ast.unparse(function.args)})`"
            assert signature in row["prompt"]


def code_of(completion: str) -> str:
    assert completion.startswith("```python\n") and completion.endswith("\n```")
    return completion.removeprefix("```python\n").removesuffix("\n```")


def test_the_corpus_is_of_mixed_quality_and_always_of_the_right_form() -> None:
    rows = read("sft_corpus")
    assert len(rows) >= 45_000 and len({row["prompt"] for row in rows}) == len(rows)
    assert all(set(row) == {"id", "prompt", "completion", "is_correct"} for row in rows)
    share = sum(row["is_correct"] for row in rows) / len(rows)
    assert 0.37 < share < 0.43
    for row in rows:
        function = ast.parse(code_of(row["completion"])).body[-1]
        assert isinstance(function, ast.FunctionDef)
        assert f"`{function.name}({ast.unparse(function.args)})`" in row["prompt"]


def test_files_are_small() -> None:
    assert sum(FILES[split].stat().st_size for split in SPLITS) < 5_500_000
    assert FILES["sft_corpus"].stat().st_size < 4_000_000


def test_datasets_loads_every_file(tmp_path: Path) -> None:
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    for name in (*SPLITS, "sft_corpus"):
        loaded = datasets.load_dataset("json", data_files=str(FILES[name]), split="train", cache_dir=str(tmp_path))
        rows = read(name)
        assert loaded.num_rows == len(rows) and loaded[0] == rows[0]
