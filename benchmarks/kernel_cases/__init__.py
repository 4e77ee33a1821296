"""Cases of benchmarks/kernels.py, a module a kernel: each lists what it times beside which peers, and its floor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

COPY_SHARE = 0.8
"""A kernel that only moves rows is to move its bytes at this share of the pace of a copy."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What this card was measured to do in the same run."""

    copy_bytes_per_s: float
    products_flops_per_s: float


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. Nothing is allocated before `prepare`, whose result is dropped after the case.

    floor_s: least time on a machine, from bytes moved and operations. reach_ms: what the project aims at, if anything.
    prepare: makes inputs and returns what to time by name, "cispo" among them; the rest are peers.
    error: relative error of ours to float64, checked before anything is timed; at most error_limit.
    """

    name: str
    floor_s: Callable[[Machine], float]
    reach_ms: float | None
    prepare: Callable[[], Mapping[str, Callable[[], object]]]
    error: Callable[[], float]
    error_limit: float = 3.0e-3
    extra: Mapping[str, str] = field(default_factory=dict)
