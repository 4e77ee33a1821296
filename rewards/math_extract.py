"""Taking the final answer out of a completion.

Thinking is cut off first: what stands in `<think>...</think>`, and before a lone `</think>`; an unclosed `<think>`
leaves nothing. Then, in this order, the answer is the content of the last `\\boxed{}` or `\\fbox{}` whose braces
balance, what follows the last `####` on its line, or what follows the last "answer is" (or "answer:") in its sentence.
A box that is never closed counts as none.
"""

import re

MAX_COMPLETION_CHARS = 1_000_000
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\d])")
HASHES = re.compile(r"####[ \t]*([^\n]+)")
SPOKEN = re.compile(r"\banswer(?:\s+is\s*:?|\s*:)\s*([^\n]+)", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[^.])\.(?:\s+[A-Z].*|\s*)$")


def extract_answer(completion: str) -> str | None:
    """The answer by the rule above, or None where there is no mark of one."""
    text = without_thinking(completion[-MAX_COMPLETION_CHARS:])
    boxed = last_box(text)
    if boxed is not None:
        return boxed.strip() or None
    for pattern in (HASHES, SPOKEN):
        found = pattern.findall(text)
        if found:
            return _end_of_sentence(found[-1]) or None
    return None


def without_thinking(text: str) -> str:
    """The text after the policy's thinking; empty where the thinking never ends."""
    _, closed, after = text.rpartition("</think>")
    text = after if closed else text
    return text.partition("<think>")[0]


def last_box(text: str) -> str | None:
    """What stands in the last box that is closed; LaTeX's `\\boxed 5` takes one digit."""
    answer = None
    for match in BOX.finditer(text):
        start = match.end()
        if text[start] != "{":
            answer = text[start]
            continue
        end = _closing_brace(text, start)
        answer = text[start + 1 : end] if end is not None else answer
    return answer


def _closing_brace(text: str, start: int) -> int | None:
    depth, index = 0, start
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
        index += 1
    return None


def _end_of_sentence(text: str) -> str:
    return SENTENCE_END.sub("", text.strip().strip("*")).strip()
