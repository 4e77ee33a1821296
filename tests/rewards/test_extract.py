"""The rule for taking code out of a completion: the last fenced block, else the whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.rewards.extract import extract_code, extract_files

CASES = {
    "no fence": ("def f(): pass", "def f(): pass"),
    "nothing": ("", ""),
    "one block": ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
    "no tag": ("```\nx = 1\n```", "x = 1\n"),
    "a tag with more": ('``` python title="a"\nx = 1\n```', "x = 1\n"),
    "another language": ("```python\nx = 1\n```\n```text\n1\n```", "1\n"),
    "the last of two": ("```\na\n```\ntext\n```py\nb\n```", "b\n"),
    "tildes": ("~~~python\nx = 1\n~~~", "x = 1\n"),
    "backticks in tildes": ("~~~\na\n```\nb\n```\n~~~", "a\n```\nb\n```\n"),
    "tildes in backticks": ("```\na\n~~~\nb\n```", "a\n~~~\nb\n"),
    "a longer fence holds shorter ones": ("````md\n```python\nx\n```\n````", "```python\nx\n```\n"),
    "a longer fence closes": ("```\nx\n`````", "x\n"),
    "a shorter fence does not": ("````\nx\n```\ny\n````", "x\n```\ny\n"),
    "text after a fence does not close": ("```\nx\n``` no\ny\n```", "x\n``` no\ny\n"),
    "unclosed": ("Well:\n```python\nx = 1\ny = 2", "x = 1\ny = 2\n"),
    "unclosed after a closed one": ("```\na\n```\n```python\nb", "b\n"),
    "a stray fence at the end": ("```\na\n```\nand\n```\n", "a\n"),
    "a stray fence alone": ("x = 1\n```", "x = 1\n```"),
    "an empty block": ("```\na\n```\n```\n```", ""),
    "indented": ("1. so:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
    "indented unevenly": ("  ```\nx\n y\n  z\n  ```", "x\ny\nz\n"),
    "indented by tabs": ("\t```\n\tif x:\n\t\ty\n\t```", "if x:\n\ty\n"),
    "windows line ends": ("```python\r\nx = 1\r\n```\r\n", "x = 1\n"),
    "inline code is none": ("use `x` and ``y``", "use `x` and ``y``"),
    "backticks around text are none": ("```x = 1``` is code", "```x = 1``` is code"),
    "a fence in the middle of a line is none": ("so ```\nx\n", "so ```\nx\n"),
    "other line separators stay": ("```\nx = 'a\u2028b\x0c'\n```", "x = 'a\u2028b\x0c'\n"),
    "thinking before": ("<think>\n```\nwrong\n```\n</think>\n```python\nright\n```", "right\n"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_rule(name: str) -> None:
    completion, code = CASES[name]
    assert extract_code(completion) == code


LINES = st.lists(st.sampled_from(["```", "````", "~~~", "```python", "  ```", "x = 1", "", "    y", "`", "~~~~"]))


@given(LINES.map("\n".join))
def test_it_never_fails_and_never_invents(completion: str) -> None:
    for line in extract_code(completion).split("\n"):
        assert line.strip() in {text.strip() for text in completion.split("\n")} | {""}


BLOCKS = st.tuples(
    st.sampled_from(["```", "````", "~~~"]),
    st.lists(st.sampled_from(["x = 1", "    y", "", "`", "~~", "# ``` no"]), max_size=4),
)


@given(st.lists(BLOCKS, min_size=1, max_size=4), st.sampled_from(["", "Some prose.\n"]))
def test_of_closed_blocks_the_last_counts(blocks: list[tuple[str, list[str]]], between: str) -> None:
    parts = ["\n".join([f"{fence}python", *lines, fence]) + "\n" for fence, lines in blocks]
    assert extract_code(between.join(["", *parts, ""])) == "".join(line + "\n" for line in blocks[-1][1])


def test_blocks_that_name_a_file() -> None:
    completion = (
        "```python path=src/a.py\nx = 1\n```\ntext\n```py file='b.py'\ny\n```\n```python\nz\n```\n"
        "```python path=src/a.py\nx = 2\n```\n"
    )
    assert extract_files(completion) == {"src/a.py": "x = 2\n", "b.py": "y\n"}
    assert extract_files("no block") == {}
