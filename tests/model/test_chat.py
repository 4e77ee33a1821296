"""Chat templates of both kinds, and what is read out of a completion."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from cispo.errors import CheckpointError
from cispo.model.chat import ToolCall, read_answer
from cispo.model.tokenizer import Tokenizer

TINY = Path(str(files("cispo.model"))) / "assets" / "tiny"
OF_PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'][0]['text'] }}{% endfor %}"
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
)


def with_template(folder: Path, template: str) -> Tokenizer:
    shutil.copy(TINY / "tokenizer.json", folder)
    settings: dict[str, Any] = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}), encoding="utf-8")
    return Tokenizer.load(folder)


def test_a_template_that_reads_parts_gets_parts_and_tools_stay_readable(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, OF_PARTS)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "é<"}]},
    ]
    tools = [{"name": "f", "description": "a < b & 'c' é"}]
    assert tokenizer.render_messages(messages, tools) == (
        "[system]be brief[user]é<" + json.dumps(tools[0], ensure_ascii=False) + "\n"
    )


def test_a_template_that_reads_text_gets_text() -> None:
    assert Tokenizer.load(TINY).render_messages([{"role": "user", "content": "hi"}]) == "<|bos|><|user|>hi<|assistant|>"


def test_a_template_may_be_a_file_of_its_own_or_one_of_several(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (tmp_path / "settings").mkdir()
    named = [{"name": "default", "template": "D {{ messages[0].content }}"}]
    settings = {"eos_token": "<|end|>", "chat_template": named}
    folder = tmp_path / "settings"
    shutil.copy(TINY / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert Tokenizer.load(folder).render_messages(messages) == "D hi"
    (folder / "chat_template.jinja").write_text("F {{ messages[0].content }}", encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").render_messages(messages) == "F hi" == tokenizer.render_messages(messages)


def test_a_template_that_fails_is_named(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ raise_exception('no system message') }}")
    with pytest.raises(CheckpointError, match="no system message"):
        tokenizer.render_messages([{"role": "system", "content": "x"}])


def test_thinking_and_calls_are_taken_apart() -> None:
    call = '{"name": "search", "arguments": {"q": "x"}}'
    answer = read_answer(f"<think>\nhm\n</think>\nHere:\n<tool_calls>\n{call}\n[1]\nnot json\n</tool_calls>")
    assert (answer.thinking, answer.text, answer.is_cut) == ("hm", "Here:", False)
    assert answer.tool_calls == (ToolCall("search", {"q": "x"}),)
    assert len(answer.mistakes) == 2 and "no object with a name: [1]" in answer.mistakes[0]


def test_plain_text_is_left_alone_and_what_was_cut_off_is_told() -> None:
    plain = read_answer("a < b and </think> is text")
    assert (plain.thinking, plain.text, plain.tool_calls, plain.is_cut) == (
        None,
        "a < b and </think> is text",
        (),
        False,
    )
    cut = read_answer("<think>\nstill at it")
    assert (cut.thinking, cut.text, cut.is_cut) == ("still at it", "", True)
    unclosed = read_answer('so\n<tool_calls>\n{"name": "f", "arguments": {}}\n{"name": "g", "argu')
    assert unclosed.is_cut and unclosed.tool_calls == (ToolCall("f", {}),) and len(unclosed.mistakes) == 1
