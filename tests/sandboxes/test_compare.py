"""Equality of answers: strict in type, tolerant in the last digits of floats."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.sandboxes.compare import is_equal

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (1, True),
        (True, 1),
        (1, 1.0),
        (1.0, 1),
        (0, False),
        (0, None),
        ("1", 1),
        ([], {}),
        ([1, 2], [1, 2, 3]),
        ([1, 2, 3], [1, 2]),
        ([1, 2], [2, 1]),
        ([[1]], [[True]]),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 1.0}),
        (float("nan"), float("nan")),
        (float("inf"), float("inf")),
        (1.0, float("inf")),
        (1.0, 1.0 + 1e-8),
        ("a", "a "),
        ("", None),
    ],
)
def test_different(expected: Any, actual: Any) -> None:
    assert not is_equal(expected, actual)
    assert not is_equal([expected], [actual])
    assert not is_equal({"k": expected}, {"k": actual})


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (0.3, 0.1 + 0.2),
        (0.0, -0.0),
        (0.0, 1e-13),
        (1e300, 1e300 * (1 + 1e-12)),
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
    ],
)
def test_equal(expected: Any, actual: Any) -> None:
    assert is_equal(expected, actual)


@given(JSON_VALUES)
def test_every_value_equals_itself(value: Any) -> None:
    assert is_equal(value, value)


@given(JSON_VALUES, JSON_VALUES)
def test_equality_is_symmetric(left: Any, right: Any) -> None:
    assert is_equal(left, right) == is_equal(right, left)


def test_a_deep_answer_to_a_flat_question_costs_nothing() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert not is_equal([1], deep)
    assert not is_equal([[]], [deep])
