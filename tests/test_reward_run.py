"""`cispo reward`: one reward over a file of completions."""

import json
from pathlib import Path

import pytest

from cispo.cli import main

SOURCE = """
def share(prompt, completion, *, answer, factor=1.0):
    if completion == "bad":
        raise ValueError("[no] such thing")
    return factor * (completion == answer)

def long(prompt, completion, completion_length_tokens, is_truncated):
    return float(completion_length_tokens) + 100 * is_truncated
"""
ROWS = [
    {"id": "a", "prompt": "p", "completion": "x", "answer": "x"},
    {"id": "b", "prompt": "p", "completion": "y y y", "answer": "x", "is_truncated": True},
    {"id": "c", "prompt": "p", "completion": "bad", "answer": "x", "completion_length_tokens": 7},
]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("mine.py").write_text(SOURCE)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return "rows.jsonl"


def test_scores_statuses_times_and_what_raised(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "mine.py:share", "--data", data, "--arg", "factor=0.5"]) == 1
    out = capsys.readouterr().out
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    assert "ok" in lines["a"] and "0.5" in lines["a"] and "share 0.5" in lines["a"]
    assert "error" in lines["c"] and "ValueError: [no] such thing (mine.py:4)" in lines["c"]
    assert "3 rows: mean 0.25, from 0 to 0.5; 1 failed" in out and "seconds a row: mean" in out


def test_lengths_come_from_the_row_or_are_counted(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "mine.py:long", "--data", data]) == 0
    assert "3 rows: mean 37, from 1 to 103; 0 failed" in capsys.readouterr().out


def test_built_ins_and_other_column_names(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "language", "--data", data, "--arg", "script=latin", "--limit", "1"]) == 0
    assert main(["reward", "language", "--data", data, "--arg", "script=latin", "--column", "completion=answer"]) == 0
    assert "3 rows: mean 1, from 1 to 1" in capsys.readouterr().out


def test_what_a_reward_quotes_gives_the_terminal_no_orders(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("quote.py").write_text(
        "from cispo.types import Score\n"
        "def quote(prompt, completion):\n"
        "    if completion == 'bad':\n"
        "        raise ValueError('\\x1b[2J')\n"
        "    return Score(1.0, info={'said': '\\x1b]0;x\\x07'})\n"
    )
    assert main(["reward", "quote.py:quote", "--data", data]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert r"said: \x1b]0;x\x07" in out and r"ValueError: \x1b[2J" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.py:shar"], "has no 'shar'; did you mean 'share'?"),
        (["mine.py:share", "--arg", "factr=1"], "takes no argument 'factr'; did you mean 'factor'?"),
        (["mine.py:share", "--arg", "factor"], "--arg: expected KEY=VALUE, got 'factor'"),
        (["mine.py:share", "--column", "completion=nothing"], "'nothing'"),
        (["mine.py:share", "--timeout-s", "0"], "timeout_s: Input should be greater than 0, got 0.0"),
    ],
)
def test_mistakes_are_said_in_a_line(
    data: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reward", *arguments, "--data", data]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_file_that_is_not_there(data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "mine.py:share", "--data", "none.jsonl"]) == 2
    assert "none.jsonl" in capsys.readouterr().err
