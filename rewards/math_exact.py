"""The exact value of an expression, where that is rational; numbers beyond a bound are refused, not computed."""

import functools
import math
from fractions import Fraction

from cispo.rewards.math_expression import Tree
from cispo.rewards.math_tokens import UnparsedError

MAX_BITS = 100_000
"""Bits of the largest numerator or denominator that is computed exactly."""
MAX_FACTORIAL = 5000
MAX_CACHED = 1024
"""Values kept: more than the parts of one comparison, which are asked for again and again on the way up."""


@functools.lru_cache(MAX_CACHED)
def exact_value(tree: Tree) -> Fraction | None:
    """The value where it is rational and found by arithmetic alone, else None.

    Raises UnparsedError for a division by 0 and for numbers beyond MAX_BITS.
    """
    kind = tree[0]
    if kind == "number":
        return _bounded(tree[1])
    if kind in ("symbol", "constant"):
        return None
    values = [exact_value(part) for part in (tree[2:] if kind == "call" else tree[1:])]
    known = [value for value in values if value is not None]
    if len(known) != len(values):
        return None
    if kind == "call":
        return _call_value(tree[1], known)
    if kind == "!":
        return _factorial(known[0])
    first, second = known
    if kind == "+":
        return _bounded(first + second)
    if kind == "*":
        return _bounded(first * second)
    if kind == "/":
        if second == 0:
            raise UnparsedError("it divides by 0")
        return _bounded(first / second)
    return _power(first, second)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise UnparsedError("its value is too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if base == 0 and exponent <= 0:
        raise UnparsedError("0 to a power that is not positive has no value")
    if exponent.denominator > 64 or _bits(base) * abs(exponent.numerator) > MAX_BITS:
        raise UnparsedError("its value is too large")
    root = _root(base, exponent.denominator)
    return None if root is None or (base < 0 and exponent.denominator != 1) else _bounded(root**exponent.numerator)


def _root(value: Fraction, degree: int) -> Fraction | None:
    """The real root where it is rational."""
    if degree == 1 or value == 0:
        return value
    if value < 0:
        root = _root(-value, degree) if degree % 2 else None
        return None if root is None else -root
    parts = [_integer_root(part, degree) for part in (value.numerator, value.denominator)]
    return None if parts[0] is None or parts[1] is None else Fraction(parts[0], parts[1])


def _integer_root(value: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(value)
        return root if root * root == value else None
    # Newton's steps from above, which fall to the root in a few dozen.
    root = 1 << (-(-value.bit_length() // degree))
    while True:
        lower = ((degree - 1) * root + value // root ** (degree - 1)) // degree
        if lower >= root:
            return root if root**degree == value else None
        root = lower


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise UnparsedError("the factorial of this number is not computed")
    return _bounded(Fraction(math.factorial(value.numerator)))


def _call_value(name: str, values: list[Fraction]) -> Fraction | None:
    if name == "abs":
        return abs(values[0])
    if name in ("floor", "ceil"):
        return Fraction(math.floor(values[0]) if name == "floor" else math.ceil(values[0]))
    if name == "root":
        degree = values[1]
        if degree.denominator != 1 or not 2 <= degree <= 64:
            raise UnparsedError("the degree of a root must be a whole number from 2 to 64")
        return _root(values[0], degree.numerator)
    if name == "binom":
        above, below = values
        if above.denominator * below.denominator != 1 or not 0 <= below <= above <= MAX_FACTORIAL:
            raise UnparsedError("this binomial is not computed")
        return _bounded(Fraction(math.comb(above.numerator, below.numerator)))
    return None
