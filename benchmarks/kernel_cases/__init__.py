"""Cases of benchmarks/kernels.py, a module a kernel: each lists what it times beside which peers, and its floor."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

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


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def capture_stream() -> torch.cuda.Stream:
    """The stream that graphs are captured on, behind all that was launched so far."""
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def graphed(work: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of what `work` launches: its time is the card's, whatever the host does.

    Gradients are computed on the stream of their forward, so the forward of such work is to run on `capture_stream()`.
    """
    stream = capture_stream()
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay
