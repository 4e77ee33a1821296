"""The ends of the links that weights go through: the learner's, one to each rollout worker, and a worker's own.

`cispo.transport` names the links. An end opens one when it first hears its name, and closes one that was declared lost.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cispo.broadcast import Proof, weights_checksum
from cispo.parallel.link import RECEIVER, SENDER, Link, LinkLostError
from cispo.parallel.meeting import Meeting
from cispo.rollout.engine import Caches, Engine
from cispo.weight_stream import Sent, WeightBlock, receive_block, receive_head, send_block, send_weights


@dataclass(frozen=True, slots=True)
class SentWeights:
    """What was sent, and to which end it came."""

    proof: Proof
    sent: Sent


class WeightSender:
    """The learner's ends. address: of the meeting; device: where the weights are; timeout_s: of each wait."""

    def __init__(self, address: str, device: torch.device, timeout_s: float) -> None:
        self._meeting = Meeting.enter(address, timeout_s)
        self._device, self._timeout_s = device, timeout_s
        self._links: dict[str, Link] = {}

    def send_block(self, names: Sequence[str], proof: Proof, block: WeightBlock) -> SentWeights:
        """Send weights that lie in one block through these links; those whose other end is gone are left out, and told.

        DeadlineError where the other end of one neither comes nor is declared lost.
        """
        links, lost = self._links_of(names)
        return self._sent(proof, send_block(links, block, proof.version, timeout_s=self._timeout_s), lost)

    def send(
        self, names: Sequence[str], proof: Proof, weights: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int]
    ) -> SentWeights:
        """The same with weights that come one after the other. sizes: bytes of each."""
        links, lost = self._links_of(names)
        sent = send_weights(links, weights, sizes, proof.version, device=self._device, timeout_s=self._timeout_s)
        return self._sent(proof, sent, lost)

    def _links_of(self, names: Sequence[str]) -> tuple[list[Link], dict[str, str]]:
        """The links of these names, and those that are lost, with the reasons."""
        self._close([name for name in self._links if self._meeting.is_lost(name)])
        lost: dict[str, str] = {}
        for name in names:
            try:
                self._open(name)
            except LinkLostError as error:
                lost[name] = str(error)
        return [self._links[name] for name in names if name not in lost], lost

    def _sent(self, proof: Proof, sent: Sent, lost: dict[str, str]) -> SentWeights:
        self._close(sent.lost)
        return SentWeights(proof, replace(sent, lost={**lost, **sent.lost}))

    def _open(self, name: str) -> None:
        if name not in self._links:
            self._links[name] = Link(self._meeting, name, SENDER, self._device, self._timeout_s)

    def _close(self, names: Iterable[str]) -> None:
        for name in list(names):
            self._links.pop(name).close()


class WeightReceiver:
    """A rollout worker's end, for its engine's weights; arguments as `WeightSender`'s."""

    def __init__(self, address: str, device: torch.device, timeout_s: float) -> None:
        self._meeting = Meeting.enter(address, timeout_s)
        self._device, self._timeout_s = device, timeout_s
        self._link: Link | None = None

    def receive(self, name: str, engine: Engine, block: WeightBlock, caches: Caches) -> Proof:
        """Wait for the next weights through the link of this name; what the engine holds afterwards.

        block: where the engine's weights lie. LinkLostError and DeadlineError as `Link`'s; then the engine may hold
        parts of two policies.
        """
        if self._link is None or self._link.name != name:
            if self._link is not None:
                self._link.close()
            self._link = None
            self._link = Link(self._meeting, name, RECEIVER, self._device, self._timeout_s)
        head = receive_head(self._link, self._device, timeout_s=self._timeout_s)
        with engine.changing_weights(head.version, caches=caches):
            receive_block(self._link, block, head, timeout_s=self._timeout_s)
            torch.autograd.graph.increment_version(list(engine.decoder.parameters()))
        return Proof(head.version, weights_checksum(dict(engine.decoder.named_parameters())))
