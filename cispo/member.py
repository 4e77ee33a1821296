"""A place in the crew: a name such as `rollout:1` that outlives the actors that fill it one after the other."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from cispo.broadcast import Proof

LOG_TAIL_BYTES = 4096

Promise = Callable[[], Proof]
"""What a worker must show, which may be known only when the learner has sent it: waits for that. LearnerLostError."""


class Member:
    """The actor that fills a place now. deaths: how many before it are gone.

    ready: resolves when it has started; None once that is known. proof: of the weights that it was sent last, which
    what it samples from then on must show; None where it was sent none. receipts: what it will say it holds after each
    of those that it has not answered for, with what it must say.
    """

    def __init__(self, name: str, start: Callable[[str], Any]) -> None:
        """start: makes the actor, under a name that no living actor of the cluster has."""
        self.name = name
        self.deaths = 0
        self._start = start
        self.receipts: dict[Any, Promise] = {}
        self.proof: Promise | None = None
        self._fill()

    def replace(self) -> None:
        """Make sure that the present actor is gone, and start another in its place, without waiting for it."""
        ray.kill(self.actor)
        self.deaths += 1
        self._fill()

    def expect(self, receipt: Any, proof: Promise) -> None:
        """It is being sent weights."""
        self.receipts[receipt] = proof
        self.proof = proof

    def forget_weights(self) -> None:
        """Whatever it was sent, expect nothing of it."""
        self.receipts.clear()
        self.proof = None

    def last_log_line(self) -> str:
        """The last line that the actor wrote, where its log is on this machine; else where to look."""
        path = self._log_path()
        if path is None or not path.is_file():
            return "its log is in Ray's folder (`ray logs`)"
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return f"its log, {path}, ends with: {lines[-1].strip()}" if lines else f"its log, {path}, is empty"

    def _fill(self) -> None:
        # The name of an actor that died is free only some time later.
        self.actor: Any = self._start(self.name if not self.deaths else f"{self.name}.{self.deaths}")
        self.ready: Any = self.actor.__ray_ready__.remote()
        self.forget_weights()
        self._log_path_reference = self.actor.log_path.remote()

    def _log_path(self) -> Path | None:
        """What the actor answered, if it has."""
        ready, _ = ray.wait([self._log_path_reference], timeout=0)
        if ready:
            with suppress(ray.exceptions.RayError):
                return Path(ray.get(self._log_path_reference))
        return None
