"""What a reasoning policy's text holds besides the answer: its thinking, and calls of tools, in MiniMax-M1's form.

    <think>
    ...
    </think>
    answer, or <tool_calls> with one JSON object a line: {"name": ..., "arguments": {...}}

A text cut off within a block is told apart from one that has none: nothing is guessed.
"""

import json
from dataclasses import dataclass
from typing import Any

_THINK, _END_THINK = "<think>", "</think>"
_CALLS, _END_CALLS = "<tool_calls>", "</tool_calls>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the policy asks for."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion taken apart. thinking: None without a thinking block. is_cut: a block was opened and never closed.

    mistakes: what was no call within a block of tool calls, one line each.
    """

    thinking: str | None
    text: str
    tool_calls: tuple[ToolCall, ...]
    mistakes: tuple[str, ...]
    is_cut: bool


def read_answer(completion: str) -> Answer:
    """Thinking, tool calls and the text outside both."""
    thinking, text, is_cut = None, completion, False
    before, opened, after = completion.partition(_THINK)
    if opened and not before.strip():
        inside, closed, text = after.partition(_END_THINK)
        thinking, is_cut = inside.strip("\n"), not closed
    kept: list[str] = []
    calls: list[ToolCall] = []
    mistakes: list[str] = []
    while True:
        outside, opened, rest = text.partition(_CALLS)
        kept.append(outside)
        if not opened:
            break
        block, closed, text = rest.partition(_END_CALLS)
        is_cut = is_cut or not closed
        for line in filter(None, map(str.strip, block.splitlines())):
            call = _read_call(line)
            if isinstance(call, ToolCall):
                calls.append(call)
            else:
                mistakes.append(call)
    return Answer(thinking, "".join(kept).strip("\n"), tuple(calls), tuple(mistakes), is_cut)


def _read_call(line: str) -> ToolCall | str:
    try:
        call = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({error}): {line[:80]}"
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return f"no object with a name: {line[:80]}"
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return f"arguments of {call['name']} are {type(arguments).__name__}, not an object: {line[:80]}"
    return ToolCall(call["name"], arguments)
