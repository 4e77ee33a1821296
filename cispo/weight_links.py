"""The ends of the links that weights go through: the learner's, one to each rollout worker, and a worker's own.

`cispo.transport` names the links. An end opens one when it first hears its name, and closes one that was declared lost.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cispo.broadcast import Proof, weights_checksum
from cispo.parallel.link import RECEIVER, SENDER, Link, LinkLostError
from cispo.parallel.meeting import Meeting
from cispo.rollout.engine import Caches, Engine
from cispo.weight_stream import Sent, WeightBlock, receive_block, send_block, send_weights, weight_sizes


@dataclass(frozen=True, slots=True)
class SentWeights:
    """What was sent, and to which end it came."""

    proof: Proof
    sent: Sent


class WeightSender:
    """The learner's ends. address: of the meeting; device: where the weights are; timeout_s: of a whole `send`."""

    def __init__(self, address: str, device: torch.device, timeout_s: float) -> None:
        self._meeting = Meeting.enter(address, timeout_s)
        self._device, self._timeout_s = device, timeout_s
        self._links: dict[str, Link] = {}

    def send(
        self,
        names: Sequence[str],
        proof: Proof,
        weights: WeightBlock | Iterable[tuple[str, Tensor]],
        sizes: Mapping[str, int],
    ) -> SentWeights:
        """Send weights through these links; those whose other end is gone are left out, and told.

        sizes: bytes of each weight. DeadlineError where the other end of one neither comes, or takes what is sent, nor
        is declared lost.
        """
        deadline = time.perf_counter() + self._timeout_s
        links, lost = self._links_of(names, deadline)
        version, timeout_s = proof.version, deadline - time.perf_counter()
        if isinstance(weights, WeightBlock):
            sent = send_block(links, weights, sizes, version, timeout_s=timeout_s)
        else:
            sent = send_weights(links, weights, sizes, version, device=self._device, timeout_s=timeout_s)
        self._close(sent.lost)
        return SentWeights(proof, replace(sent, lost={**lost, **sent.lost}))

    def _links_of(self, names: Sequence[str], deadline: float) -> tuple[list[Link], dict[str, str]]:
        """The links of these names, and those that are lost, with the reasons."""
        self._close([name for name in self._links if self._meeting.is_lost(name)])
        lost: dict[str, str] = {}
        for name in names:
            try:
                self._open(name, deadline)
            except LinkLostError as error:
                lost[name] = str(error)
        return [self._links[name] for name in names if name not in lost], lost

    def _open(self, name: str, deadline: float) -> None:
        if name not in self._links:
            within_s = deadline - time.perf_counter()
            self._links[name] = Link(
                self._meeting, name, SENDER, self._device, within_s, longest_wait_s=self._timeout_s
            )

    def _close(self, names: Iterable[str]) -> None:
        for name in list(names):
            self._links.pop(name).close()


class WeightReceiver:
    """A rollout worker's end, for its engine's weights, which lie in this block; else as `WeightSender`.

    in_block: whether they lie in one at the learner too. timeout_s: of each wait.
    """

    def __init__(self, address: str, block: WeightBlock, *, in_block: bool, timeout_s: float) -> None:
        self._meeting = Meeting.enter(address, timeout_s)
        self._block, self._in_block, self._timeout_s = block, in_block, timeout_s
        self._link: Link | None = None

    def receive(self, name: str, engine: Engine, caches: Caches) -> Proof:
        """Wait for the next weights through the link of this name; what the engine holds afterwards.

        LinkLostError and DeadlineError as `Link`'s; then the engine may hold parts of two policies.
        """
        link, sizes, in_block = self._link_of(name), weight_sizes(engine.decoder), self._in_block
        try:
            with engine.changing_weights(caches=caches):
                version = receive_block(link, self._block, sizes, in_block=in_block, timeout_s=self._timeout_s)
        except LinkLostError:
            # What may still be under way must not be written over what comes through the next one.
            self._close()
            raise
        engine.policy_version = version
        return Proof(version, weights_checksum(dict(engine.decoder.named_parameters())))

    def _link_of(self, name: str) -> Link:
        if self._link is None or self._link.name != name:
            self._close()
            self._link = Link(self._meeting, name, RECEIVER, self._block.bytes_B.device, self._timeout_s)
        return self._link

    def _close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
