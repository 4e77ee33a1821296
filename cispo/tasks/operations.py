"""What an operation is: one small step from a value to a value, with its code and the ways to ask for it.

A body is a `string.Template`: `$a` is the operand, `$b` an extra integer argument, `$c` and `$e` constants, `$u` the
name of the result while it is built up, `$f` the function's own name in a recursive body. The last line of a body is
the result's expression; a recursive body holds its own return statements instead. Phrases use the same letters and
start with a verb, so that they fit any frame ("Write f(xs): ...", "f(xs) should ...").
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["int", "ints", "str", "words", "dict", "bool"]
"""int, list of int, lowercase text, list of such texts, dict from text to int, truth value (results only)."""

KINDS: tuple[Kind, ...] = get_args(Kind)
Constant = int | str


@dataclass(frozen=True, eq=False)
class Operation:
    """One step. `domain` says which operands it is defined on; `inputs` names a generator that suits it better than
    the kind's own (see `cispo.tasks.values`)."""

    name: str
    family: str
    takes: tuple[Kind, ...]
    gives: Kind
    body: str
    phrases: tuple[str, ...]
    constants: Mapping[str, tuple[Constant, ...]] = field(default_factory=dict)
    domain: Callable[..., bool] | None = None
    inputs: str = ""
    extra: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    is_recursive: bool = False

    def accepts(self, *operands: object) -> bool:
        return self.domain is None or self.domain(*operands)


def operation(
    name: str,
    family: str,
    types: str,
    body: str,
    *phrases: str,
    domain: Callable[..., bool] | None = None,
    inputs: str = "",
    extra: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9),
    is_recursive: bool = False,
    **constants: tuple[Constant, ...],
) -> Operation:
    """Reads `types` such as "ints, int -> ints" and builds the operation."""
    left, right = types.split(" -> ")
    takes = tuple(kind_of(part) for part in left.split(", "))
    return Operation(
        name, family, takes, kind_of(right), body, phrases, constants, domain, inputs, extra, is_recursive
    )


def kind_of(text: str) -> Kind:
    for kind in KINDS:
        if kind == text:
            return kind
    raise ValueError(f"no kind {text!r}; the kinds are {', '.join(KINDS)}")
