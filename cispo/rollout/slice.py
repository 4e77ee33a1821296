"""A slice of a rollout worker's work: the engine runs for a moment, and what ended in it is handed out.

Slices are short, so that a worker can take new weights and new requests between two of them, and whoever waits for it
knows within a moment that it lives.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from cispo.rollout.engine import Engine
from cispo.rollout.request import GroupRequest, RequestError
from cispo.rollout.sequence import RequestFailure
from cispo.types import Group

SLICE_S = 0.25
"""Seconds of a slice in which no group ends."""
HANDING_OUT_S = 0.02
"""Seconds after which a slice in which some have ended hands them out."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Groups that ended, groups that never will, the seconds that the engine worked, and proof of its weights."""

    groups: tuple[Group, ...]
    failures: tuple[RequestFailure, ...]
    busy_s: float
    policy_version: int
    weights_checksum: str


def run_slice(engine: Engine, requests: Sequence[GroupRequest], slice_s: float, weights_checksum: str) -> Slice:
    """Queue the requests, then step until groups have ended or `slice_s` seconds are over.

    weights_checksum: of what the engine holds, computed when it took them; empty where nothing was sent.
    """
    started = time.perf_counter()
    groups: list[Group] = []
    failures: list[RequestFailure] = []
    for request in requests:
        try:
            engine.submit(request)
        except RequestError as error:
            failures.append(RequestFailure(request.prompt.id, request.stream, str(error)))
    while not engine.is_idle:
        engine.step()
        groups += engine.collect()
        failures += engine.collect_failures()
        elapsed_s = time.perf_counter() - started
        if elapsed_s >= slice_s or (groups and elapsed_s >= HANDING_OUT_S):
            break
    return Slice(tuple(groups), tuple(failures), time.perf_counter() - started, engine.policy_version, weights_checksum)
