"""The generated maths questions: exact, distinct, and equal to the files that are committed."""

import gzip
from fractions import Fraction
from pathlib import Path

import pytest

from cispo.recipe.load import load_sft, load_train
from cispo.resources import recipes_folder
from cispo.rewards.math_extract import extract_answer
from cispo.rewards.math_reward import is_equal, math_reward
from cispo.tasks.maths import FAMILIES, split_rows, write_files


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, object]]]:
    return split_rows(0)


def test_committed_files_are_what_the_seed_gives(tmp_path: Path) -> None:
    write_files(tmp_path, seed=0)
    committed = recipes_folder() / "data" / "math"
    for file in sorted(tmp_path.iterdir()):
        made, kept = file.read_bytes(), (committed / file.name).read_bytes()
        if file.suffix == ".gz":  # how it is compressed depends on the library
            made, kept = gzip.decompress(made), gzip.decompress(kept)
        assert made == kept, file.name


def test_no_question_is_in_two_files_and_families_are_even(rows: dict[str, list[dict[str, object]]]) -> None:
    prompts = [row["prompt"] for name in rows for row in rows[name]]
    assert len(set(prompts)) == len(prompts)
    for name in ("train", "heldout"):
        counts = {family: sum(row["family"] == family for row in rows[name]) for family in FAMILIES}
        assert len(set(counts.values())) == 1


def test_answers_are_right(rows: dict[str, list[dict[str, object]]]) -> None:
    """By substitution, and by arithmetic of another kind than the generator's."""
    for row in rows["heldout"]:
        words, answer = str(row["prompt"]).split(), str(row["answer"])
        if row["family"] == "equation":
            a, b, right = int(words[3]), int(words[6]), int(words[8])
            assert a * int(answer) + b == right
        elif row["family"] == "percent":
            assert is_equal(answer, str(Fraction(int(words[1]), 100) * int(words[4]))).equal
        elif row["family"] == "roots":
            signed = " ".join(words[1:-2]).replace("- ", "-").replace("+ ", "").split()
            middle, last = int(signed[1]), int(signed[3])
            for root in map(int, answer.split(",")):
                assert root * root + middle * root + last == 0
        elif row["family"] == "fraction":
            assert is_equal(answer, f"{words[1]}+{words[3]}").equal


def test_the_reward_agrees_with_the_corpus(rows: dict[str, list[dict[str, object]]]) -> None:
    """Each completion is held against the answer of the right completion of its question."""
    right = [row for row in rows["sft_corpus"][:400] if row["is_correct"]]
    assert 200 < len(right) < 280
    for row in right:
        answer = extract_answer(str(row["completion"]))
        assert math_reward("", str(row["completion"]), answer=answer, plain_numbers=True).value == 1.0


def test_the_question_is_no_answer_to_itself(rows: dict[str, list[dict[str, object]]]) -> None:
    row = next(row for row in rows["train"] if str(row["prompt"]).startswith("find") and row["family"] == "addition")
    echo = rf"\boxed{{{str(row['prompt']).removeprefix('find ')}}}"
    assert math_reward("", echo, answer=row["answer"]).value == 1.0
    assert math_reward("", echo, answer=row["answer"], plain_numbers=True).value == 0.0


def test_the_recipes_load() -> None:
    assert load_train("math", []).recipe.rewards[0].name == "math"
    assert load_sft("math_sft", []).recipe.policy.init == "pretrained"
