"""Taking the code out of a completion.

The rule: the code is the content of the last fenced block, and the whole completion where there is none.

- A line opens a block when, after any indentation, it starts with three or more backticks or tildes. What follows them
  (a language tag, say) is ignored, whatever it is; after backticks it may hold no further backtick.
- The block ends at the next line that has only the same character, at least as many times, after any indentation. So a
  longer fence can hold shorter ones, and backticks and tildes can hold each other.
- A block that is never closed ends with the completion, as in CommonMark; if it then holds nothing but white space, the
  fence is taken for a stray one and does not count.
- The opening fence's indentation is taken off each line of the block, so far as the line has it.
"""

import re
from dataclasses import dataclass

PATH = re.compile(r"(?:^|\s)(?:path|file|filename)=[\"']?(?P<path>[^\s\"']+)")
FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<tag>.*)")


@dataclass
class _Block:
    indent: str
    fence: str
    lines: list[str]
    tag: str = ""

    def is_closed_by(self, line: str) -> bool:
        mark = line.strip()
        return len(mark) >= len(self.fence) and set(mark) == {self.fence[0]}

    def text(self) -> str:
        return "".join(_without_indent(line, self.indent) + "\n" for line in self.lines)


def extract_code(completion: str) -> str:
    """The code of a completion by the rule above; line ends become newlines inside a block."""
    blocks = _blocks(completion)
    return blocks[-1].text() if blocks else completion


def extract_files(completion: str) -> dict[str, str]:
    """The blocks whose opening fence names a file, ```python path=src/a.py```, by path; of one path the last counts."""
    named = [(PATH.search(block.tag), block.text()) for block in _blocks(completion)]
    return {match["path"]: text for match, text in named if match is not None}


def _blocks(completion: str) -> list[_Block]:
    blocks: list[_Block] = []
    current: _Block | None = None
    for line in completion.split("\n"):
        if current is None:
            current = _opened_by(line)
        elif current.is_closed_by(line):
            blocks.append(current)
            current = None
        else:
            current.lines.append(line.rstrip("\r"))
    if current is not None and current.text().strip():
        blocks.append(current)
    return blocks


def _opened_by(line: str) -> _Block | None:
    match = FENCE.match(line)
    if match is None or (match["fence"][0] == "`" and "`" in match["tag"]):
        return None
    return _Block(match["indent"], match["fence"], [], match["tag"])


def _without_indent(line: str, indent: str) -> str:
    shared = 0
    while shared < len(indent) and line[shared : shared + 1] == indent[shared]:
        shared += 1
    return line[shared:]
