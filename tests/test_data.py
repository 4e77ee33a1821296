"""Prompts from local files and the hub: columns, ids, order, and a one-line error for each mistake."""

import gzip
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest

from cispo.data import DataSettings, check_data, load_prompts
from cispo.data_files import HubName, find_source
from cispo.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"id": "b", "prompt": "second letter", "answer": 2},
    {"id": "a", "prompt": "first letter", "answer": 1},
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_rows(*rows: object, name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return name

    return write_rows


def load(base_path: Path, **settings: Any) -> list[Any]:
    return load_prompts(DataSettings(**settings), base_path=base_path)


def mistake(base_path: Path, **settings: Any) -> str:
    """The message of the DataError that loading raises, which must be one line."""
    with pytest.raises(DataError) as caught:
        load(base_path, **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_rows_keep_their_order_ids_and_columns(tmp_path: Path, write: Callable[..., str]) -> None:
    prompts = load(tmp_path, path=write(*ROWS))
    assert [(prompt.id, prompt.text, dict(prompt.row)) for prompt in prompts] == [
        ("b", "second letter", {"answer": 2}),
        ("a", "first letter", {"answer": 1}),
    ]


def test_gzipped_json_lines_and_a_damaged_one(tmp_path: Path, write: Callable[..., str]) -> None:
    expected = load(tmp_path, path=write(*ROWS))
    packed = gzip.compress((tmp_path / "rows.jsonl").read_bytes())
    for name, content in {"whole": packed, "cut": packed[:-12], "other": b"{}"}.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
    assert load(tmp_path, path="whole.jsonl.gz") == expected
    for name in ("cut", "other"):
        assert f"{name}.jsonl.gz: not readable as gzip" in mistake(tmp_path, path=f"{name}.jsonl.gz")


def test_json_parquet_and_folders_give_the_same_prompts(tmp_path: Path, write: Callable[..., str]) -> None:
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    expected = load(tmp_path, path=write(*ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "folder").mkdir()
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "folder" / "train.parquet")
    assert load(tmp_path, path="rows.json") == expected
    assert load(tmp_path, path="folder/train.parquet") == expected
    assert load(tmp_path, path="folder") == expected
    assert load(tmp_path, path="folder", split="train") == expected


def test_columns_are_mapped_and_take_the_place_of_others(tmp_path: Path, write: Callable[..., str]) -> None:
    row = {"task_id": 7, "question": "what?", "prompt": "old", "solution": "x", "level": 3}
    columns = {"id": "task_id", "prompt": "question", "answer": "solution"}
    (prompt,) = load(tmp_path, path=write(row), columns=columns)
    assert (prompt.id, prompt.text, dict(prompt.row)) == ("7", "what?", {"answer": "x", "level": 3})


def test_json_columns_are_decoded(tmp_path: Path, write: Callable[..., str]) -> None:
    row = {"id": "a", "prompt": "p", "cases": '[{"args": [1, "x"], "expected": null}]'}
    (prompt,) = load(tmp_path, path=write(row), columns={"tests": "cases"}, json_columns=("tests",))
    assert dict(prompt.row) == {"tests": [{"args": [1, "x"], "expected": None}]}


def test_a_template_builds_the_prompt(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write({"id": "a", "q": "2+2", "hint": "small"})
    (prompt,) = load(tmp_path, path=name, columns={"question": "q"}, prompt_template="{{{question}}} ({hint})")
    assert prompt.text == "{2+2} (small)" and dict(prompt.row) == {"question": "2+2", "hint": "small"}


def test_ids_without_a_column_follow_the_content_not_the_place(tmp_path: Path, write: Callable[..., str]) -> None:
    rows = [{"prompt": "x", "answer": 1}, {"prompt": "y", "answer": 1}]
    ids = {prompt.text: prompt.id for prompt in load(tmp_path, path=write(*rows))}
    again = {prompt.text: prompt.id for prompt in load(tmp_path, path=write(*rows[::-1]))}
    assert ids == again and len(set(ids.values())) == 2
    assert ids["x"] != load(tmp_path, path=write({"prompt": "x", "answer": 2}))[0].id


def test_equal_rows_without_ids_are_numbered(tmp_path: Path, write: Callable[..., str]) -> None:
    first, second = load(tmp_path, path=write({"prompt": "x"}, {"prompt": "x"}))
    assert second.id == f"{first.id}-2"


def test_limit_reads_no_further(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write(*ROWS)
    with (tmp_path / name).open("a") as file:
        file.write("not json\n")
    assert len(load(tmp_path, path=name, limit=2)) == 2


def test_paths_are_relative_to_the_recipe_and_bundled_ones_to_the_package(
    tmp_path: Path, write: Callable[..., str]
) -> None:
    write(*ROWS)
    assert len(load(tmp_path, path=str(tmp_path / "rows.jsonl"))) == 2
    held = load(tmp_path, path="bundled:code/heldout.jsonl", json_columns=("examples", "tests"), limit=3)
    assert all(len(prompt.row["tests"]) >= 8 and len(prompt.row["mutants"]) == 3 for prompt in held)
    assert {"entry_point", "solution", "family"} <= set(held[0].row) and not {"id", "prompt"} & set(held[0].row)


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('\n{"prompt": "x"}\n\n  \n{"prompt": "y"}')
    assert [prompt.text for prompt in load(tmp_path, path="rows.jsonl")] == ["x", "y"]


def test_missing_file(tmp_path: Path, write: Callable[..., str]) -> None:
    write(*ROWS, name="prompts.jsonl")
    assert mistake(tmp_path, path="prompt.jsonl") == (
        f"there is no file {tmp_path}/prompt.jsonl; mend data.path ('prompt.jsonl'); did you mean 'prompts.jsonl'?"
    )
    assert f"there is no folder {tmp_path}/sub either" in mistake(tmp_path, path="sub/prompt.jsonl")
    assert "did you mean 'train.jsonl'?" in mistake(tmp_path, path="bundled:code/trian.jsonl")
    assert f"there is no file {tmp_path}/no" in mistake(tmp_path, path="./no")


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt\nx\n")
    assert "its name must end in one of .jsonl, .jsonl.gz, .json, .parquet" in mistake(tmp_path, path="rows.csv")


def test_folder_that_does_not_say_which_file(tmp_path: Path, write: Callable[..., str]) -> None:
    (tmp_path / "data").mkdir()
    assert "it has no .jsonl, .jsonl.gz, .json or .parquet file" in mistake(tmp_path, path="data")
    write(*ROWS, name="data/train.jsonl")
    write(*ROWS, name="data/test.jsonl")
    assert "(it has test.jsonl, train.jsonl)" in mistake(tmp_path, path="data")
    assert "for data.split 'dev' (it has test.jsonl, train.jsonl)" in mistake(tmp_path, path="data", split="dev")
    assert len(load(tmp_path, path="data", split="test")) == 2


def test_split_of_one_file(tmp_path: Path, write: Callable[..., str]) -> None:
    assert "leave data.split out" in mistake(tmp_path, path=write(*ROWS), split="train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b"[1]", "a row must be a JSON object, got list"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_unreadable_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "x"}\n\n' + line + b"\n")
    assert mistake(tmp_path, path="rows.jsonl").startswith(f"{tmp_path}/rows.jsonl:3: {message}")


def test_unreadable_json_and_parquet(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    assert "its name must end in .jsonl" in mistake(tmp_path, path="rows.json")
    file.write_text('[\n{"prompt": }]')
    assert mistake(tmp_path, path="rows.json").startswith(f"{file}:2: not valid JSON")
    file.write_bytes(b'["\xff"]')
    assert "UTF-8" in mistake(tmp_path, path="rows.json")
    file.write_text('{"prompt": "x"}')
    assert "must hold a list of objects, got dict" in mistake(tmp_path, path="rows.json")
    file.write_text('[{"prompt": "x"}, 3]')
    assert mistake(tmp_path, path="rows.json").startswith(f"{file} row 1: a row must be a JSON object, got int")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 nothing")
    assert "is not readable as Parquet" in mistake(tmp_path, path="rows.parquet")


def test_missing_column(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write({"id": "a", "promt": "x"})
    assert mistake(tmp_path, path=name) == (
        f"{tmp_path}/rows.jsonl:1: no column 'prompt'; the columns are id, promt; did you mean 'promt'?; "
        "map it with data.columns.prompt"
    )
    text = mistake(tmp_path, path=name, columns={"prompt": "promt", "answer": "answr"})
    assert "no column 'answr' for 'answer'; the columns are id, promt; map it with data.columns.answer" in text
    assert "no column 'question'" in mistake(tmp_path, path=name, prompt_template="{question}")
    text = mistake(tmp_path, path=name, columns={"prompt": "promt"}, json_columns=("tests",))
    assert "no column 'tests'" in text


def test_a_later_row_without_the_column_is_named(tmp_path: Path, write: Callable[..., str]) -> None:
    text = mistake(tmp_path, path=write(*ROWS, {"id": "c", "answer": 3}))
    assert text.startswith(f"{tmp_path}/rows.jsonl:3: no column 'prompt'")


def test_prompt_that_is_no_text(tmp_path: Path, write: Callable[..., str]) -> None:
    assert mistake(tmp_path, path=write({"id": "a", "prompt": {"text": "x"}})).startswith(
        f"{tmp_path}/rows.jsonl:1: the prompt (column 'prompt') is no text but dict"
    )
    assert "(column 'q') is no text but NoneType" in mistake(tmp_path, path=write({"q": None}), columns={"prompt": "q"})
    assert "is empty" in mistake(tmp_path, path=write({"prompt": ""}))
    assert "half of a surrogate pair" in mistake(tmp_path, path=write({"prompt": "a\ud800"}))


def test_ids_that_are_none_or_come_twice(tmp_path: Path, write: Callable[..., str]) -> None:
    text = mistake(tmp_path, path=write({"id": 1, "prompt": "x"}, {"id": 2, "prompt": "y"}, {"id": "1", "prompt": "z"}))
    assert text == (
        f"{tmp_path}/rows.jsonl:3: the id '1' was given at {tmp_path}/rows.jsonl:1 too; ids must occur once"
    )
    for wrong in (None, "", 1.5, True, ["a"]):
        assert f"got {wrong!r}" in mistake(tmp_path, path=write({"id": wrong, "prompt": "x"}))


def test_set_without_rows(tmp_path: Path, write: Callable[..., str]) -> None:
    assert mistake(tmp_path, path=write()) == "rows.jsonl has no rows; name a data set that has some"
    with pytest.raises(DataError, match="has no rows"):
        check_data(DataSettings(path="rows.jsonl"), base_path=tmp_path)


def test_json_column_that_is_none(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write({"prompt": "x", "tests": [1]})
    assert "column 'tests' is list, no JSON text" in mistake(tmp_path, path=name, json_columns=("tests",))
    name = write({"prompt": "x", "tests": "[1"})
    assert "column 'tests' is not valid JSON" in mistake(tmp_path, path=name, json_columns=("tests",))


def test_check_finds_what_the_first_row_shows_and_reads_no_more(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write(*ROWS)
    with (tmp_path / name).open("a") as file:
        file.write("not json\n")
    settings = DataSettings(path=name)
    check_data(settings, base_path=tmp_path, required=("answer",))
    with pytest.raises(DataError, match="no column 'tests'; the columns are answer"):
        check_data(settings, base_path=tmp_path, required=("tests",))
    with pytest.raises(DataError, match="there is no file"):
        check_data(DataSettings(path="row.jsonl"), base_path=tmp_path)
    with pytest.raises(DataError, match="no column 'question' for 'prompt'"):
        check_data(DataSettings(path=name, columns={"prompt": "question"}), base_path=tmp_path)


def test_hub_names_are_told_from_local_paths(tmp_path: Path) -> None:
    for path in ("gsm8k", "openai/gsm8k", "a-b/c.d_e"):
        assert find_source(path, None, base_path=tmp_path) == HubName(path, tmp_path / path)
        check_data(DataSettings(path=path), base_path=tmp_path)
    for path in ("a/b/c", "/gsm8k", "~/gsm8k", "open ai/gsm8k", "-x", "rows.json"):
        with pytest.raises(DataError, match="there is no file"):
            find_source(path, None, base_path=tmp_path)
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(DataError, match=re.escape("does not hold just one data file")):
        find_source("gsm8k", None, base_path=tmp_path)


def test_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = importlib.import_module("datasets")
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> object:
        asked.append((name, subset, split))
        if split != "test":
            raise ValueError(f"Unknown split {split!r}.\nShould be one of ['test'].")
        return datasets.Dataset.from_list([{"question": f"q{i}", "answer": i} for i in range(5)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings: dict[str, Any] = {"path": "openai/gsm8k", "subset": "main", "columns": {"prompt": "question"}}
    prompts = load(tmp_path, **settings, split="test", limit=2)
    assert [(prompt.text, dict(prompt.row)) for prompt in prompts] == [("q0", {"answer": 0}), ("q1", {"answer": 1})]
    text = mistake(tmp_path, **settings)
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert "Unknown split 'train'. Should be one of ['test']." in text and f"{tmp_path}/openai/gsm8k" in text
    assert mistake(tmp_path, **{**settings, "columns": {}}, split="test").startswith("openai/gsm8k row 0: no column")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, "path"),
        ({"path": "x", "limit": 0}, "limit"),
        ({"path": "x", "colums": {}}, "colums"),
        ({"path": "x", "prompt_template": "{a.b}"}, "is no column name"),
        ({"path": "x", "prompt_template": "{}"}, "is no column name"),
        ({"path": "x", "prompt_template": "{a"}, "prompt_template"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        DataSettings(**settings)


def test_reading_json_lines_loads_no_heavy_library(tmp_path: Path, write: Callable[..., str]) -> None:
    code = (
        "import sys, pathlib; from cispo.data import DataSettings, load_prompts\n"
        f"load_prompts(DataSettings(path={write(*ROWS)!r}), base_path=pathlib.Path({str(tmp_path)!r}))\n"
        "print({'torch', 'ray', 'datasets', 'pyarrow', 'pandas', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_a_file_of_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cispo_test_rows" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "rows.jsonl").write_text('{"task_id": "a/0", "prompt": "p", "test": "t"}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    columns = {"id": "task_id"}
    (prompt,) = load(tmp_path, path="package:cispo_test_rows/data/rows.jsonl", columns=columns)
    assert (prompt.id, prompt.text, prompt.row["test"]) == ("a/0", "p", "t")
    text = mistake(tmp_path, path="package:no_such_rows/x.jsonl")
    assert text.endswith("no package 'no_such_rows' is installed here; try: pip install no-such-rows")
    assert "there is no file" in mistake(tmp_path, path="package:cispo_test_rows/data/none.jsonl")


def test_a_prompt_may_be_a_conversation(tmp_path: Path, write: Callable[..., str]) -> None:
    turns = [("user", "1 + 1?"), ("assistant", "2"), ("user", "1 + 2?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    first, second = load(tmp_path, path=write({"prompt": messages, "answer": "3"}, {"prompt": messages[-1:]}))
    assert (first.text, first.earlier, dict(first.row)) == ("1 + 2?", tuple(turns[:2]), {"answer": "3"})
    assert (second.text, second.earlier) == ("1 + 2?", ())


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "does not end with a message of the user"),
        ([{"role": "assistant", "content": "x"}], "does not end with a message of the user"),
        ([{"role": "user", "content": ""}], "no role and content as text"),
        ([{"role": "user"}], "no role and content as text"),
        (["x"], "no role and content as text"),
        ([{"role": "system", "content": "\ud800"}, {"role": "user", "content": "x"}], "half of a surrogate pair"),
    ],
)
def test_a_conversation_that_is_none(
    tmp_path: Path, write: Callable[..., str], messages: list[Any], message: str
) -> None:
    assert message in mistake(tmp_path, path=write({"prompt": messages}))
