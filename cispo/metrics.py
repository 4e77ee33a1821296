"""What is measured in a step: typed records, reduced once to a flat `dict[str, float]`.

Every part of a step, in whichever process, adds records under names of the table in metric_table.py; the loop reduces
them when the step ends. Sums are exact (math.fsum), so a result depends on the records alone and never on the order in
which workers delivered them. A name without a single observation is left out of the result. NaN and infinity pass
through, to be seen.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

from cispo.metric_table import MetricNameError, check_names


@dataclass(frozen=True, slots=True)
class Mean:
    """An observation, or the mean of `weight` of them; reduces to the weighted mean."""

    value: float
    weight: float = 1.0

    @classmethod
    def reduce(cls, records: Sequence[Self]) -> float | None:
        weight = math.fsum(record.weight for record in records)
        if weight == 0.0:
            return None
        return _sum(record.value * record.weight for record in records if record.weight != 0.0) / weight


@dataclass(frozen=True, slots=True)
class Sum:
    """An amount; reduces to the sum. `Sum(1)` counts."""

    value: float

    @classmethod
    def reduce(cls, records: Sequence[Self]) -> float | None:
        return _sum(record.value for record in records)


@dataclass(frozen=True, slots=True)
class Max:
    """An observation; reduces to the greatest, and to NaN if one is NaN."""

    value: float

    @classmethod
    def reduce(cls, records: Sequence[Self]) -> float | None:
        values = [record.value for record in records]
        return math.nan if any(map(math.isnan, values)) else max(values)


@dataclass(frozen=True, slots=True)
class Last:
    """A state, such as a learning rate; reduces to the one added last, so one process should own the name."""

    value: float

    @classmethod
    def reduce(cls, records: Sequence[Self]) -> float | None:
        return records[-1].value


@dataclass(frozen=True, slots=True)
class Std:
    """Observations; reduces to their population standard deviation."""

    values: tuple[float, ...]

    @classmethod
    def reduce(cls, records: Sequence[Self]) -> float | None:
        values = list(chain.from_iterable(record.values for record in records))
        if not values:
            return None
        mean = _sum(values) / len(values)
        return math.sqrt(_sum((value - mean) ** 2 for value in values) / len(values))


@dataclass(frozen=True, slots=True)
class Quantile:
    """Observations; reduces to their quantile of order q in [0, 1], linear between neighbours (numpy's default)."""

    values: tuple[float, ...]
    q: float

    @classmethod
    def reduce(cls, records: Sequence[Self]) -> float | None:
        if len({record.q for record in records}) != 1:
            raise ValueError(f"quantiles of different order under one name: {sorted({r.q for r in records})}; use one")
        values = sorted(chain.from_iterable(record.values for record in records))
        if not values:
            return None
        if any(map(math.isnan, values)):
            return math.nan
        place = records[0].q * (len(values) - 1)
        below = math.floor(place)
        above = min(below + 1, len(values) - 1)
        return values[below] + (values[above] - values[below]) * (place - below) if place > below else values[below]


Record = Mean | Sum | Max | Last | Std | Quantile


def _sum(values: Iterable[float]) -> float:
    """The exactly rounded sum; opposite infinities give NaN, where math.fsum would raise."""
    numbers = list(values)
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)


class StepMetrics:
    """The records of one step. Picklable, so that a worker can fill one and the loop can take it in with `extend`."""

    def __init__(self) -> None:
        self._records: dict[str, list[Record]] = {}

    def add(self, name: str, record: Record) -> None:
        """Add one record; MetricNameError for a name outside the table, TypeError for a second kind under one name."""
        check_names([name])
        records = self._records.setdefault(name, [])
        if records and type(records[0]) is not type(record):
            kinds = f"{type(record).__name__} after {type(records[0]).__name__}"
            raise TypeError(f"{name}: {kinds}; use one kind of record under one name")
        records.append(record)

    def extend(self, other: "StepMetrics") -> None:
        """Add all records of another, in its order."""
        for name, records in other._records.items():
            for record in records:
                self.add(name, record)

    def update(self, reduced: Mapping[str, float]) -> None:
        """Add numbers that are final already, such as a learner's; each name may come once only in a step."""
        check_names(reduced)
        repeated = [name for name in reduced if name in self._records]
        if repeated:
            raise MetricNameError(f"metrics: {', '.join(repeated)} set twice in one step; measure it in one place")
        for name, value in reduced.items():
            self.add(name, Last(float(value)))

    def reduce(self) -> dict[str, float]:
        """Name -> value in the order of the alphabet."""
        reduced = {name: _reduce(self._records[name]) for name in sorted(self._records)}
        return {name: float(value) for name, value in reduced.items() if value is not None}


def _reduce(records: Sequence[Any]) -> float | None:
    """Any, because `add` keeps the records under one name of one kind, which the type system cannot see."""
    reduced: float | None = type(records[0]).reduce(records)
    return reduced
