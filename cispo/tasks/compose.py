"""From operations to programs: one step, or one step and then another, written in one plain style.

A first step's result gets a name of its own, and the second step returns; nothing is nested. Sources are normalised by
`ast.unparse`, so that a reference and its mutants look alike.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from string import Template

from cispo.tasks.operations import Constant, Kind, Operation

Steps = tuple[Operation, ...]
"""One operation, or two of which the second takes what the first gives."""

ENTRY_POINTS = (
    "solve", "run", "calc", "work", "make", "do", "task", "step", "find", "apply", "handle", "process", "change", "get",
    "build", "fn", "func", "main", "answer", "result_of", "convert", "transform", "compute", "evaluate",
)
ARGUMENTS: dict[Kind, tuple[str, ...]] = {
    "int": ("n", "num", "a"),
    "ints": ("xs", "nums", "values"),
    "str": ("s", "text", "word"),
    "words": ("words", "names", "ws"),
    "dict": ("d", "table", "scores"),
}
EXTRA_ARGUMENTS = ("k", "m", "b")
RESULTS: dict[Kind, tuple[str, str]] = {
    "int": ("r", "q"),
    "ints": ("ys", "zs"),
    "str": ("t", "u"),
    "words": ("ts", "us"),
    "dict": ("e", "g"),
    "bool": ("r", "q"),
}
"""The name of a first step's result, and of a last step's where its code builds one up."""
HELPER = "go"


@dataclass(frozen=True)
class Draw:
    """What varies between tasks of one structure: the function's name, its arguments' names, each step's constants."""

    entry_point: str
    arguments: tuple[str, ...]
    constants: tuple[dict[str, Constant], ...]

    @property
    def signature(self) -> str:
        return f"{self.entry_point}({', '.join(self.arguments)})"


def fits(first: Operation, second: Operation) -> bool:
    """Whether `second` may follow `first`: kinds meet, two arguments at most, one recursion at most."""
    return (
        first.gives == second.takes[0]
        and len(first.takes) + len(second.takes) <= 3
        and not (first.is_recursive and second.is_recursive)
    )


def argument_kinds(steps: Steps) -> tuple[Kind, ...]:
    kinds = steps[0].takes
    for step in steps[1:]:
        kinds += step.takes[1:]
    return kinds


def draw_names(steps: Steps, rng: Random) -> Draw:
    kinds = argument_kinds(steps)
    arguments = (rng.choice(ARGUMENTS[kinds[0]]), *(rng.choice(EXTRA_ARGUMENTS) for _ in kinds[1:]))
    entry_point = rng.choice([name for name in ENTRY_POINTS if name not in arguments])
    return Draw(entry_point, arguments, tuple(draw_constants(step, rng) for step in steps))


def draw_constants(step: Operation, rng: Random) -> dict[str, Constant]:
    return {name: rng.choice(values) for name, values in step.constants.items()}


def write_source(steps: Steps, draw: Draw) -> str:
    """The program as text, without a newline at its end."""
    if len(steps) == 1 and steps[0].is_recursive:
        body = _fill(steps[0].body, draw.constants[0], a=draw.arguments[0], f=draw.entry_point)
        return normalise(f"def {draw.signature}:\n{_indent(body)}")
    helpers: list[str] = []
    lines: list[str] = []
    operand, extras = draw.arguments[0], list(draw.arguments[1:])
    for index, (step, constants) in enumerate(zip(steps, draw.constants, strict=True)):
        is_last = index == len(steps) - 1
        result = RESULTS[step.gives][1 if index else 0]
        names = {"a": operand}
        if len(step.takes) == 2:
            names["b"] = extras.pop(0)
        if step.is_recursive:
            helpers.append(_helper(step, constants))
            lines_of_step = [f"{HELPER}({operand})"]
        else:
            lines_of_step = _fill(step.body, constants, u=result, **names).split("\n")
        lines += lines_of_step[:-1]
        value = lines_of_step[-1]
        if is_last:
            lines.append(f"return {value}")
        elif value.isidentifier():
            operand = value
        else:
            lines.append(f"{result} = {value}")
            operand = result
    function = f"def {draw.signature}:\n{_indent(chr(10).join(lines))}"
    return normalise("\n\n".join([*helpers, function]))


def write_phrase(steps: Steps, draw: Draw, rng: Random) -> str:
    """What the program does, as an imperative phrase: "keep the even numbers, then sum them" and its kind."""
    join = rng.choice(JOINS)
    between = "it" if join.startswith("$q") else rng.choice(BETWEEN)
    phrases = []
    extras = list(draw.arguments[1:])
    for index, (step, constants) in enumerate(zip(steps, draw.constants, strict=True)):
        names = {"a": between if index else draw.arguments[0]}
        if len(step.takes) == 2:
            names["b"] = extras.pop(0)
        phrases.append(_fill(rng.choice(step.phrases), constants, **names))
    if len(phrases) == 1:
        return phrases[0]
    return Template(join).substitute(p=phrases[0], q=phrases[1])


JOINS = (
    "$p, then $q", "$p and then $q", "first $p, then $q", "$p; after that $q", "$p, next $q", "$p; finally $q",
    "$q, but first $p",
)
BETWEEN = ("it", "it", "the result")
"""What a second step calls the value that it takes."""
FRAMES = (
    "Write $f: $p.", "Write $f to $p.", "Make $f $p.", "Define $f: $p.", "Let $f $p.", "$f should $p.",
)


def write_prompt(steps: Steps, draw: Draw, rng: Random) -> str:
    """The whole specification, with the signature."""
    phrase = write_phrase(steps, draw, rng)
    return Template(rng.choice(FRAMES)).substitute(f=f"`{draw.signature}`", p=phrase)


def normalise(source: str) -> str:
    return ast.unparse(ast.parse(source))


def _helper(step: Operation, constants: dict[str, Constant]) -> str:
    argument = ARGUMENTS[step.takes[0]][0]
    body = _fill(step.body, constants, a=argument, f=HELPER)
    return f"def {HELPER}({argument}):\n{_indent(body)}"


def _fill(text: str, constants: dict[str, Constant], **names: str) -> str:
    return Template(text).substitute(constants, **names)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def pairs(operations: Sequence[Operation]) -> list[Steps]:
    """All compositions of two operations whose kinds fit, in order."""
    return [(first, second) for first in operations for second in operations if fits(first, second)]
