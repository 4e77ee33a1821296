"""The form of an answer: a value with its unit, a list, set, tuple, interval, union, matrix, equation or word.

`parse_answer` reads tokens into an Answer whose leaves are scalar expressions; math_compare.py compares two of them.
`(1,2)` is both a pair and an interval, which compare alike. An inequality in one variable is read as the interval it
means. A percent sign is a factor and never left out: `50%` is `1/2` and not `50`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from cispo.rewards.math_expression import Tree, parse_expression
from cispo.rewards.math_tokens import Token, UnparsedError
from cispo.rewards.math_units import Unit, unit_of

OPEN = ("(", "[", "{", r"\{")
CLOSE = (")", "]", "}", r"\}")
RELATIONS = {"<": "<", ">": ">", "le": "<=", "ge": ">="}
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
INFINITY: Tree = ("constant", "infinity")
MINUS_INFINITY: Tree = ("*", ("number", Fraction(-1)), INFINITY)
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MAX_ITEMS = 100
COMMAS: tuple[Token, ...] = (("sign", ","), ("sign", ";"), ("word", "and"), ("text", "and"))
SEPARATORS: tuple[Token, ...] = (*COMMAS, ("word", "or"), ("text", "or"))


@dataclass(frozen=True)
class Answer:
    """kind: scalar, word, list, set, union, matrix, equation, based; or bracket, whose `name` is such as `(]`.

    name: the word, the brackets, the kind of matrix, or the digits and base of a number written in another base.
    variable: what an answer such as `x=5` says it is the value of.
    """

    kind: str
    name: str = ""
    tree: Tree | None = None
    items: tuple["Answer", ...] = ()
    unit: Unit | None = None
    variable: str = ""


def parse_answer(tokens: Sequence[Token]) -> Answer:
    """Raises UnparsedError unless all of the tokens can be read in one way."""
    tokens = _without_outer_braces(list(tokens))
    if len(tokens) > 1 and tokens[0] == ("sign", "="):
        tokens = tokens[1:]
    parts = _split(tokens, lambda token: token in SEPARATORS)
    if len(parts) == 1:
        return _parse_one(tokens)
    found = _group("list", [part for part in parts if part], tokens)
    if not any(_has_relation(part) for part in parts):
        return found
    variables = {item.variable for item in found.items}
    if len(variables) != 1 or any(token in COMMAS for token in tokens):
        raise UnparsedError("whether all or any of the conditions must hold is not said")
    return Answer("union", items=found.items, variable=variables.pop())


def _has_relation(tokens: Sequence[Token]) -> bool:
    return any(value in RELATIONS or value == "in" for _, value in tokens)


def _parse_one(tokens: list[Token]) -> Answer:
    if not tokens:
        raise UnparsedError("it has an empty part")
    for parse in (_word, _plus_minus, _membership, _relation, _equation, _union, _matrix, _bracketed, _based):
        found = parse(tokens)
        if found is not None:
            return found
    return _scalar(tokens)


def _group(kind: str, parts: Sequence[list[Token]], tokens: Sequence[Token], name: str = "") -> Answer:
    if len(parts) > MAX_ITEMS:
        raise UnparsedError(f"it has more than {MAX_ITEMS} parts")
    return Answer(kind, name, items=tuple(_parse_one(_without_outer_braces(part)) for part in parts))


def _word(tokens: list[Token]) -> Answer | None:
    if tokens in ([("command", "emptyset")], [("sign", r"\{"), ("sign", r"\}")]):
        return Answer("set")
    if tokens == [("command", "reals")] or _joined(tokens) in ("all real numbers", "all reals"):
        return _interval("(", MINUS_INFINITY, INFINITY, ")")
    if len(tokens) == 3 and tokens[0] == ("sign", "(") and tokens[2] == ("sign", ")"):
        is_choice = tokens[1][0] == "letter" or (tokens[1][0] == "text" and len(tokens[1][1]) == 1)
        tokens = [tokens[1]] if is_choice else tokens
    if all(kind in ("word", "text") for kind, _ in tokens):
        text = " ".join(str(value) for _, value in tokens).strip("().")
        if text.lower() in ("nan", "") or any(character.isdigit() for character in text):
            raise UnparsedError("it is no value")
        return _symbol_or_word(text)
    if len(tokens) > 1 and all(kind == "letter" for kind, _ in tokens) and len(tokens) <= 3:
        # Whether abc is a product or a name is not known; as a name it has one order.
        return Answer("word", "".join(value for _, value in tokens))
    return None


def _joined(tokens: Sequence[Token]) -> str:
    return " ".join(str(value) for kind, value in tokens if kind in ("word", "text")).lower()


def _symbol_or_word(text: str) -> Answer:
    if len(text) == 1:
        return Answer("scalar", tree=parse_expression([("letter", text)]))
    is_name = text.isupper() and " " not in text
    return Answer("word", text if is_name else text.casefold())


def _plus_minus(tokens: list[Token]) -> Answer | None:
    signs = (("command", "pm"), ("command", "mp"))
    if not any(token in signs for token in tokens) or any(token in (("sign", "="), ("sign", ",")) for token in tokens):
        if any(token in signs for token in tokens) and tokens[1:2] == [("sign", "=")]:
            inner = _plus_minus(tokens[2:])
            return None if inner is None else _with_variable(inner, str(tokens[0][1]))
        return None
    both = [
        [("sign", first if token == signs[0] else second) if token in signs else token for token in tokens]
        for first, second in (("+", "-"), ("-", "+"))
    ]
    return _group("list", both, tokens)


def _membership(tokens: list[Token]) -> Answer | None:
    """`x \\in S`, and `\\{x | condition\\}`."""
    if len(tokens) > 2 and tokens[0][0] == "letter" and tokens[1] in (("command", "in"), ("word", "in")):
        return _with_variable(parse_answer(tokens[2:]), tokens[0][1])
    if len(tokens) > 5 and tokens[0] == ("sign", r"\{") and tokens[-1] == ("sign", r"\}"):
        inside = tokens[1:-1]
        bar = 3 if inside[1:3] == [("command", "in"), ("command", "reals")] else 1
        if inside[0][0] == "letter" and inside[bar] in (("sign", "|"), ("sign", ":")):
            return _relation(inside[bar + 1 :])
    return None


def _relation(tokens: list[Token]) -> Answer | None:
    """An inequality in one variable as the interval it means."""
    places = [place for place, (_, value) in enumerate(tokens) if value in RELATIONS]
    if not places:
        return None
    if len(places) > 2:
        raise UnparsedError("it has too many inequality signs")
    signs = [RELATIONS[str(tokens[place][1])] for place in places]
    sides = [tokens[start + 1 : end] for start, end in zip([-1, *places], [*places, len(tokens)], strict=True)]
    if len(signs) == 2:
        low, variable, high = sides
        if signs[0][0] != signs[1][0]:
            raise UnparsedError("its inequality signs point in two directions")
        if signs[0][0] == ">":
            low, high, signs = high, low, [FLIPPED[signs[1]], FLIPPED[signs[0]]]
        ends = (_bracket_of(signs[0], "(", "["), parse_expression(low), parse_expression(high),
                _bracket_of(signs[1], ")", "]"))  # fmt: skip
    else:
        left, right = sides
        variable, bound, sign = (left, right, signs[0]) if _is_variable(left) else (right, left, FLIPPED[signs[0]])
        value = parse_expression(bound)
        ends = (("(", MINUS_INFINITY, value, _bracket_of(sign, ")", "]")) if sign[0] == "<" else
                (_bracket_of(sign, "(", "["), value, INFINITY, ")"))  # fmt: skip
    if not _is_variable(variable):
        raise UnparsedError("the inequality is not of one variable")
    return _with_variable(_interval(*ends), _name(variable))


def _bracket_of(sign: str, open_one: str, closed_one: str) -> str:
    return closed_one if sign.endswith("=") else open_one


def _interval(left: str, low: Tree, high: Tree, right: str) -> Answer:
    return Answer("bracket", left + right, items=(Answer("scalar", tree=low), Answer("scalar", tree=high)))


def _is_variable(tokens: Sequence[Token]) -> bool:
    """A letter, with or without an index, or a letter applied to a letter as in f(x)."""
    if not tokens or tokens[0][0] not in ("letter", "command") or tokens[0][1] in ("e", "i", "pi", "infty"):
        return False
    rest = [value for _, value in tokens[1:]]
    kinds = [kind for kind, _ in tokens[1:]]
    if tokens[0][0] == "command" and len(str(tokens[0][1])) > 8:
        return False
    is_index = rest[:1] == ["_"] and all(kind != "sign" or value in "_{}" for kind, value in tokens[1:])
    is_call = len(rest) == 3 and rest[0] == "(" and rest[2] == ")" and kinds[1] == "letter"
    return not rest or is_index or is_call


def _name(tokens: Sequence[Token]) -> str:
    return "".join(str(value) for _, value in tokens if value not in ("{", "}"))


def _equation(tokens: list[Token]) -> Answer | None:
    sides = _split(tokens, lambda token: token == ("sign", "="))
    if len(sides) == 1:
        return None
    if len(sides) > 2:
        raise UnparsedError("it has several equals signs")
    for variable, value in (sides, sides[::-1]):
        if _is_variable(variable) and variable[0] not in value:
            return _with_variable(_parse_one(value), _name(variable))
    names, values = sides
    if names[:1] == [("sign", "(")] and values[:1] == [("sign", "(")] and all(
        kind == "letter" or value in ("(", ",", ")") for kind, value in names
    ):
        return _with_variable(_parse_one(values), _name(names))
    trees = [parse_expression(side) for side in sides]
    return Answer("equation", tree=("+", trees[0], ("*", ("number", Fraction(-1)), trees[1])))


def _with_variable(answer: Answer, name: str) -> Answer:
    if answer.variable and answer.variable != name:
        raise UnparsedError("it names two variables")
    return Answer(answer.kind, answer.name, answer.tree, answer.items, answer.unit, name)


def _union(tokens: list[Token]) -> Answer | None:
    parts = _split(tokens, lambda token: token == ("command", "cup"))
    return _group("union", parts, tokens) if len(parts) > 1 else None


def _matrix(tokens: list[Token]) -> Answer | None:
    start = 1 if len(tokens) > 2 and tokens[0] in (("sign", "("), ("sign", "[")) else 0
    inside = tokens[start : len(tokens) - start]
    if not inside or inside[0][0] != "environment":
        return None
    name = str(inside[0][1]).removeprefix(r"\begin{").rstrip("}")
    if inside[-1] != ("environment", rf"\end{{{name}}}") or name not in ("matrix", "pmatrix", "bmatrix", "array"):
        raise UnparsedError(f"{name} is no matrix that is read here")
    rows = _split(inside[1:-1], lambda token: token == ("sign", "\\\\"))
    rows = rows[:-1] if rows and not rows[-1] else rows
    cells = tuple(_group("row", _split(row, lambda token: token == ("sign", "&")), tokens) for row in rows)
    if not cells or len({len(row.items) for row in cells}) != 1:
        raise UnparsedError("the rows of the matrix differ in length")
    return Answer("matrix", items=cells)


def _bracketed(tokens: list[Token]) -> Answer | None:
    left, right = tokens[0], tokens[-1]
    if left[0] != "sign" or right[0] != "sign" or len(tokens) < 3:
        return None
    if left[1] == r"\{" and right[1] == r"\}" and _closes_at_end(tokens):
        return _group("set", _split(tokens[1:-1], lambda token: token == ("sign", ",")), tokens)
    is_french = left[1] == "]" or (right[1] == "[" and left[1] in "[(")
    if not is_french and not (left[1] in ("(", "[") and right[1] in (")", "]") and _closes_at_end(tokens)):
        return None
    parts = _split(tokens[1:-1], lambda token: token in (("sign", ","), ("sign", ";")))
    if len(parts) < 2:
        return None
    name = ("(" if left[1] == "]" else str(left[1])) + (")" if right[1] == "[" else str(right[1]))
    return _group("bracket", parts, tokens, name)


def _closes_at_end(tokens: Sequence[Token]) -> bool:
    depth = 0
    for place, (kind, value) in enumerate(tokens):
        if kind == "sign":
            depth += (value in OPEN) - (value in CLOSE)
        if depth == 0:
            return place == len(tokens) - 1
    return False


def _based(tokens: list[Token]) -> Answer | None:
    values = [value for _, value in tokens if value not in ("{", "}")]
    if len(values) != 3 or values[1] != "_" or tokens[0][0] != "number" or not isinstance(values[2], Fraction):
        return None
    return Answer("based", f"{values[0]}_{values[2]}")


def _scalar(tokens: list[Token]) -> Answer:
    tokens, unit = _split_unit(tokens)
    while tokens and tokens[-1][0] in ("word", "text") and str(tokens[-1][1]).lower() in SCALES:
        scale = SCALES[str(tokens[-1][1]).lower()]
        tokens = [*tokens[:-1], ("sign", "*"), ("number", Fraction(scale))]
    return Answer("scalar", tree=parse_expression(tokens), unit=unit)


def _split_unit(tokens: list[Token]) -> tuple[list[Token], Unit | None]:
    """The unit before or after a value; a single letter is one only inside \\text{}."""
    money: Unit = ("money", Fraction(1))
    if ("command", "dollar") in tokens:
        place = tokens.index(("command", "dollar"))
        rest = tokens[:place] + tokens[place + 1 :]
        if place <= 1 or place == len(tokens) - 1:
            return rest, money
    if len(tokens) > 1 and tokens[-1] == ("command", "circ") and not any(kind == "command" for kind, _ in tokens[:-1]):
        return tokens[:-1], ("angle", Fraction(1))
    power = 1
    last = list(tokens)
    values = [value for _, value in last[-4:]]
    if values[-3:] and values[-2:-1] == ["^"] and last[-1][0] == "number":
        power, last = int(last[-1][1]) if last[-1][1] in (2, 3) else 0, last[:-2]
    elif len(values) == 4 and values[0] == "^" and values[1] == "{" and values[3] == "}" and values[2] in (2, 3):
        power, last = int(values[2]), last[:-4]
    words: list[str] = []
    while len(last) > 1 and last[-1][0] in ("word", "text") and str(last[-1][1]).lower() not in SCALES:
        words.insert(0, str(last.pop()[1]))
    if not words:
        return tokens, None
    text = " ".join(words)
    if text.lower() in ("percent", "%", r"\%"):
        return [*last, ("sign", "%")], None
    unit = unit_of(text, power) if power else None
    if unit is None:
        raise UnparsedError(f"the unit {text[:40]!r} is not known")
    return last, unit


def _without_outer_braces(tokens: list[Token]) -> list[Token]:
    while len(tokens) > 2 and tokens[0] == ("sign", "{") and _closes_at_end(tokens):
        tokens = tokens[1:-1]
    return tokens


def _split(tokens: Sequence[Token], is_separator: Callable[[Token], bool]) -> list[list[Token]]:
    parts: list[list[Token]] = [[]]
    depth = 0
    for place, token in enumerate(tokens):
        if token[0] == "environment":
            depth += 1 if str(token[1]).startswith(r"\begin") else -1
        elif token[0] == "sign":
            is_french = place == 0 and token[1] == "]"
            depth += 1 if is_french else (token[1] in OPEN) - (token[1] in CLOSE)
        if depth == 0 and is_separator(token):
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
