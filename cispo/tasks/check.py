"""Runs programs on inputs, to find tests that a reference passes and its mutants fail.

Everything run here was written by this package from its own operations, so it runs in this process; what a policy
writes never comes here (that is what `cispo.sandboxes` is for). None of it changes its arguments in place.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from cispo.tasks.compose import HELPER, Draw, Steps, argument_kinds, write_source
from cispo.tasks.values import EDGES, GENERATOR_KIND, GENERATORS, is_bounded

Arguments = tuple[Any, ...]
FAILURES = (ArithmeticError, AttributeError, LookupError, NameError, RecursionError, TypeError, ValueError)
"""What a mutant may raise: it is then killed. Anything else is a fault of this package and comes through."""


MAX_TICKS = 2_000
"""Calls and loop rounds that one run may take; the references stay far below."""


MAX_REPEATS = 100_000_000
"""How often a program may repeat a text or list with `*`."""


class TooLongError(RuntimeError):
    """A mutant that runs on and on: of no use as a test of tests, nor as an example."""


class NoTestsError(ValueError):
    """Steps that make no good task: constant, undefined on most inputs, or with a step that changes nothing."""


@dataclass(frozen=True)
class Case:
    arguments: Arguments
    expected: Any

    def as_row(self) -> dict[str, Any]:
        return {"args": list(self.arguments), "expected": self.expected}


class _Ticks(ast.NodeTransformer):
    """Puts a call of `_tick` at the head of every function and loop body, and `_times` in the place of products."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Mult):
            return node
        return ast.Call(ast.Name("_times", ast.Load()), [node.left, node.right], [])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._tick(node)

    def visit_For(self, node: ast.For) -> ast.AST:
        return self._tick(node)

    def _tick(self, node: ast.FunctionDef | ast.For) -> ast.AST:
        self.generic_visit(node)
        node.body.insert(0, ast.Expr(ast.Call(ast.Name("_tick", ast.Load()), [], [])))
        return node


def _bounded_range(*bounds: int) -> range:
    result = range(*bounds)
    if len(result) > MAX_TICKS:
        raise TooLongError(f"a range of {len(result)}")
    return result


def _bounded_times(left: Any, right: Any) -> Any:
    """`left * right`, unless it repeats a text or list so often that memory, not the program, would decide."""
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list) and isinstance(other, int) and other > MAX_REPEATS:
            raise TooLongError(f"{other} repetitions")
    return left * right


def load_function(source: str, entry_point: str) -> Callable[..., Any]:
    """The function of a source that this package wrote; a call raises TooLongError after MAX_TICKS."""
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks > MAX_TICKS:
            raise TooLongError(f"{entry_point} took more than {MAX_TICKS} calls and loop rounds")

    namespace: dict[str, Any] = {"_tick": tick, "range": _bounded_range, "_times": _bounded_times}
    tree = ast.parse(source)
    if " * " in source or "    for " in source or f"{HELPER}(" in source or source.count(f"{entry_point}(") > 1:
        tree = ast.fix_missing_locations(_Ticks().visit(tree))
    exec(compile(tree, "<task>", "exec"), namespace)
    function: Callable[..., Any] = namespace[entry_point]

    def call(*arguments: object) -> object:
        nonlocal ticks
        ticks = 0
        return function(*arguments)

    return call


def same(left: object, right: object) -> bool:
    """Equality that tells True from 1, and a list from a text, at every depth."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same(x, y) for x, y in zip(left, right, strict=True))
    return left == right


def draw_cases(steps: Steps, draw: Draw, rng: Random, *, wanted: int) -> list[Case]:
    """Up to `wanted` cases, edge cases first, no input twice; refuses a program that is not worth a task.

    Each input lies in the domain of every step and gives bounded results.
    """
    stages = [
        load_function(write_source((step,), Draw("stage", _names(len(step.takes)), (constants,))), "stage")
        for step, constants in zip(steps, draw.constants, strict=True)
    ]
    cases: dict[str, Case] = {}
    for arguments in _inputs(steps, rng, attempts=3 * wanted):
        case = _run(steps, stages, arguments)
        if case is not None:
            cases.setdefault(repr(arguments), case)
        if len(cases) == wanted:
            break
    found = list(cases.values())
    results = [repr(case.expected) for case in found]
    if len(found) < min(wanted, 8) or max(results.count(result) for result in set(results)) > 0.85 * len(found):
        raise NoTestsError("too few inputs, or the same result on most")
    return found


@dataclass(frozen=True)
class Trial:
    """What became of a mutant: the indexes of the cases that kill it, and of those the number where it raised."""

    killers: tuple[int, ...]
    raised: int

    def is_plausible(self, cases: int) -> bool:
        """Killed, yet running through on most inputs, as the bugs of a near miss do."""
        return bool(self.killers) and 2 * self.raised <= cases


def try_mutant(cases: Sequence[Case], source: str, entry_point: str) -> Trial:
    """Runs a mutant on every case; one that runs too long counts as raising everywhere."""
    function = load_function(source, entry_point)
    killers, raised = [], 0
    for index, case in enumerate(cases):
        try:
            if same(function(*case.arguments), case.expected):
                continue
        except TooLongError:
            return Trial(tuple(range(len(cases))), len(cases))
        except FAILURES:
            raised += 1
        killers.append(index)
    return Trial(tuple(killers), raised)


def _names(count: int) -> tuple[str, ...]:
    return ("value", "extra")[:count]


def _run(steps: Steps, stages: Sequence[Callable[..., Any]], arguments: Arguments) -> Case | None:
    value, extras = arguments[0], list(arguments[1:])
    for step, stage in zip(steps, stages, strict=True):
        operands = (value, extras.pop(0)) if len(step.takes) == 2 else (value,)
        if not step.accepts(*operands):
            return None
        value = stage(*operands)
        if not is_bounded(value):
            return None
    return Case(arguments, value)


def _inputs(steps: Steps, rng: Random, *, attempts: int) -> list[Arguments]:
    kinds = argument_kinds(steps)
    generator = _generator(steps)
    extra = next((step.extra for step in steps if len(step.takes) == 2), ())
    values = list(EDGES[generator])
    values += [GENERATORS[generator](rng) for _ in range(attempts)]
    return [(value, *(rng.choice(extra) for _ in kinds[1:])) for value in values]


def _generator(steps: Steps) -> str:
    kind = steps[0].takes[0]
    for step in steps:
        if step.inputs and GENERATOR_KIND[step.inputs] == kind:
            return step.inputs
    return kind
