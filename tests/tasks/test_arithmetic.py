"""The sums of recipes/smollm2_math.yaml: the frozen task, nothing of it in training, the files that are committed."""

import re
from pathlib import Path
from typing import Any

import pytest

from cispo.data import DataSettings, load_prompts
from cispo.recipe.load import read_recipe
from cispo.recipe.schema import TrainRecipe
from cispo.resources import recipes_folder
from cispo.rewards.math_reward import math_reward
from cispo.tasks.arithmetic import HELDOUT_ROWS, STEPS, TASK, split_rows, write_files

QUESTION = re.compile(r"Compute ([0-9+ -]+)\. Work step by step and end with 'Answer: <number>'\.")
FORMS = {
    "one_digit_three_terms": r"\d \+ \d - \d",
    "two_digit_two_terms": r"\d\d \+ \d\d",
    "two_digit_three_terms": r"\d\d \+ \d\d - \d\d",
}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return split_rows(0)


def asked(prompt: str) -> str:
    match = QUESTION.fullmatch(prompt)
    assert match is not None, prompt
    return match[1]


def summed(expression: str) -> int:
    """By another way than the generator's: the sum of signed numbers."""
    return sum(int(term.replace(" ", "")) for term in re.findall(r"(?:[+-] )?\d+", expression))


def test_committed_files_are_what_the_seed_gives(tmp_path: Path) -> None:
    write_files(tmp_path, seed=0)
    committed = recipes_folder() / "data" / "arithmetic"
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in committed.iterdir()}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (committed / file.name).read_bytes(), file.name


def test_heldout_is_the_frozen_task_in_equal_parts(rows: dict[str, list[dict[str, Any]]]) -> None:
    heldout = rows["heldout"]
    assert len(heldout) == HELDOUT_ROWS == len({row["prompt"] for row in heldout})
    for part, form in FORMS.items():
        chosen = [asked(row["prompt"]) for row in heldout if row["part"] == part]
        assert len(chosen) in (HELDOUT_ROWS // 3, HELDOUT_ROWS // 3 + 1)
        assert all(re.fullmatch(form, expression) for expression in chosen)


def test_answers_are_right(rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in [*rows["train"], *rows["heldout"]]:
        assert summed(asked(row["prompt"])) == int(row["answer"]), row


def test_training_has_no_heldout_question_and_every_part(rows: dict[str, list[dict[str, Any]]]) -> None:
    train = rows["train"]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in rows["heldout"]}
    assert len({row["id"] for row in train}) == len(train)
    for part, settings in (TASK | STEPS).items():
        assert sum(row["part"] == part for row in train) == settings.train_rows
    # Where there are enough questions none comes twice.
    large = [row["prompt"] for row in train if row["part"].startswith("two_digit")]
    assert len(set(large)) == len(large)


def test_worked_examples_are_right_of_the_same_part_and_not_measured(rows: dict[str, list[dict[str, Any]]]) -> None:
    measured = {row["prompt"] for row in rows["heldout"]}
    for row, plain in zip(rows["heldout_examples"], rows["heldout"], strict=True):
        *shown, last = row["prompt"]
        assert last == {"role": "user", "content": plain["prompt"]}
        assert (row["id"], row["answer"]) == (plain["id"], plain["answer"])
        assert [message["role"] for message in shown] == ["user", "assistant"] * 3
        for question, answer in zip(shown[::2], shown[1::2], strict=True):
            expression = asked(question["content"])
            assert re.fullmatch(FORMS[row["part"]], expression) and question["content"] not in measured
            marked = math_reward("", answer["content"], answer=summed(expression), plain_numbers=True, marker="Answer:")
            assert marked.value == 1.0
            *steps, _ = answer["content"].splitlines()
            assert all(summed(left) == int(right) for left, right in (step.split(" = ") for step in steps))


def test_the_recipe_measures_right_answers_alone() -> None:
    recipe = read_recipe("smollm2_math", (), TrainRecipe).recipe
    assert sum(reward.weight for reward in recipe.rewards if reward.name != "math") <= 0.1 + 1e-12
    assert recipe.rollout.max_completion_tokens == 128 and recipe.rollout.temperature == 1.0
    assert recipe.evaluation is not None and recipe.evaluation.by == "part"
    prompts = load_prompts(recipe.evaluation.data, base_path=Path())
    assert {prompt.row["part"] for prompt in prompts} == set(TASK)


def test_worked_examples_load_as_earlier_turns() -> None:
    (prompt, *_) = load_prompts(DataSettings(path="bundled:arithmetic/heldout_examples.jsonl"), base_path=Path())
    assert [role for role, _ in prompt.earlier] == ["user", "assistant"] * 3
    assert QUESTION.fullmatch(prompt.text)
