"""Function tasks as signatures with docstrings: the committed files, their examples, nothing held out in training."""

import ast
import doctest
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cispo.data import load_prompts
from cispo.recipe.load import read_recipe
from cispo.recipe.schema import TrainRecipe
from cispo.resources import recipes_folder
from cispo.tasks.docstrings import docstring_prompt, docstring_rows, single_tasks, write_files

DATA = recipes_folder() / "data"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tasks() -> dict[str, dict[str, Any]]:
    """Everything that the prompts are made of, by id."""
    rows = [row for split in ("sft", "train", "heldout") for row in read(DATA / "code" / f"{split}.jsonl")]
    return {str(row["id"]): row for row in [*rows, *single_tasks(0)]}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {name: read(DATA / "code_docstrings" / f"{name}.jsonl") for name in ("train", "heldout")}


def test_committed_files_are_what_the_builder_writes(tmp_path: Path) -> None:
    counts = write_files(tmp_path, DATA / "code", seed=0)
    committed = DATA / "code_docstrings"
    assert set(counts) == {file.name for file in committed.glob("*.jsonl")}
    for name in counts:
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes(), name


def test_the_reference_solves_the_docstrings_examples_and_no_test_is_shown(
    rows: dict[str, list[dict[str, Any]]], tasks: dict[str, dict[str, Any]]
) -> None:
    for row in [*rows["train"][::25], *rows["train"][-165:], *rows["heldout"][::5]]:
        task = tasks[row["id"]]
        (function,) = ast.parse(row["prompt"]).body
        assert isinstance(function, ast.FunctionDef) and function.name == row["entry_point"]
        (reference,) = [node for node in ast.parse(task["solution"]).body if node.name == row["entry_point"]]
        assert [given.arg for given in function.args.args] == [given.arg for given in reference.args.args]
        text = ast.get_docstring(function)
        assert text is not None
        names: dict[str, Any] = {}
        exec(task["solution"], names)
        session = doctest.DocTestParser().get_doctest(text, names, row["id"], None, None)
        assert len(session.examples) == 2
        assert doctest.DocTestRunner(verbose=False).run(session).failed == 0, row["id"]
        assert row["tests"] == task["tests"]
        shown = [example["args"] for example in json.loads(task["examples"])]
        assert not any(test["args"] in shown for test in json.loads(row["tests"]))


def test_annotations_are_in_half_of_the_signatures_and_say_the_kinds(rows: dict[str, list[dict[str, Any]]]) -> None:
    kinds = {"int": int, "list[int]": list, "str": str, "list[str]": list, "dict[str, int]": dict, "bool": bool}
    annotated = 0
    for row in rows["train"]:
        function = ast.parse(row["prompt"]).body[0]
        assert isinstance(function, ast.FunctionDef)
        if function.returns is None:
            assert all(given.annotation is None for given in function.args.args)
            continue
        annotated += 1
        for test in json.loads(row["tests"]):
            given = [ast.unparse(argument.annotation) for argument in function.args.args if argument.annotation]
            wanted = [*given, ast.unparse(function.returns)]
            for value, kind in zip([*test["args"], test["expected"]], wanted, strict=True):
                assert isinstance(value, kinds[kind]), row["id"]
    assert 0.45 < annotated / len(rows["train"]) < 0.55


def test_training_has_nothing_held_out_and_single_operations_in_several_draws(
    rows: dict[str, list[dict[str, Any]]],
) -> None:
    train, heldout = rows["train"], rows["heldout"]
    assert len({row["id"] for row in train}) == len(train)
    assert not {row["id"] for row in train} & {row["id"] for row in heldout}
    # An example decides between prompts of one wording, and singles of few constants come twice.
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    assert all("." in row["id"] for row in heldout)
    singles = [row for row in train if "." not in row["id"]]
    assert 0.2 < len(singles) / len(train) < 0.3
    assert len({row["prompt"] for row in singles}) > 0.97 * len(singles)


def test_a_prompt_of_another_form_is_refused() -> None:
    task = {"id": "x", "prompt": "Please write f.", "entry_point": "f", "examples": "[]", "tests": "[]"}
    with pytest.raises(ValueError, match=r"'Please write f\.' is of no known frame"):
        docstring_prompt(task["prompt"], ("int",), "int", "[]", Random(0))
    with pytest.raises(KeyError):
        docstring_rows([task], 0)


def test_the_recipe_trains_and_measures_on_it_and_on_human_eval_beside_it() -> None:
    recipe = read_recipe("smollm2_code", (), TrainRecipe).recipe
    assert recipe.evaluation is not None and list(recipe.evaluation.sets) == ["heldout", "human_eval"]
    assert len(load_prompts(recipe.data, base_path=Path())) > 5000
    assert len(load_prompts(recipe.evaluation.data, base_path=Path())) == 476
    prompts = load_prompts(recipe.evaluation.also["human_eval"].data, base_path=Path())
    assert len(prompts) == 164 and all(prompt.id.startswith("HumanEval/") for prompt in prompts)
