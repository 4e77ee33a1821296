"""The process in which SymPy and Math-Verify run: it forks one child a comparison, which the kernel bounds and ends.

Started by math_pool.py as `python -m cispo.rewards.math_worker`. A line of JSON comes in, `{"gold": text, "found": text
or null}`, and one goes out: `{"equal": bool}`, `{"limit": why}` or `{"error": why}`. With null the gold answer is only
evaluated. A child has CPU_S of CPU time and MEMORY_MIB of address space, may open and write no file and start no
process, and ends with its comparison, so that nothing is left in memory from one to the next.

Expressions are built from our own tree, never from text by SymPy's parser, which would run it as Python.
"""

import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import sympy  # type: ignore[import-untyped]  # it has no annotations

from cispo.rewards.math_answer import Answer, parse_answer
from cispo.rewards.math_compare import Leaves, answers_equal
from cispo.rewards.math_exact import exact_value
from cispo.rewards.math_expression import Tree
from cispo.rewards.math_tokens import tokens_of

CPU_S = 1
MEMORY_MIB = 2048
DIGITS = 120
AGREEING_DIGITS = 100
EXTREME_DIGITS = 40
"""Beyond 10^40 or below 10^-40, digits that agree prove nothing: such expressions must be proven equal."""
POINTS = ((37, 29), (-53, 31), (61, 47), (-11, 13), (97, 89))
WARM_UP = (
    (r"\sqrt{8}", r"2\sqrt2"),
    (r"(x+1)^2", r"x^2+2x+1"),
    (r"\sin\frac{\pi}{3}", r"\frac{\sqrt3}{2}"),
    ("2y=4x", "2x-y=0"),
)


def serve() -> None:
    """Answer the lines of stdin until it ends, as it does when the parent is gone."""
    for gold, found in WARM_UP:
        compare(gold, found)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(_in_child(job["gold"], job["found"])), flush=True)


def _in_child(gold: str, found: str | None) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        _answer_and_exit(gold, found, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        reply = pipe.read(4096)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return {"limit": f"it takes more than {CPU_S} s of CPU time"}
        return {"error": f"the comparison was ended by signal {number}"}
    return dict(json.loads(reply)) if reply else {"error": "the comparison ended without an answer"}


def _answer_and_exit(gold: str, found: str | None, write_end: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MIB << 20, MEMORY_MIB << 20))
        for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
            resource.setrlimit(limit, (0, 0))
        reply: dict[str, Any] = {"equal": compare(gold, found)}
    except (MemoryError, RecursionError) as error:
        reply = {"limit": f"it ends in a {type(error).__name__}"}
    except Exception as error:  # whatever SymPy raises at an expression, this comparison alone has failed
        reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    os.write(write_end, json.dumps(reply).encode())
    os._exit(0)


def compare(gold: str, found: str | None) -> bool:
    """Whether the texts of two answers are equal; a gold answer alone is evaluated, and equal to itself."""
    one = parse_answer(tokens_of(gold))
    if found is None:
        for tree in leaves(one):
            sympy.N(to_sympy(tree), DIGITS)
        return True
    return answers_equal(one, parse_answer(tokens_of(found)), Leaves(same, proportional))


def leaves(answer: Answer) -> Iterator[Tree]:
    """Every scalar expression of an answer."""
    if answer.tree is not None:
        yield answer.tree
    for item in answer.items:
        yield from leaves(item)


def same(one: Tree, other: Tree) -> bool:
    """Whether two expressions are equal for all values of their variables. Agreeing digits are asked for first, as they
    are cheap; then a proof by SymPy, or Math-Verify's word where the digits cannot deceive."""
    if one == other:
        return True
    known = [_exact(tree) for tree in (one, other)]
    if None not in known:
        return bool(known[0] == known[1])
    if _has_infinity(one) or _has_infinity(other):
        return False  # equal trees were found above, and there is no reckoning with infinity
    first, second = to_sympy(one), to_sympy(other)
    if any(expression.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) for expression in (first, second)):
        return False
    if not _digits_agree(first, second):
        return False
    return _is_proven(first - second) or (_is_moderate(first, second) and _math_verify_agrees(first, second))


def proportional(one: Tree, other: Tree) -> bool:
    """Whether `one = 0` and `other = 0` are one equation: the sides differ by a constant factor other than 0."""
    first, second = to_sympy(one), to_sympy(other)
    if first.free_symbols != second.free_symbols or not first.free_symbols or not _is_moderate(first, second):
        return False
    ratios = [a / b for a, b in _values(first, second) if b != 0]
    if len(ratios) < 3 or ratios[0] == 0:
        return False
    return all(abs(ratio - ratios[0]) <= abs(ratios[0]) * sympy.Float(10, DIGITS) ** -80 for ratio in ratios)


def _has_infinity(tree: Tree) -> bool:
    return tree == ("constant", "infinity") or any(_has_infinity(part) for part in tree[1:] if isinstance(part, tuple))


def _exact(tree: Tree) -> Any:
    try:
        return exact_value(tree)
    except ValueError:
        return None


def _digits_agree(first: Any, second: Any) -> bool:
    pairs = list(_values(first, second))
    tolerance = sympy.Float(10, DIGITS) ** -AGREEING_DIGITS
    wanted = 2 if first.free_symbols | second.free_symbols else 1
    return len(pairs) >= wanted and all(abs(a - b) <= tolerance * max(abs(a), abs(b)) for a, b in pairs)


def _values(first: Any, second: Any) -> Iterator[tuple[Any, Any]]:
    """Both expressions' values, to DIGITS digits, at rational points that have nothing to do with each other."""
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    for shift in range(len(POINTS) if symbols else 1):
        point = {
            symbol: sympy.Rational(*POINTS[(shift + place) % len(POINTS)]) + sympy.Rational(place, 7 + shift)
            for place, symbol in enumerate(symbols)
        }
        values = [sympy.N(expression.subs(point), DIGITS) for expression in (first, second)]
        if all(value.is_number and value.is_finite for value in values):
            yield values[0], values[1]


def _is_proven(difference: Any) -> bool:
    return bool(difference == 0 or sympy.expand(difference) == 0 or sympy.simplify(difference) == 0)


def _is_moderate(*expressions: Any) -> bool:
    low, high = sympy.Float(10) ** -EXTREME_DIGITS, sympy.Float(10) ** EXTREME_DIGITS
    for expression in expressions:
        for part in sympy.preorder_traversal(expression):
            if part.is_number and part != 0 and not low < abs(sympy.N(part, 15)) < high:
                return False
    return True


def _math_verify_agrees(first: Any, second: Any) -> bool:
    from math_verify import verify  # type: ignore[import-untyped]  # it has no annotations

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(verify(first, second, timeout_seconds=None) or verify(second, first, timeout_seconds=None))


def to_sympy(tree: Tree) -> Any:
    """The SymPy expression of a tree; variables may be any complex number."""
    kind = tree[0]
    if kind == "number":
        return sympy.Rational(tree[1].numerator, tree[1].denominator)
    if kind == "symbol":
        return sympy.Symbol(tree[1])
    if kind == "constant":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infinity": sympy.oo}[tree[1]]
    parts = [to_sympy(part) for part in (tree[2:] if kind == "call" else tree[1:])]
    if kind == "call":
        return _call(tree[1], parts)
    if kind == "!":
        return sympy.factorial(parts[0])
    if kind == "+":
        return parts[0] + parts[1]
    if kind == "*":
        return parts[0] * parts[1]
    return parts[0] / parts[1] if kind == "/" else parts[0] ** parts[1]


def _call(name: str, parts: list[Any]) -> Any:
    if name == "root":
        is_real = parts[0].is_real and parts[0].is_negative and parts[1].is_odd
        return -((-parts[0]) ** (1 / parts[1])) if is_real else parts[0] ** (1 / parts[1])
    functions = {
        "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
        "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh,
        "tanh": sympy.tanh, "ln": sympy.log, "abs": sympy.Abs, "floor": sympy.floor, "ceil": sympy.ceiling,
        "binom": sympy.binomial,
    }  # fmt: skip
    return functions[name](*parts)


if __name__ == "__main__":
    serve()
