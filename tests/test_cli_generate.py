"""`cispo generate`: where prompts come from, what is printed where, and one clear line for what is wrong."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import cispo
from cispo.cli import main

PROMPT = "Write a function f(x) that returns x + 1."
GREEDY = ["--temperature", "0", "--max-new-tokens", "40"]


def expected(prompt: Any, **options: Any) -> str:
    policy = cispo.load_policy("bundled:tiny", device="cpu")
    return policy.generate(prompt, temperature=0.0, max_new_tokens=40, **options)[0].text


def generate(*words: str) -> int:
    return main(["generate", "bundled:tiny", "--device", "cpu", *words])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_answer_is_on_stdout_and_its_usage_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(PROMPT, *GREEDY) == 0
    shown = capsys.readouterr()
    assert shown.out == expected(PROMPT) + "\n"
    assert "prompt tokens; " in shown.err and shown.err.endswith(" tokens/s\n") and shown.err.count("\n") == 1


def test_several_completions_are_titled_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(PROMPT, "Write g.", "--completions", "2", "--max-new-tokens", "30", "--seed", "3") == 0
    answers = cispo.load_policy("bundled:tiny", device="cpu").generate(
        [PROMPT, "Write g."], completions=2, max_new_tokens=30, seed=3
    )
    shown = capsys.readouterr()
    titled = {f"[prompt {one.prompt_number}, completion {one.completion_index}]\n{one.text}\n" for one in answers}
    assert len(shown.out) == sum(map(len, titled))
    assert all(text in shown.out for text in titled)
    assert "more forked" in shown.err


def test_lines_of_json_hold_answers_and_failures(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(" ", PROMPT, "--json", "--log-routing", *GREEDY) == 2
    shown = capsys.readouterr()
    answer, failure = map(json.loads, shown.out.splitlines())
    assert (answer["prompt_number"], answer["text"], answer["stop_reason"]) == (1, expected(PROMPT), "eos")
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == answer["completion_tokens"]
    assert len(answer["routing"]["tokens"]) == 4
    assert failure == {"prompt_number": 0, "error": "prompt 0 is empty; give it some text"}
    assert shown.err.endswith("prompt 0 is empty; give it some text\n")


def test_prompts_come_from_stdin_or_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    for words in ([], ["--file", str(tmp_path / "prompt.txt")]):
        assert generate(*words, *GREEDY) == 0
        assert capsys.readouterr().out == expected(PROMPT) + "\n"
    ids = cispo.load_policy("bundled:tiny", device="cpu").tokenizer.render_prompt(PROMPT)
    rows = [{"prompt": PROMPT}, {"messages": [{"role": "user", "content": PROMPT}]}, {"token_ids": ids}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert generate("--file", str(tmp_path / "prompts.jsonl"), "--json", *GREEDY) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == [expected(PROMPT)] * 3


def test_every_option_reaches_the_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(PROMPT, "--raw", *GREEDY) == 0
    ids = cispo.load_policy("bundled:tiny", device="cpu").tokenizer.encode(PROMPT)
    assert capsys.readouterr().out == expected(ids) + "\n"
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    assert generate(PROMPT, "--system", "Be brief.", *GREEDY) == 0
    assert capsys.readouterr().out == expected(system) + "\n"
    budget = ["--thinking-budget", "3", "--interruption", " Now:</think>", "--thinking-end", "</think>"]
    assert generate(PROMPT, "--json", *budget, *GREEDY) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["is_sampled"][:4] == [True, True, True, False] and " Now:" in record["text"]
    assert generate(PROMPT, "--json", "--stop", "return", *GREEDY) == 0
    assert json.loads(capsys.readouterr().out)["stop_reason"] == "stop_string"
    assert generate(PROMPT, "--json", "--stop-id", str(record["token_ids"][1]), *GREEDY) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == record["token_ids"][:2]
    assert generate(PROMPT, "--json", "--repetition-tokens", "3", "--repetition-probability", "0.9", *GREEDY) == 0
    assert json.loads(capsys.readouterr().out)["stop_reason"] == "repetition"
    assert generate(PROMPT, "--top-k", "1", "--top-p", "0.5", "--min-p", "0.5", "--max-new-tokens", "40") == 0
    assert capsys.readouterr().out == expected(PROMPT) + "\n"


def test_at_a_terminal_it_is_a_conversation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter([PROMPT, "   ", "And twice that?"])

    def read(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert generate(*GREEDY) == 0
    first = expected(PROMPT)
    said = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": first}]
    second = expected([*said, {"role": "user", "content": "And twice that?"}])
    assert capsys.readouterr().out == f"{first}\n{second}\n\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["x", "--top-p", "0"], "top_p is 0; it must be above 0 and at most 1 (1 is off)"),
        (["x", "--interruption", "y"], "command line: --interruption does nothing without --thinking-budget"),
        (["x", "--file", "y"], "command line: give prompts or --file, not both"),
        (["x", "--raw", "--system", "y"], "command line: --system needs the chat template, which --raw leaves out"),
        (["--file", "none.txt"], "none.txt: cannot be read as text"),
        (["--file", "bad.jsonl"], "bad.jsonl:2: not valid JSON"),
        (["--file", "keys.jsonl"], "keys.jsonl:1: needs one of prompt, messages and token_ids, has none"),
        (["--file", "kinds.jsonl"], "kinds.jsonl:1: token_ids must be a list of whole numbers"),
        (["--file", "empty.jsonl"], "empty.jsonl has no lines"),
    ],
)
def test_a_mistake_is_one_clear_line(
    words: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt\n')
    (tmp_path / "keys.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "kinds.jsonl").write_text('{"token_ids": ["a"]}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    assert generate(*words) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(line) and shown.err.count("\n") == 1


def test_a_policy_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "nowhere", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
