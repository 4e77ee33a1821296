import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cispo.errors import RunFolderError
from cispo.views.rollouts import group_records, print_rollouts


def record(prompt_id: str, index: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": 3,
        "prompt_id": prompt_id,
        "completion_index": index,
        "prompt": f"Write {prompt_id}.",
        "completion": f"def f():\n    return {index}",
        "reward": 0.25 * index,
        "status": "ok",
        "message": "",
        "parts": {"code": 0.5},
        "info": {"verdict": "passed", "passed": 8},
        "stop_reason": "eos",
        "completion_length_tokens": 17,
        "policy_version": {"min": 2, "max": 2},
        "turns": 1,
    } | changes


def write(run_folder: Path, step: int, records: list[dict[str, Any]]) -> None:
    (run_folder / "rollouts").mkdir(exist_ok=True)
    lines = "".join(json.dumps(entry) + "\n" for entry in records)
    (run_folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(lines, encoding="utf-8")


def shown(run_folder: Path, step: int | None = None, limit: int = 10) -> str:
    stream = io.StringIO()
    print_rollouts(run_folder, step, limit, Console(file=stream, width=160))
    return stream.getvalue()


def test_a_group_is_shown_with_its_prompt_and_the_facts_of_each_completion(tmp_path: Path) -> None:
    failed = record("task-1", 1, status="error", message="the sandbox\nis gone", parts={}, info={})
    cut = record("task-1", 2, stop_reason="length", is_interrupted=True)
    write(tmp_path, 3, [record("task-1", 0, advantage=-0.7), failed, cut])
    text = shown(tmp_path)
    assert "step 3  prompt task-1  mean reward 0.250 of 2" in text
    assert text.count("Write task-1.") == 1
    assert "#0  reward 0.000  advantage -0.700  code 0.5  verdict=passed  passed=8  stop eos  17 tokens" in text
    assert "#1  error: the sandbox is gone  stop eos" in text
    assert "#2  reward 0.500  code 0.5" in text and "stop length  17 tokens  thinking interrupted" in text
    assert "    def f():\n" in text and "        return 2\n" in text


def test_the_last_step_is_taken_and_the_limit_counts_groups(tmp_path: Path) -> None:
    write(tmp_path, 9, [record("old", 0)])
    write(tmp_path, 10, [record(name, index) for name in "abc" for index in range(2)])
    text = shown(tmp_path, limit=2)
    assert "Write a." in text and "Write b." in text and "Write c." not in text
    assert "1 more groups in" in text and "--limit 3" in text
    assert "Write old." in shown(tmp_path, step=9)


def test_a_prompt_sampled_twice_in_a_step_makes_two_groups() -> None:
    records = [record("a", 0), record("a", 1), record("a", 0), record("b", 1)]
    assert [len(group) for group in group_records(iter(records))] == [2, 1, 1]


def test_control_characters_and_markup_of_a_completion_stay_text(tmp_path: Path) -> None:
    write(tmp_path, 1, [record("\x1b]0;title\x07", 0, completion="\x1b[2J\x07[bold]x[/bold]\ty\r")])
    text = shown(tmp_path)
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text
    assert "\\x1b[2J\\x07[bold]x[/bold]" in text and "prompt \\x1b]0;title\\x07" in text


def test_a_long_prompt_and_long_details_are_cut_and_say_so(tmp_path: Path) -> None:
    prompt = "\n".join(f"line {i}" for i in range(50))
    write(tmp_path, 1, [record("a", 0, prompt=prompt, info={"error": "x" * 500})])
    text = shown(tmp_path)
    assert "line 39" in text and "line 40" not in text and "(10 more lines)" in text
    assert "x" * 58 not in text and "..." in text


def test_what_cannot_be_read_is_said_with_place_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no rollouts"):
        shown(tmp_path)
    write(tmp_path, 2, [record("a", 0)])
    with pytest.raises(RunFolderError, match="no rollouts of step 7; take one of 2 to 2"):
        shown(tmp_path, step=7)
    for torn in ('{"step": 2}\n{"prom', "[]\n"):
        (tmp_path / "rollouts" / "step_000002.jsonl").write_text(torn)
        with pytest.raises(RunFolderError, match=r"step_000002.jsonl:\d is no JSON"):
            shown(tmp_path)
    write(tmp_path, 4, [])
    with pytest.raises(RunFolderError, match="has no rollouts; choose another step"):
        shown(tmp_path)
