"""Whether two answers are one: forms are compared here, and scalar expressions by functions that are handed in.

Where only one side has a unit, or names the variable (`x=5`), that is taken for a longer way of saying the same; where
both have one, they must agree. Lists and sets have no order, tuples do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from cispo.rewards.math_answer import Answer
from cispo.rewards.math_expression import Tree


@dataclass(frozen=True)
class Leaves:
    """How scalar expressions are compared.

    same: whether two expressions are equal. proportional: whether two equations are one, given as left minus right.
    """

    same: Callable[[Tree, Tree], bool]
    proportional: Callable[[Tree, Tree], bool]


def answers_equal(gold: Answer, found: Answer, leaves: Leaves) -> bool:
    """Whether two answers are one."""
    kinds = {gold.kind, found.kind}
    has_other_variable = bool(gold.variable and found.variable and gold.variable != found.variable)
    if has_other_variable and kinds != {"scalar"}:
        return False
    if kinds == {"scalar"} and not has_other_variable:
        return _units_agree(gold, found) and leaves.same(_in_base_unit(gold, found), _in_base_unit(found, gold))
    if kinds in ({"scalar"}, {"equation"}, {"equation", "scalar"}):
        sides = [_as_equation(gold), _as_equation(found)]
        return sides[0] is not None and sides[1] is not None and leaves.proportional(sides[0], sides[1])
    if "set" in kinds and kinds <= {"list", "set"}:
        return _same_items(_distinct(gold, leaves), _distinct(found, leaves), leaves)
    if gold.kind != found.kind or gold.name != found.name:
        return False
    if gold.kind in ("list", "union"):
        return _variables_agree(gold, found) and _same_items(gold.items, found.items, leaves)
    if len(gold.items) != len(found.items):
        return False
    return all(answers_equal(one, other, leaves) for one, other in zip(gold.items, found.items, strict=True))


def _as_equation(answer: Answer) -> Tree | None:
    if answer.kind == "equation" or answer.tree is None:
        return answer.tree
    is_plain = answer.variable and "(" not in answer.variable and answer.unit is None
    minus = ("*", ("number", Fraction(-1)), answer.tree)
    return ("+", ("symbol", answer.variable), minus) if is_plain else None


def _variables_agree(gold: Answer, found: Answer) -> bool:
    """Values of several variables, `x=1, y=2`, are none without their names, as a list has no order."""
    names = [{item.variable for item in answer.items if item.variable} for answer in (gold, found)]
    return names[0] == names[1] or max(map(len, names)) <= 1


def _units_agree(one: Answer, other: Answer) -> bool:
    return one.unit is None or other.unit is None or one.unit[0] == other.unit[0]


def _in_base_unit(answer: Answer, other: Answer) -> Tree:
    tree = answer.tree
    assert tree is not None, "a scalar has a tree"
    if answer.unit is None or other.unit is None or answer.unit == other.unit:
        return tree
    return ("*", ("number", answer.unit[1]), tree)


def _distinct(answer: Answer, leaves: Leaves) -> list[Answer]:
    kept: list[Answer] = []
    for item in answer.items:
        if not any(answers_equal(item, other, leaves) for other in kept):
            kept.append(item)
    return kept


def _same_items(gold: Sequence[Answer], found: Sequence[Answer], leaves: Leaves) -> bool:
    """Whether each has its partner; an answer is never another's partner twice."""
    free = list(found)
    for item in gold:
        place = next((index for index, other in enumerate(free) if answers_equal(item, other, leaves)), None)
        if place is None:
            return False
        del free[place]
    return not free
