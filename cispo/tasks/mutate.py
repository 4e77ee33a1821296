"""Plausible bugs: programs of the right form and the wrong meaning.

Point mutants change one operator, comparison, constant, call, slice, branch, filter or iteration of the source. Step
mutants drop a step, swap the two, put another operation of the same kinds in the place of one, or lose an edge of the
result. Whether a mutant really differs is for the tests to say (`cispo.tasks.check`).
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from cispo.tasks.compose import Draw, Steps, draw_constants, normalise, write_source
from cispo.tasks.operations import Kind, Operation

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mod, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.Gt: (ast.GtE, ast.Lt), ast.LtE: (ast.Lt,), ast.GtE: (ast.Gt,),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}
CALLS = {
    "max": "min", "min": "max", "sum": "max", "len": "sum", "sorted": "list", "set": "list", "all": "any", "any": "all",
    "list": "sorted", "upper": "lower", "startswith": "endswith", "values": "keys", "count": "find",
    "index": "count", "split": "strip",
}


@dataclass(frozen=True)
class Mutant:
    """A bug of one kind; `build` writes its source, which may turn out equal to the reference's."""

    kind: str
    build: Callable[[], str]


def mutants(steps: Steps, draw: Draw, operations: Sequence[Operation], rng: Random) -> list[Mutant]:
    """Every mutant at hand, in an order in which the kinds take turns."""
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in [*step_mutants(steps, draw, operations, rng), *point_mutants(write_source(steps, draw))]:
        by_kind.setdefault(mutant.kind, []).append(mutant)
    for same_kind in by_kind.values():
        rng.shuffle(same_kind)
    kinds = list(by_kind)
    rng.shuffle(kinds)
    most = max(len(same_kind) for same_kind in by_kind.values())
    return [by_kind[kind][turn] for turn in range(most) for kind in kinds if turn < len(by_kind[kind])]


def point_mutants(source: str) -> list[Mutant]:
    """Every program that differs from `source` by one point change, in the order of the syntax tree."""
    return [
        Mutant(kind, partial(_change_point, source, position, choice))
        for position, node in enumerate(ast.walk(ast.parse(source)))
        for choice, (kind, _) in enumerate(_changes(node))
    ]


def _change_point(source: str, position: int, choice: int) -> str:
    tree = ast.parse(source)
    _, change = list(_changes(list(ast.walk(tree))[position]))[choice]
    change()
    return ast.unparse(tree)


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    """The changes that one node allows; each acts in place when called."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
        yield "operator", _setter(node, "op", OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Compare):
        for other in COMPARISONS.get(type(node.ops[0]), ()):
            yield "comparison", _setter(node, "ops", [other(), *node.ops[1:]])
    elif isinstance(node, ast.Constant):
        for value in _other_constants(node.value):
            yield "constant", _setter(node, "value", value)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in CALLS:
        yield "call", _setter(node, "id", CALLS[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in CALLS:
        yield "call", _setter(node, "attr", CALLS[node.attr])
    elif isinstance(node, ast.IfExp):
        yield "branch", _both(_setter(node, "body", node.orelse), _setter(node, "orelse", node.body))
    elif isinstance(node, ast.Slice) and node.step is None:
        yield "slice", _both(_setter(node, "lower", node.upper), _setter(node, "upper", node.lower))
    elif isinstance(node, ast.comprehension):
        if node.ifs:
            yield "filter", _setter(node, "ifs", [])
        yield from _iterations(node)
    elif isinstance(node, ast.For):
        yield from _iterations(node)
    elif isinstance(node, ast.DictComp):
        yield "off by one", _setter(node, "value", ast.BinOp(node.value, ast.Add(), ast.Constant(1)))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", _setter(node, "op", ast.UAdd())


def _iterations(node: ast.For | ast.comprehension) -> Iterator[tuple[str, Callable[[], None]]]:
    """Loops that miss the first or the last round, or count from 1."""
    source = node.iter
    if isinstance(source, ast.Name):
        one = ast.Constant(1)
        for part in (ast.Slice(lower=one), ast.Slice(upper=ast.UnaryOp(ast.USub(), one))):
            yield "iteration", _setter(node, "iter", ast.Subscript(source, part, ast.Load()))
    elif isinstance(source, ast.Call) and isinstance(source.func, ast.Name) and len(source.args) == 1:
        if source.func.id == "enumerate":
            yield "iteration", _setter(source, "args", [*source.args, ast.Constant(1)])
        elif source.func.id == "range":
            yield "iteration", _setter(source, "args", [ast.Constant(1), *source.args])


def _other_constants(value: object) -> tuple[object, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (value + 1, value - 1) if value > 1 else (value + 1,)
    if isinstance(value, str) and len(value) == 1 and value.isalpha():
        return (chr((ord(value) - 96) % 26 + 97),)
    return ()


def _setter(node: ast.AST, field: str, value: object) -> Callable[[], None]:
    def change() -> None:
        setattr(node, field, value)

    return change


def _both(one: Callable[[], None], other: Callable[[], None]) -> Callable[[], None]:
    def change() -> None:
        one()
        other()

    return change


def step_mutants(steps: Steps, draw: Draw, operations: Sequence[Operation], rng: Random) -> list[Mutant]:
    """Programs with a step dropped, both swapped, one replaced by another of its kinds, or a result cut at an edge."""
    found = _edge_mutants(steps, draw)
    if len(steps) == 2:
        first, second = steps
        if all(len(step.takes) == 1 for step in steps):
            if second.gives == first.takes[0] == second.takes[0]:
                swapped = Draw(draw.entry_point, draw.arguments, draw.constants[::-1])
                found.append(Mutant("order", partial(write_source, (second, first), swapped)))
            found.append(_alone(0, steps, draw))
            if second.takes[0] == first.takes[0]:
                found.append(_alone(1, steps, draw))
    for index, step in enumerate(steps):
        others = [other for other in operations if _can_replace(other, step, steps)]
        for other in rng.sample(others, min(4 - len(steps), len(others))):
            constants = list(draw.constants)
            constants[index] = draw_constants(other, rng)
            replaced = (*steps[:index], other, *steps[index + 1 :])
            changed = Draw(draw.entry_point, draw.arguments, tuple(constants))
            found.append(Mutant("operation", partial(write_source, replaced, changed)))
    return found


EDGES: dict[Kind, tuple[str, ...]] = {
    "int": (" + 1", " - 1"), "ints": ("[1:]", "[:-1]", "[::-1]"), "words": ("[1:]", "[:-1]", "[::-1]"),
    "str": ("[1:]", "[:-1]"),
}


def _edge_mutants(steps: Steps, draw: Draw) -> list[Mutant]:
    source = write_source(steps, draw)
    if steps[0].is_recursive and len(steps) == 1:
        return []
    head, value = source.rsplit("return ", 1)
    edges = EDGES.get(steps[-1].gives, ())
    return [Mutant("edge", partial(normalise, f"{head}return ({value}){edge}")) for edge in edges]


def _alone(index: int, steps: Steps, draw: Draw) -> Mutant:
    kept = Draw(draw.entry_point, draw.arguments, (draw.constants[index],))
    return Mutant("dropped", partial(write_source, (steps[index],), kept))


def _can_replace(other: Operation, step: Operation, steps: Steps) -> bool:
    return (
        other is not step
        and other.takes == step.takes
        and other.gives == step.gives
        and not (other.is_recursive and any(one.is_recursive for one in steps if one is not step))
    )
