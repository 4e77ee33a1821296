"""The reward `language`: the share of a completion's words that are in the script of the wanted language.

Languages are told apart by script alone, so English is not told from French; what it stops is a policy that drifts into
another script in the middle of its thinking. Code blocks, LaTeX commands and URLs do not count.
"""

import re
import unicodedata
from typing import Literal

from pydantic import BaseModel, ConfigDict

SCRIPTS = {
    "latin": ("LATIN",),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "chinese": ("CJK",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
    "korean": ("HANGUL",),
}
Script = Literal["latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "chinese", "japanese", "korean"]
NOT_PROSE = re.compile(r"```.*?(?:```|$)|~~~.*?(?:~~~|$)|`[^`\n]*`|https?://\S+|\\[A-Za-z]+", re.DOTALL)
WORD = re.compile(r"[^\W\d_]+")
# These scripts put no space between words, so each of their characters counts as one.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA")


class LanguageArgs(BaseModel):
    """What `args` of the reward `language` may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    script: Script
    """The script that words must be written in."""


def language(prompt: str, completion: str, *, script: Script) -> float:
    """From 0 (no word is in the script) to 1 (all are, or there are no words)."""
    wanted = SCRIPTS[script]
    names = [name for word in WORD.findall(NOT_PROSE.sub(" ", completion)) for name in _scripts(word)]
    # One Greek letter is a symbol of mathematics, in any language.
    counted = [name for name in names if name != "GREEK SYMBOL"]
    return sum(name in wanted for name in counted) / len(counted) if counted else 1.0


def _scripts(word: str) -> list[str]:
    """The script of each word in a run of letters: one a change of script, or one a character without spaces."""
    if len(word) == 1 and _script(word) == "GREEK":
        return ["GREEK SYMBOL"]
    found: list[str] = []
    for character in word:
        name = _script(character)
        if name in UNSPACED or not found or found[-1] != name:
            found.append(name)
    return found


def _script(character: str) -> str:
    return unicodedata.name(character, "UNKNOWN").split("-")[0].split()[0]
