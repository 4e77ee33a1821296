"""Twins of tests: the same source with one thing that a test compares with altered, so that a right program fails it.

A program that runs beside its tests can read them and forge their outcome. What it cannot tell is which literal is the
altered one, unless it knows the answers. Literals are altered in place, with their spelling and layout kept. Only where
a test compares with no literal its comparison is turned round, which is easier to see.
"""

import ast
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

NEGATED = {
    ast.Eq: "!=", ast.NotEq: "==", ast.Lt: ">=", ast.GtE: "<", ast.Gt: "<=", ast.LtE: ">", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
COMPARING = frozenset({
    "assertEqual", "assertEquals", "assertAlmostEqual", "assertListEqual", "assertDictEqual", "assertTupleEqual",
    "assertSetEqual", "assertSequenceEqual", "assertMultiLineEqual", "assertCountEqual",
})  # fmt: skip
OPPOSITE = {
    "assertTrue": "assertFalse", "assertIn": "assertNotIn", "assertEqual": "assertNotEqual", "assertIs": "assertIsNot",
    "assertIsNone": "assertIsNotNone", "assertIsInstance": "assertNotIsInstance",
    "assertAlmostEqual": "assertNotAlmostEqual", "assertGreater": "assertLessEqual", "assertLess": "assertGreaterEqual",
    "assertRegex": "assertNotRegex",
}  # fmt: skip
OPPOSITE |= {value: key for key, value in OPPOSITE.items()}
RAISING = frozenset({"raises", "assertRaises"})
NEVER_RAISED = "BufferError"
IN_BODY, DEEPER, TURNED_ROUND = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace source[start:end], in bytes. rank: IN_BODY, DEEPER for literals, else TURNED_ROUND."""

    start: int
    end: int
    replacement: bytes
    rank: int


def function_of(test_id: str) -> tuple[str, str]:
    """The file of a test id, and the test's qualified name without parameters."""
    path, _, rest = test_id.partition("::")
    return path, rest.partition("[")[0]


def edits_of(files: Mapping[str, str], test_id: str, chance: random.Random) -> list[Edit]:
    """What may be altered in a test, best only. Raises ValueError when there is nothing, or no such test."""
    path, name = function_of(test_id)
    if path not in files:
        raise ValueError(f"the test {test_id} is in none of the hidden files; mend the data set")
    source = files[path].encode()
    try:
        function = _find(ast.parse(source), name.split("::"))
    except SyntaxError as error:
        raise ValueError(f"the hidden file {path} does not compile; mend the data set") from error
    if function is None:
        raise ValueError(f"the hidden files do not define the test {test_id}; mend the data set")
    edits = list(_Editor(source, chance).edits(function))
    if not edits:
        raise ValueError(f"the test {test_id} makes no comparison that can be altered; mend the data set")
    best = min(edit.rank for edit in edits)
    return [edit for edit in edits if edit.rank == best]


def apply(text: str, edits: list[Edit]) -> str:
    source = text.encode()
    for edit in sorted(edits, key=lambda edit: -edit.start):
        source = source[: edit.start] + edit.replacement + source[edit.end :]
    return source.decode()


def _find(tree: ast.AST, names: list[str]) -> ast.AST | None:
    for name in names:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in ast.iter_child_nodes(tree) if isinstance(node, kinds) and node.name == name]
        if not found:
            return None
        tree = found[-1]
    return tree


class _Editor:
    def __init__(self, source: bytes, chance: random.Random) -> None:
        self._source = source
        self._chance = chance
        self._line_starts = [0]
        for line in source.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))

    def edits(self, function: ast.AST, depth: int = 0) -> Iterator[Edit]:
        for node in ast.iter_child_nodes(function):
            if isinstance(node, ast.Assert):
                yield from self._of_condition(node.test, depth)
            elif isinstance(node, ast.Call):
                yield from self._of_call(node, depth)
            is_straight = isinstance(node, ast.With | ast.Expr | ast.Call | ast.withitem)
            yield from self.edits(node, depth if is_straight else depth + 1)

    def _of_condition(self, test: ast.expr, depth: int) -> Iterator[Edit]:
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            for value in test.values:
                yield from self._of_condition(value, depth)
        elif isinstance(test, ast.Compare) and len(test.ops) == 1:
            sides = (test.left, test.comparators[0])
            if isinstance(test.ops[0], ast.Eq | ast.Is):
                yield from self._of_sides(sides, depth)
            yield self._between(*sides, NEGATED[type(test.ops[0])])
        else:
            start, end = self._span(test)
            yield Edit(start, end, b"(not (" + self._source[start:end] + b"))", TURNED_ROUND)

    def _of_sides(self, sides: tuple[ast.expr, ast.expr], depth: int) -> Iterator[Edit]:
        literals = [list(self._literals(side)) for side in sides]
        for edits, other in zip(literals, reversed(sides), strict=True):
            if not isinstance(other, ast.Constant):
                yield from (Edit(start, end, text, DEEPER if depth else IN_BODY) for start, end, text in edits)

    def _of_call(self, call: ast.Call, depth: int) -> Iterator[Edit]:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in COMPARING and len(call.args) >= 2:
            yield from self._of_sides((call.args[0], call.args[1]), depth)
        if name in OPPOSITE and isinstance(call.func, ast.Attribute):
            _, end = self._span(call.func)
            yield Edit(end - len(name), end, OPPOSITE[name].encode(), TURNED_ROUND)
        if name in RAISING and call.args:
            start, end = self._span(call.args[0])
            yield Edit(start, end, NEVER_RAISED.encode(), TURNED_ROUND)

    def _between(self, left: ast.expr, right: ast.expr, operator: str) -> Edit:
        """Parentheses around a side stand between, so the operator is found and not assumed."""
        start, end = self._span(left)[1], self._span(right)[0]
        pattern = rb"==|!=|<=|>=|<|>|\bis\s+not\b|\bis\b|\bnot\s+in\b|\bin\b"
        found = re.search(pattern, self._source[start:end])
        assert found is not None, "a comparison has an operator"
        return Edit(start + found.start(), start + found.end(), operator.encode(), TURNED_ROUND)

    def _literals(self, node: ast.expr) -> Iterator[tuple[int, int, bytes]]:
        if isinstance(node, ast.Constant):
            start, end = self._span(node)
            altered = self._altered(node.value, self._source[start:end].decode())
            if altered is not None:
                yield start, end, altered.encode()
            return
        is_approximate = isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.approx", "approx")
        inner: list[ast.expr] = []
        if isinstance(node, ast.Call) and is_approximate:
            inner = node.args[:1]
        elif isinstance(node, ast.List | ast.Tuple | ast.Set):
            inner = node.elts
        elif isinstance(node, ast.Dict):
            inner = node.values
        elif isinstance(node, ast.UnaryOp):
            inner = [node.operand] if isinstance(node.op, ast.USub) else []
        for item in inner:
            yield from self._literals(item)

    def _altered(self, value: object, text: str) -> str | None:
        """Another value in the same spelling; None for a literal that cannot be altered safely."""
        if isinstance(value, bool):
            return str(not value)
        if isinstance(value, int | float):
            digit = re.search("[1-9]", text) or re.search("[0-9]", text)
            if digit is None or re.match("0[xXoObB]", text):
                return None
            return self._other_at(text, digit.start(), "123456789")
        if isinstance(value, str) and text[0] in "'\"" and "\\" not in text and text[0] not in text[1:-1]:
            places = [place for place in range(1, len(text) - 1) if text[place].isascii() and text[place].isalnum()]
            if not places:
                return None
            place = self._chance.choice(places)
            kind = "0123456789" if text[place].isdigit() else "abcdefghijklmnopqrstuvwxyz"
            return self._other_at(text, place, kind.upper() if text[place].isupper() else kind)
        return None

    def _other_at(self, text: str, place: int, characters: str) -> str:
        other = self._chance.choice([character for character in characters if character != text[place]])
        return text[:place] + other + text[place + 1 :]

    def _span(self, node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self._line_starts[node.lineno - 1] + node.col_offset
        return start, self._line_starts[node.end_lineno - 1] + node.end_col_offset
