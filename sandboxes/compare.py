"""Equality of an answer with what a test expects: strict in type, tolerant only in the last digits of floats.

Both sides are decoded JSON. True is not 1, 1 is not 1.0, and a value that JSON lacks (a tuple, a set, a dict with keys
other than str) has been turned away before it comes here, because what a test expects is JSON and can be none of these.
"""

import math
from typing import Any

RELATIVE_TOLERANCE = 1e-9
ABSOLUTE_TOLERANCE = 1e-12


def is_equal(expected: Any, actual: Any) -> bool:
    """Walks both values together, so a deep answer costs no more depth than what is expected. NaN equals nothing."""
    if type(expected) is not type(actual):
        return False
    if isinstance(expected, float):
        return math.isfinite(expected) and math.isclose(
            expected, actual, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE
        )
    if isinstance(expected, list):
        return len(expected) == len(actual) and all(map(is_equal, expected, actual))
    if isinstance(expected, dict):
        return expected.keys() == actual.keys() and all(is_equal(value, actual[key]) for key, value in expected.items())
    return bool(expected == actual)
