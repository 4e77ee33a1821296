"""A policy's weights through links: their version, then one stream of bytes cut into pieces.

The sender copies weights into one of two buffers, each at most half of the policy's largest layer, while the other is
under way; a receiver copies what has come over its own weights. So neither has more than one layer besides its weights.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cispo.parallel.link import Link, LinkLostError

_LEAST_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Sent:
    """What went through each link that held, and the links that were lost on the way, with the reasons."""

    bytes: int
    seconds: float
    lost: Mapping[str, str]


@dataclass(slots=True, eq=False)
class _Buffer:
    bytes_B: Tensor
    under_way: dict[Link, torch.distributed.Work] = field(default_factory=dict)


def piece_bytes(sizes: Mapping[str, int]) -> int:
    """Half of the largest layer. sizes: bytes of each weight by name; a weight outside of layers is one by itself."""
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        first, _, rest = name.partition(".")
        layer = f"{first}.{rest.partition('.')[0]}" if rest else first
        layers[layer] = layers.get(layer, 0) + size
    return max(_LEAST_PIECE_BYTES, max(layers.values()) // 2)


def weight_sizes(module: nn.Module) -> dict[str, int]:
    """Bytes of each weight of a module that is whole, by name, in the order of the stream."""
    return {name: parameter.nbytes for name, parameter in module.named_parameters()}


@torch.no_grad()
def send_weights(
    links: Sequence[Link],
    weights: Iterable[tuple[str, Tensor]],
    *,
    version: int,
    piece: int,
    device: torch.device,
    timeout_s: float,
) -> Sent:
    """Send a version and weights, in the order of the receivers' own, through all links at once.

    piece: bytes, as `piece_bytes` has it. A link whose other end is gone is left out from there on; DeadlineError where
    nothing moves through one for timeout_s.
    """
    started = time.perf_counter()
    buffers = _buffers(piece, device)
    lost: dict[str, str] = {}
    head = _Buffer(torch.tensor([version], device=device).view(torch.uint8))
    _start(head, len(head.bytes_B), links, lost)
    total = filled = turn = 0
    # To the end, though nobody may listen any more: gathering weights is collective.
    for flat_B in (_bytes(weight) for _, weight in weights):
        total += len(flat_B)
        for part_B in _cut(flat_B, piece, piece - filled):
            buffer = buffers[turn]
            if not filled:
                _finish(buffer, lost, timeout_s)
            buffer.bytes_B[filled : filled + len(part_B)].copy_(part_B)
            filled += len(part_B)
            if filled == piece:
                _start(buffer, filled, links, lost)
                filled, turn = 0, 1 - turn
    if filled:
        _start(buffers[turn], filled, links, lost)
    for buffer in (head, buffers[1 - turn], buffers[turn]):
        _finish(buffer, lost, timeout_s)
    return Sent(total, time.perf_counter() - started, lost)


def receive_version(link: Link, device: torch.device, *, timeout_s: float) -> int:
    """The version of the weights that come next.

    LinkLostError where the sender is gone, DeadlineError after timeout_s.
    """
    head = torch.empty(1, dtype=torch.int64, device=device)
    link.wait(link.start(head.view(torch.uint8)), timeout_s)
    return int(head)


@torch.no_grad()
def receive_weights(link: Link, module: nn.Module, *, timeout_s: float) -> None:
    """Take what `send_weights` sends after the version over the module's own weights. Errors as `receive_version`'s."""
    parameters = list(module.parameters())
    sizes = weight_sizes(module)
    piece, left = piece_bytes(sizes), sum(sizes.values())
    buffers = _buffers(piece, parameters[0].device)
    lengths = [min(piece, left - start) for start in range(0, left, piece)]
    works = [link.start(buffers[turn].bytes_B[:length]) for turn, length in enumerate(lengths[:2])]
    targets = _targets(parameters)
    target_B = next(targets)
    for index, length in enumerate(lengths):
        link.wait(works[index], timeout_s)
        came_B = buffers[index % 2].bytes_B[:length]
        while len(came_B):
            if not len(target_B):
                target_B = next(targets)
            count = min(len(target_B), len(came_B))
            target_B[:count].copy_(came_B[:count])
            target_B, came_B = target_B[count:], came_B[count:]
        if index + 2 < len(lengths):
            works.append(link.start(buffers[index % 2].bytes_B[: lengths[index + 2]]))
    if parameters[0].is_cuda:
        torch.cuda.current_stream().synchronize()
    torch.autograd.graph.increment_version(parameters)


def _targets(parameters: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    for parameter in parameters:
        if not parameter.is_contiguous():
            raise ValueError(f"nothing can be received into a weight of shape {tuple(parameter.shape)}: not contiguous")
        yield _bytes(parameter)


def _buffers(piece: int, device: torch.device) -> tuple[_Buffer, _Buffer]:
    one, other = (_Buffer(torch.empty(piece, dtype=torch.uint8, device=device)) for _ in range(2))
    return one, other


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _cut(flat_B: Tensor, piece: int, room: int) -> Iterator[Tensor]:
    """The bytes in parts: first what fills the room that is left in a piece, then pieces, then the rest."""
    yield flat_B[:room]
    yield from (flat_B[start : start + piece] for start in range(room, len(flat_B), piece))


def _start(buffer: _Buffer, length: int, links: Sequence[Link], lost: dict[str, str]) -> None:
    for link in links:
        if link.name not in lost:
            try:
                buffer.under_way[link] = link.start(buffer.bytes_B[:length])
            except RuntimeError as error:
                lost[link.name] = str(error)


def _finish(buffer: _Buffer, lost: dict[str, str], timeout_s: float) -> None:
    """Wait until what was started from the buffer has arrived everywhere."""
    for link, work in buffer.under_way.items():
        if link.name in lost:
            continue
        try:
            link.wait(work, timeout_s)
        except LinkLostError as error:
            lost[link.name] = str(error)
    buffer.under_way.clear()
