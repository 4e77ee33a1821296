"""One scalar expression: from tokens to a tree.

A tree is a tuple: ("number", Fraction), ("symbol", name), ("constant", "pi" | "e" | "i" | "infinity"), ("+", a, b),
("*", a, b), ("/", a, b), ("^", a, b), ("!", a), or ("call", name, *arguments). What people read in two ways is refused:
`1/2x`, `x2`, `\\sqrt23`, `5!!`, `f(x)`. A bare `\\log` has an unknown base, so that it is neither ln nor log10.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from cispo.rewards.math_tokens import Token, UnparsedError

Tree = tuple[Any, ...]

_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell"
)
GREEK = frozenset(_GREEK.split())
_CALLS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp abs"
CALLS = frozenset(_CALLS.split())
INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
END: Token = ("end", "")


def parse_expression(tokens: Sequence[Token]) -> Tree:
    """The tree of an expression. Raises UnparsedError unless every token has its place in it."""
    parser = _Parser(list(tokens))
    try:
        tree = parser.sum()
    except RecursionError as error:
        raise UnparsedError("it is nested too deep") from error
    if parser.next != END:
        raise UnparsedError(f"{parser.next[1]!r} is out of place")
    return tree


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.place = 0

    @property
    def next(self) -> Token:
        return self.tokens[self.place] if self.place < len(self.tokens) else END

    def take(self) -> Token:
        token = self.next
        self.place += 1
        return token

    def takes(self, *signs: str) -> bool:
        if self.next[0] == "sign" and self.next[1] in signs:
            self.place += 1
            return True
        return False

    def expect(self, kind: str, value: str) -> None:
        if self.take() != (kind, value):
            raise UnparsedError(f"{value!r} is missing")

    def sum(self) -> Tree:
        is_negative = self.takes("-")
        if not is_negative:
            self.takes("+")
        tree = self.product()
        tree = _negative(tree) if is_negative else tree
        while self.next in (("sign", "+"), ("sign", "-")):
            is_minus = self.take()[1] == "-"
            term = self.product()
            tree = ("+", tree, _negative(term) if is_minus else term)
        return tree

    def product(self) -> Tree:
        tree = self.power()
        is_after_slash = False
        while True:
            if self.takes("*"):
                tree, is_after_slash = ("*", tree, self.signed_power()), False
            elif self.takes("/"):
                tree, is_after_slash = ("/", tree, self.signed_power()), True
            elif self.starts_factor():
                if is_after_slash:
                    raise UnparsedError("a product right after a slash has two readings")
                tree = self.adjoined(tree)
            else:
                return tree

    def adjoined(self, tree: Tree) -> Tree:
        """Two factors side by side; a whole number before a fraction is a mixed number."""
        if self.next == ("gap", ""):
            self.take()
            part = self.mixed_part()
            if tree[0] != "number" or tree[1].denominator != 1:
                raise UnparsedError("two numbers side by side have no meaning")
            return ("number", tree[1] + part)
        is_fraction = self.next == ("command", "frac")
        factor = self.power()
        if is_fraction and tree[0] == "number" and _is_whole_fraction(factor):
            value = factor[1][1] / factor[2][1]
            if tree[1].denominator != 1 or not 0 < value < 1:
                raise UnparsedError("a number before a fraction has two readings")
            return ("number", tree[1] + value)
        return ("*", tree, factor)

    def mixed_part(self) -> Fraction:
        above, slash, below = self.take(), self.take(), self.take()
        is_fraction = above[0] == below[0] == "number" and slash == ("sign", "/") and below[1] > 0
        if not is_fraction or above[1] >= below[1] or above[1].denominator * below[1].denominator != 1:
            raise UnparsedError("two numbers side by side have no meaning")
        return Fraction(above[1], below[1])

    def starts_factor(self) -> bool:
        kind, value = self.next
        if kind == "sign":
            return value in ("(", "{")
        if kind == "command":
            return value in GREEK or value in CALLS or value in ("frac", "sqrt", "pi", "binom", "lfloor", "lceil")
        return kind in ("letter", "gap")

    def signed_power(self) -> Tree:
        if self.takes("-"):
            return _negative(self.power())
        self.takes("+")
        return self.power()

    def power(self) -> Tree:
        base = self.postfixed()
        if not self.takes("^"):
            return base
        exponent = self.argument(is_exponent=True)
        if self.next == ("sign", "^"):
            raise UnparsedError("a tower of powers needs braces")
        return self.postfix(("^", base, exponent))

    def postfixed(self) -> Tree:
        return self.postfix(self.atom())

    def postfix(self, tree: Tree) -> Tree:
        if self.takes("!"):
            tree = ("!", tree)
            if self.next == ("sign", "!"):
                raise UnparsedError("a double factorial has two readings")
        if self.takes("%"):
            tree = ("/", tree, ("number", Fraction(100)))
        if self.next == ("command", "circ"):
            self.take()
            tree = ("/", ("*", tree, ("constant", "pi")), ("number", Fraction(180)))
        return tree

    def argument(self, *, is_exponent: bool = False) -> Tree:
        """What a command applies to: a braced expression, or one short token."""
        if is_exponent and self.next in (("sign", "-"), ("sign", "+")):
            is_negative = self.take()[1] == "-"
            tree = self.argument()
            return _negative(tree) if is_negative else tree
        kind, value = self.next
        if kind == "number" and not is_exponent and (value.denominator != 1 or value >= 10):
            raise UnparsedError("a number of several digits needs braces here")
        return self.atom()

    def atom(self) -> Tree:
        kind, value = self.take()
        if kind == "number":
            return ("number", value)
        if kind == "letter":
            return self.symbol(value)
        if kind == "sign" and value in ("(", "{", "["):
            tree = self.sum()
            self.expect("sign", {"(": ")", "{": "}", "[": "]"}[value])
            return tree
        if kind == "sign" and value == "|":
            tree = self.sum()
            self.expect("sign", "|")
            return ("call", "abs", tree)
        if kind == "command":
            return self.command(value)
        raise UnparsedError(f"{value!r} is out of place" if value else "it ends too early")

    def symbol(self, name: str) -> Tree:
        if name in ("e", "i") and self.next != ("sign", "_"):
            return ("constant", name)
        if self.takes("_"):
            index = self.take()
            if index == ("sign", "{"):
                index = self.take()
                self.expect("sign", "}")
            if index[0] not in ("number", "letter"):
                raise UnparsedError("an index must be a number or a letter")
            name = f"{name}_{index[1]}"
        if self.next == ("sign", "(") and name in ("f", "g", "h"):
            raise UnparsedError("the value of a function that is not known")
        return ("symbol", name)

    def command(self, name: str) -> Tree:
        if name in ("frac", "binom"):
            above = self.short_number() or self.argument()
            below = self.argument()
            return ("/", above, below) if name == "frac" else ("call", "binom", above, below)
        if name == "sqrt":
            degree: Tree = ("number", Fraction(2))
            if self.takes("["):
                degree = self.sum()
                self.expect("sign", "]")
            return ("call", "root", self.argument(), degree)
        if name in ("pi", "infty"):
            return ("constant", "pi" if name == "pi" else "infinity")
        if name in GREEK:
            return self.symbol(name)
        if name in ("lfloor", "lceil"):
            tree = self.sum()
            self.expect("command", {"lfloor": "rfloor", "lceil": "rceil"}[name])
            return ("call", {"lfloor": "floor", "lceil": "ceil"}[name], tree)
        if name in CALLS:
            return self.call(name)
        raise UnparsedError(f"\\{name} has no meaning here")

    def short_number(self) -> Tree | None:
        """The first of the two digits in \\frac12, whose second is left for the denominator."""
        kind, value = self.next
        if kind != "number" or value.denominator != 1 or not 10 <= value <= 99:
            return None
        self.tokens[self.place] = ("number", Fraction(value % 10))
        return ("number", Fraction(value.numerator // 10))

    def call(self, name: str) -> Tree:
        power: Tree | None = None
        base: Tree = ("symbol", "the base of log")
        if name == "log" and self.takes("_"):
            base = self.argument()
            if self.next == ("gap", ""):
                self.take()
        if self.takes("^"):
            power = self.argument(is_exponent=True)
            if power == _negative(("number", Fraction(1))):
                if name not in INVERSES:
                    raise UnparsedError(f"{name} to the power of -1 has two readings")
                name, power = INVERSES[name], None
        inside = self.call_argument()
        if name == "exp":
            tree: Tree = ("^", ("constant", "e"), inside)
        elif name == "log":
            tree = ("/", ("call", "ln", inside), ("call", "ln", base))
        else:
            tree = ("call", name, inside)
        return tree if power is None else ("^", tree, power)

    def call_argument(self) -> Tree:
        if self.next in (("sign", "("), ("sign", "{"), ("sign", "[")):
            return self.postfixed()
        tree = self.power()
        while self.starts_factor() and not (self.next[0] == "command" and self.next[1] in CALLS):
            if self.next in (("sign", "("), ("sign", "{"), ("gap", "")):
                raise UnparsedError("a function's argument needs brackets here")
            tree = ("*", tree, self.power())
        return tree


def _negative(tree: Tree) -> Tree:
    return ("number", -tree[1]) if tree[0] == "number" else ("*", ("number", Fraction(-1)), tree)


def _is_whole_fraction(tree: Tree) -> bool:
    return tree[0] == "/" and all(
        part[0] == "number" and part[1].denominator == 1 and part[1] > 0 for part in tree[1:]
    )
