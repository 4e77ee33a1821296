"""Taking the final answer out of a completion.

Thinking is cut off first: what stands in `<think>...</think>`, and before a lone `</think>`; an unclosed `<think>`
leaves nothing. Then, in this order, the answer is the content of the last `\\boxed{}` or `\\fbox{}` whose braces
balance, what follows the last `####` on its line, or what follows the last "answer is" (or "answer:") in its sentence.
A box that is never closed counts as none.
"""

import re

MAX_COMPLETION_CHARS = 400_000
MARKS = re.compile(r"\\(?:boxed|fbox)\s{0,8}(?:\{|\d)|\\.|[{}]", re.DOTALL)
HASHES = re.compile(r"####[ \t]*([^\n]+)")
# What is taken is not given back, or white space without end would be shared out in all ways.
SPOKEN = re.compile(r"\banswer(?:\s++is\s*+:?+|\s*+:)\s*+([^\n]+)", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[^.])\.(?:\s+[A-Z].*|\s*)$")


def extract_answer(completion: str, marker: str | None = None) -> str | None:
    """The answer by the rule above, or None where there is no mark of one.

    With a `marker`, such as "Answer:", it is what follows the last occurrence of just that on its line, and no other
    mark counts.
    """
    text = without_thinking(completion[-MAX_COMPLETION_CHARS:])
    if marker is not None:
        _, found_marker, after = text.rpartition(marker)
        return _end_of_sentence(after.partition("\n")[0]).strip("* ") or None if found_marker else None
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
    found = (-1, "")
    opened: list[int | None] = []
    # One walk with a stack, as a policy may open a box a hundred thousand times and close none.
    for match in MARKS.finditer(text):
        mark = match[0]
        if mark == "}":
            start = opened.pop() if opened else None
            found = max(found, (start, text[start : match.start()])) if start is not None else found
        elif mark.endswith("{") and mark != "\\{":
            opened.append(match.end() if len(mark) > 1 else None)
        elif len(mark) > 2:
            found = max(found, (match.end() - 1, mark[-1]))
    return found[1] if found[0] >= 0 else None


def _end_of_sentence(text: str) -> str:
    return SENTENCE_END.sub("", text.strip().strip("*")).strip()
