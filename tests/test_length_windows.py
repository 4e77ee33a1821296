"""Stages of the length limit: both gates must be open, and what counts is the stage's own steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cispo.length_windows import M1_LIMITS, LengthWindows, next_stage

WINDOWS = LengthWindows(limits=(100, 200, 400), steps=3)
CONVERGED, LONG = [1.5] * 6, [95.0] * 6


def test_the_default_stages_are_those_of_m1() -> None:
    assert LengthWindows().limits == M1_LIMITS == (40960, 49152, 57344, 65536, 73728, 81920)


def test_both_gates_open_the_next_window() -> None:
    assert next_stage(WINDOWS, 0, CONVERGED, LONG) == 1


@pytest.mark.parametrize(
    ("perplexities", "p99_tokens"),
    [
        ([1.5, 1.5, 1.5, 1.4, 1.4, 1.4], LONG),
        ([1.4, 1.4, 1.4, 1.5, 1.5, 1.5], LONG),
        (CONVERGED, [95.0] * 3 + [60.0] * 3),
        (CONVERGED[:5], LONG[:5]),
        ([], []),
    ],
    ids=["perplexity falls", "perplexity rises", "far from the limit", "too early", "no step yet"],
)
def test_one_gate_alone_does_not(perplexities: list[float], p99_tokens: list[float]) -> None:
    assert next_stage(WINDOWS, 0, perplexities, p99_tokens) == 0


def test_only_the_last_steps_count() -> None:
    assert next_stage(WINDOWS, 0, [9.0, 5.0, *CONVERGED], [10.0, 10.0, *LONG]) == 1


def test_near_means_near_the_limit_of_the_stage() -> None:
    assert next_stage(WINDOWS, 1, CONVERGED, LONG) == 1
    assert next_stage(WINDOWS, 1, CONVERGED, [181.0] * 6) == 2


def test_the_last_window_stays() -> None:
    assert next_stage(WINDOWS, 2, CONVERGED, [400.0] * 6) == 2


@given(st.integers(0, 2), st.lists(st.tuples(st.floats(1, 50), st.floats(0, 400)), max_size=20))
def test_a_stage_is_never_skipped_nor_taken_back(stage: int, steps: list[tuple[float, float]]) -> None:
    assert next_stage(WINDOWS, stage, [p for p, _ in steps], [t for _, t in steps]) - stage in (0, 1)


@pytest.mark.parametrize("limits", [(), (0, 10), (20, 10), (10, 10)])
def test_limits_that_do_not_rise_are_refused(limits: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="limits"):
        LengthWindows(limits=limits)
