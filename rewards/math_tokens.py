"""From the text of an answer to tokens: Unicode and LaTeX spellings of one thing become one token.

A token is a pair of its kind and its value: ("number", Fraction), ("letter", "x"), ("command", "frac"), ("word", "or"),
("text", what stood in \\text{}), or ("sign", "+"). Bounds on length, depth and digits are checked here, before anything
is computed. Text that has no tokens raises UnparsedError.
"""

import itertools
import re
import unicodedata
from fractions import Fraction
from typing import Any

from cispo.rewards.math_units import UNIT_WORDS

Token = tuple[str, Any]

MAX_CHARS = 2000
MAX_TOKENS = 400
MAX_DEPTH = 40
MAX_DIGITS = 400
MAX_SCIENTIFIC_EXPONENT = 2000


class UnparsedError(ValueError):
    """The text is no answer that can be read without doubt."""


SYMBOLS = {
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00f7": r"\div ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
    "\u2217": "*", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b0": r"^\circ ", "\u2264": r"\le ",
    "\u2265": r"\ge ", "\u2260": r"\ne ", "\u222a": r"\cup ", "\u2208": r"\in ", "\u00b1": r"\pm ", "\u2213": r"\mp ",
    "\u2205": r"\emptyset ", "\u211d": r"\mathbb{R}", "\u2026": "...", "\u03b8": r"\theta ", "\u03b1": r"\alpha ",
    "\u03b2": r"\beta ", "\u03bb": r"\lambda ", "\u2215": "/", "\u00a3": r"\pound ", "\u20ac": r"\euro ",
}  # fmt: skip
SPELLINGS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le", "geq": "ge",
    "leqslant": "le", "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "times": "*", "cdot": "*", "ast": "*",
    "div": "/", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|", "vert": "|",
    "mid": "|", "ldots": "...", "dots": "...", "cdots": "...", "varnothing": "emptyset", "colon": ":", "land": "and",
    "lor": "or", "degree": "circ", "union": "cup", "to": "rightarrow", "arcsin": "arcsin", "asin": "arcsin",
    "acos": "arccos", "atan": "arctan", "tg": "tan", "infty": "infty", "inf": "infty",
}  # fmt: skip
_DROPPED = "left right big Big bigl bigr Bigl Bigr bigg Bigg displaystyle textstyle limits quad qquad mathstrut"
DROPPED = frozenset(_DROPPED.split())
WRAPPERS = (
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|bold|operatorname|mbox|hbox)"
    r"\s*\{([^{}]*)\}"
)
_FUNCTIONS = "sqrt sin cos tan cot sec csc log ln exp pi arcsin arccos arctan sinh cosh tanh abs"
FUNCTION_WORDS = frozenset(_FUNCTIONS.split())

GROUPED = re.compile(r"(?<![\d.,])(\d{1,3})((?:(?:\\[,!;:]|\\ |\{,\}|\u202f|\u00a0)+\d{3})+)(?!\d)")
VULGAR = re.compile(r"(\d+)\u2044(\d+)")
REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
DOTTED = re.compile(r"(?<![\d.])(\d+)\.(\d*?)(\d)\3{2,}\.{3}")
LEXEMES = re.compile(
    r"""(?P<space>[\s~]+|\\[,;:!\ ]|\\\n)
      | (?P<repeating>⟦(?P<whole>\d*),(?P<fixed>\d*),(?P<period>\d+)⟧)
      | (?P<scientific>(?:\d+\.?\d*|\.\d+)[eE][+-]?\d+(?![\w.]))
      | (?P<grouped>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,]))
      | (?P<number>\d+(?:\.\d+)?|\.\d+)
      | (?P<environment>\\(?:begin|end)\s*\{\w+\*?\}(?:\s*\{[lcr|]+\})?)
      | (?P<command>\\[A-Za-z]+)
      | (?P<row>\\\\)
      | (?P<brace>\\[{}|])
      | (?P<percent>\\?%)
      | (?P<text>⟪[^⟫]*⟫)
      | (?P<letters>[A-Za-z]+)
      | (?P<sign>\.\.\.|<=|>=|!=|\*\*|[-+*/^_(){}\[\]|<>=,;:!'&])""",
    re.VERBOSE,
)


def tokens_of(text: str) -> list[Token]:
    """The tokens of an answer. Raises UnparsedError for text that is too long, too deep, or holds something unknown."""
    if len(text) > MAX_CHARS:
        raise UnparsedError(f"it is longer than {MAX_CHARS} characters")
    plain = _plain_latex(text)
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", plain):
        raise UnparsedError(f"a number has more than {MAX_DIGITS} digits")
    tokens: list[Token] = []
    place = 0
    has_space = False
    while place < len(plain):
        match = LEXEMES.match(plain, place)
        if match is None or match.lastgroup is None:
            raise UnparsedError(f"{plain[place]!r} has no meaning here")
        place = match.end()
        if match.lastgroup == "space":
            has_space = True
            continue
        tokens += _tokens(match, tokens, has_space)
        has_space = False
    if not tokens or len(tokens) > MAX_TOKENS:
        raise UnparsedError("it is empty" if not tokens else f"it has more than {MAX_TOKENS} tokens")
    _check_brackets(tokens)
    return tokens


def _plain_latex(text: str) -> str:
    text = _raised(_raised(text, "<super>", "^"), "<sub>", "_")
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    text = "".join(SYMBOLS.get(character, character) for character in text)
    # A space keeps the whole part of 2½ apart.
    text = "".join(f" {c}" if unicodedata.decomposition(c).startswith("<fraction>") else c for c in text)
    text = VULGAR.sub(r"\1/\2", unicodedata.normalize("NFKC", text))
    text = "".join(SYMBOLS.get(c, c) for c in text if unicodedata.category(c) != "Cf")
    text = text.replace(r"\(", " ").replace(r"\)", " ").replace(r"\[", " ").replace(r"\]", " ")
    text = text.replace(r"\$", r"\dollar ")
    text = text.replace("$", r"\dollar " if text.count("$") == 1 else " ")
    text = re.sub(r"^\s*\*\*(.*)\*\*\s*$", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", r"\\circ ", text)
    text = re.sub(r"\\mathbb\s*\{?R\}?", r"\\reals ", text)
    text = re.sub(WRAPPERS, lambda found: f" ⟪{' '.join(found[1].replace('~', ' ').split())}⟫ ", text)
    text = GROUPED.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    text = DOTTED.sub(r"⟦\1,\2,\3⟧", REPEATING.sub(r"⟦\1,\2,\3⟧", text))
    text = text.strip()
    while text.endswith((".", ",", ";", ":")) and not text.endswith(("...", r"\,", r"\;", r"\:")):
        text = text[:-1].rstrip()
    return text


def _raised(text: str, form: str, mark: str) -> str:
    """Superscript or subscript characters, such as those of 2⁽ⁿ⁺¹⁾, as an exponent or an index."""
    pieces = []
    for is_raised, run in itertools.groupby(text, lambda c: unicodedata.decomposition(c).startswith(form)):
        plain = "".join(run)
        if is_raised:
            codes = [code for c in plain for code in unicodedata.decomposition(c).split()[1:]]
            plain = f"{mark}{{{''.join(chr(int(code, 16)) for code in codes)}}}"
        pieces.append(plain)
    return "".join(pieces)


def _tokens(match: re.Match[str], before: list[Token], has_space: bool) -> list[Token]:
    kind, text = str(match.lastgroup), match[0]
    if kind == "repeating":
        return [("number", _repeating(match["whole"], match["fixed"], match["period"]))]
    if kind == "number" and has_space and before and before[-1][0] == "number":
        return [("gap", ""), ("number", Fraction(text))]
    if kind in ("number", "grouped"):
        inside = any(token in (("sign", "("), ("sign", "["), ("sign", r"\{"), ("sign", ",")) for token in before)
        if kind == "grouped" and inside:
            parts = [("number", Fraction(part)) for part in text.split(",")]
            return [token for part in parts for token in (("sign", ","), part)][1:]
        return [("number", Fraction(text.replace(",", "")))]
    if kind == "scientific":
        exponent = int(re.split("[eE]", text)[1][:8])
        if abs(exponent) > MAX_SCIENTIFIC_EXPONENT:
            raise UnparsedError(f"the exponent of {text[:20]} is beyond {MAX_SCIENTIFIC_EXPONENT}")
        return [("number", Fraction(text))]
    if kind == "command":
        name = text[1:]
        return [] if name in DROPPED else [_command(SPELLINGS.get(name, name))]
    if kind == "text":
        return [("text", text[1:-1].strip())] if text[1:-1].strip() else []
    if kind == "letters":
        return _letters(text)
    if kind == "environment":
        return [("environment", re.sub(r"\s|\*", "", text).split("}")[0] + "}")]
    if kind == "percent":
        return [("sign", "%")]
    signs = {"**": "^", "<=": "le", ">=": "ge", "!=": "ne", r"\|": "|"}
    return [_command(signs[text])] if signs.get(text, "^") in ("le", "ge", "ne") else [("sign", signs.get(text, text))]


def _command(name: str) -> Token:
    if name in ("and", "or"):
        return ("word", name)
    return ("command", name) if name.isalpha() else ("sign", name)


def _letters(text: str) -> list[Token]:
    """One letter is a variable; short runs in lower case are products of them; the rest are words."""
    if text in FUNCTION_WORDS:
        return [("command", text)]
    is_word = text.lower() in UNIT_WORDS or text.lower() in ("or", "and", "in", "is", "nan", "inf", "yes", "no")
    if len(text) == 1 or (len(text) <= 3 and text.islower() and not is_word):
        return [("letter", letter) for letter in text]
    return [("word", text)]


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    shift = 10 ** len(fixed)
    return Fraction(int(whole + fixed or "0"), shift) + Fraction(int(period), shift * (10 ** len(period) - 1))


def _check_brackets(tokens: list[Token]) -> None:
    depth = braces = 0
    for kind, value in tokens:
        if kind != "sign":
            continue
        depth += (value in ("(", "[", "{", r"\{")) - (value in (")", "]", "}", r"\}"))
        braces += (value == "{") - (value == "}")
        if depth > MAX_DEPTH or braces < 0:
            raise UnparsedError("brackets are nested too deep" if depth > MAX_DEPTH else "a brace is never opened")
    if braces:
        raise UnparsedError("a brace is never closed")
