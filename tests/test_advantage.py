import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.advantage import AdvantageSettings, group_advantages
from cispo.types import Prompt, Score, ScoredGroup, ScoreStatus

FAILED = Score(0.0, status=ScoreStatus.ERROR, message="the sandbox failed")
SCORES = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12)


def scored_group(*values: float | None) -> ScoredGroup:
    scores = tuple(FAILED if value is None else Score(value) for value in values)
    return ScoredGroup(Prompt("p", "text"), (), scores)


def advantages(values: list[float | None], **options: object) -> list[float]:
    batch = group_advantages([scored_group(*values)], AdvantageSettings.model_validate(options))
    return [float(value) for value in batch.groups[0].advantage_G]


def test_equation_2_by_hand() -> None:
    assert advantages([1.0, 0.0, 0.0, 0.0], epsilon=0.0) == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])
    assert advantages([1.0, 0.0, 0.0, 0.0], scale="none") == [0.75, -0.25, -0.25, -0.25]


@settings(deadline=None)
@given(SCORES)
def test_advantages_are_centred_scaled_and_ordered_as_the_scores(values: list[float]) -> None:
    got = advantages(list(values), epsilon=0.0)
    assert sum(got) == pytest.approx(0.0, abs=1e-6)
    assert float(np.std(got)) == pytest.approx(1.0) or not any(got)
    assert all((a > b) >= (x > y) for a, x in zip(values, got, strict=True) for b, y in zip(values, got, strict=True))


@settings(deadline=None)
@given(SCORES, st.data())
def test_failed_samples_change_nothing_and_get_nothing(values: list[float], data: st.DataObject) -> None:
    mixed: list[float | None] = list(values)
    for place in data.draw(st.lists(st.integers(0, len(values)), max_size=3)):
        mixed.insert(place, None)
    got = advantages(mixed)
    assert [x for x, value in zip(got, mixed, strict=True) if value is not None] == advantages(list(values))
    assert all(x == 0.0 for x, value in zip(got, mixed, strict=True) if value is None)


@pytest.mark.parametrize(
    "values",
    [
        [0.1] * 3,
        [0.1] * 10,
        [1e-30] * 7,
        [1 / 3] * 49,
        [0.0] * 4,
        [-0.7] * 6,
        [0.3, 0.1 + 0.2, 0.3],
        [0.7],
        [None, 0.7],
    ],
)
def test_equal_scores_are_exactly_without_variance(values: list[float | None]) -> None:
    batch = group_advantages([scored_group(*values)], AdvantageSettings(epsilon=0.0, drop_zero_variance=False))
    assert batch.groups[0].is_zero_variance
    assert not batch.groups[0].advantage_G.any()
    assert batch.kept == (0,)


def test_close_scores_are_not_equal_scores() -> None:
    assert advantages([1e-9, 2e-9], epsilon=0.0) == pytest.approx([-1.0, 1.0])
    assert advantages([1.0, 1.0 + 1e-9], epsilon=0.0) == pytest.approx([-1.0, 1.0], rel=1e-6)


def test_groups_without_a_lesson_are_dropped_and_counted() -> None:
    groups = [scored_group(1.0, 1.0), scored_group(0.0, 1.0), scored_group(None, None), scored_group(None, 1.0)]
    batch = group_advantages(groups, AdvantageSettings())
    assert (batch.kept, batch.dropped) == ((1,), 3)
    kept = group_advantages(groups, AdvantageSettings(drop_zero_variance=False))
    assert (kept.kept, kept.dropped) == ((0, 1, 3), 1)


def test_batch_std_is_over_all_kept_samples() -> None:
    groups = [scored_group(0.0, 1.0), scored_group(1.0, 1.0), scored_group(0.0, 3.0, None)]
    batch = group_advantages(groups, AdvantageSettings(scale="batch_std", epsilon=0.0))
    std = float(np.std([-0.5, 0.5, -1.5, 1.5]))
    assert batch.groups[0].advantage_G == pytest.approx([-0.5 / std, 0.5 / std])
    assert batch.groups[2].advantage_G == pytest.approx([-1.5 / std, 1.5 / std, 0.0])


def test_batch_std_of_equal_scores_divides_by_nothing() -> None:
    settings = AdvantageSettings(scale="batch_std", epsilon=0.0, drop_zero_variance=False)
    assert not group_advantages([scored_group(0.1, 0.1, 0.1)], settings).groups[0].advantage_G.any()


def test_no_groups() -> None:
    assert group_advantages([], AdvantageSettings()).kept == ()
