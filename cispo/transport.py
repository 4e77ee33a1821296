"""How the learner's weights come to the rollout workers: through links, or through Ray's object store.

A link goes from the first learner rank to one worker: NCCL where each has a GPU of its own, gloo on CPUs. Weights pass
through it piece by piece, so neither end holds a second copy. The object store takes the weights as one object on the
host, which workers anywhere read when they come to it, also long after it was written.

Either way a worker answers with the version and checksum of what it then holds (`Member.receipts`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ray

from cispo.broadcast import Proof, Weights
from cispo.errors import ActorLostError, LearnerLostError
from cispo.learner_team import LearnerTeam
from cispo.member import Member, Promise
from cispo.parallel.meeting import Meeting
from cispo.ray_runtime import await_result
from cispo.weight_links import SentWeights


class Transport(Protocol):
    """A way from the learner to the workers."""

    @property
    def proof(self) -> Proof | None:
        """Of the weights last broadcast; None before."""

    def broadcast(self, workers: Sequence[Member]) -> dict[str, float]:
        """Send the learner's weights to these workers, each of which has a receipt to give then; metrics.

        LearnerLostError where the learner dies.
        """

    def supply(self, worker: Member) -> None:
        """Send a worker that has just started what the others hold or are sent next; nothing before a broadcast."""

    def lose(self, worker: Member) -> None:
        """A worker is gone."""

    def lose_learner(self) -> None:
        """The learner is gone; another takes its place."""


class ObjectStoreTransport:
    """Through Ray's object store."""

    def __init__(self, learner: LearnerTeam) -> None:
        self._learner = learner
        self._reference: Any = None
        self._weights: Weights | None = None

    @property
    def proof(self) -> Proof | None:
        return None if self._weights is None else self._weights.proof

    def broadcast(self, workers: Sequence[Member]) -> dict[str, float]:
        calls = self._learner.tell("weights", "hand out its weights")
        weights: Weights = self._learner.hear(calls)
        self._reference, self._weights = next(iter(calls)), weights
        for worker in workers:
            self.supply(worker)
        return {"broadcast/bytes": float(weights.bytes)}

    def supply(self, worker: Member) -> None:
        if self._weights is not None:
            proof = self._weights.proof
            worker.expect(worker.actor.update_weights.remote(self._reference), lambda: proof)

    def lose(self, worker: Member) -> None:
        """Nothing is held for it."""

    def lose_learner(self) -> None:
        """What it handed out is still there for workers that start."""


class LinkTransport:
    """Through a link to each worker. timeout_s: of each wait at an end of one."""

    def __init__(self, learner: LearnerTeam, *, timeout_s: float) -> None:
        self._learner, self._timeout_s = learner, timeout_s
        # Held here, so that it outlives every actor.
        self._meeting = Meeting.open(ray.util.get_node_ip_address())
        self._links: dict[str, str] = {}
        self._opened = 0
        self._proof: Proof | None = None

    @property
    def proof(self) -> Proof | None:
        return self._proof

    def broadcast(self, workers: Sequence[Member]) -> dict[str, float]:
        calls = self._send(workers)
        sent: SentWeights = self._learner.hear(calls)
        self._proof = sent.proof
        for name in sent.sent.lost:
            # Its worker may live, and would wait.
            self._meeting.declare_lost(name)
        return {
            "broadcast/bytes": float(sent.sent.bytes),
            "broadcast/gb_per_s": sent.sent.bytes * 1e-9 / sent.sent.seconds,
            "time_s/broadcast_link": sent.sent.seconds,
        }

    def supply(self, worker: Member) -> None:
        if self._proof is not None:
            self._send([worker])

    def lose(self, worker: Member) -> None:
        name = self._links.pop(worker.name, None)
        if name is not None:
            self._meeting.declare_lost(name)

    def lose_learner(self) -> None:
        for name in self._links.values():
            self._meeting.declare_lost(name)
        self._links.clear()

    def _send(self, workers: Sequence[Member]) -> Mapping[Any, str]:
        """Tell the learner to send and the workers to receive; Ray's references to the learner's answers."""
        for worker in workers:
            if worker.name not in self._links:
                self._links[worker.name] = f"{worker.name}/{self._opened}"
                self._opened += 1
        how, names = (self._meeting.address, self._timeout_s), [self._links[worker.name] for worker in workers]
        calls = self._learner.tell("send_weights", "send its weights", *how, names)
        proof = self._promise(next(iter(calls)))
        for worker, name in zip(workers, names, strict=True):
            worker.expect(worker.actor.receive_weights.remote(*how, name), proof)
        return calls

    def _promise(self, answer: Any) -> Promise:
        """answer: Ray's reference to what the learner says that it sent."""

        def proof() -> Proof:
            doing = "learner to say which weights it sent"
            try:
                sent: SentWeights = await_result(answer, timeout_s=self._timeout_s, what=doing)
            except ActorLostError as lost:
                raise LearnerLostError(*lost.args) from lost
            return sent.proof

        return proof
