"""A policy's weights through links: a head that says what comes, then one stream of bytes cut into pieces.

In the stream every weight begins at a multiple of ALIGNMENT_BYTES, in the module's own order. A module that has its
weights in one block of memory in just that way (`WeightBlock`) sends them from where they lie and receives them into
their place, without copies. Weights that are gathered one by one are copied into one of two buffers, each at most half
of the policy's largest layer, while the other is under way; so nobody needs more memory than one layer takes.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cispo.parallel.link import Link, LinkLostError

ALIGNMENT_BYTES = 256
_LEAST_PIECE_BYTES = 1 << 20
_BLOCK_PIECE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Sent:
    """What went through each link that held, and the links that were lost on the way, with the reasons."""

    bytes: int
    seconds: float
    lost: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Head:
    """What comes before the weights. piece_bytes: of each piece of the stream but the last."""

    version: int
    piece_bytes: int


class WeightBlock:
    """A module's weights in one block of memory on a device, bytes_B, in the order and places of the stream.

    The weights stay the module's own parameters; whoever keeps their addresses must take them after this.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        sizes = weight_sizes(module)
        self.bytes_B = torch.zeros(_stream_bytes(sizes), dtype=torch.uint8, device=device)
        start = 0
        for parameter in module.parameters():
            place_B = self.bytes_B[start : start + parameter.nbytes]
            place = place_B.view(parameter.dtype).view(parameter.shape)
            parameter.data = place.copy_(parameter.data)
            start += _aligned(place_B.numel())
        # What is not a weight: tables, for instance.
        module.to(device)


def weight_sizes(module: nn.Module) -> dict[str, int]:
    """Bytes of each weight of a module that is whole, by name, in the order of the stream."""
    return {name: parameter.nbytes for name, parameter in module.named_parameters()}


def piece_bytes(sizes: Mapping[str, int]) -> int:
    """Half of the largest layer. sizes: bytes of each weight by name; a weight outside of layers is one by itself."""
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        first, _, rest = name.partition(".")
        layer = f"{first}.{rest.partition('.')[0]}" if rest else first
        layers[layer] = layers.get(layer, 0) + size
    return max(_LEAST_PIECE_BYTES, max(layers.values()) // 2)


@torch.no_grad()
def send_block(links: Sequence[Link], block: WeightBlock, version: int, *, timeout_s: float) -> Sent:
    """Send weights from where they lie, through all links at once; they must not change until it returns.

    A link whose other end is gone is left out from there on; DeadlineError where nothing moves for timeout_s.
    """
    started = time.perf_counter()
    bytes_B, lost = block.bytes_B, dict[str, str]()
    pieces = max(1, -(-len(bytes_B) // _BLOCK_PIECE_BYTES))
    piece = _aligned(-(-len(bytes_B) // pieces)) or ALIGNMENT_BYTES
    head = _send_head(Head(version, piece), links, lost, bytes_B.device)
    under_way = [head, *(_Buffer(part_B) for part_B in bytes_B.split(piece) if len(part_B))]
    for buffer in under_way[1:]:
        _start(buffer, len(buffer.bytes_B), links, lost)
    for buffer in under_way:
        _finish(buffer, lost, timeout_s)
    return Sent(len(bytes_B), time.perf_counter() - started, lost)


@torch.no_grad()
def send_weights(
    links: Sequence[Link],
    weights: Iterable[tuple[str, Tensor]],
    sizes: Mapping[str, int],
    version: int,
    *,
    device: torch.device,
    timeout_s: float,
) -> Sent:
    """Send weights that come one after the other, all of `sizes` and in its order; else as `send_block`.

    sizes: bytes of each weight by name. ValueError where a weight has another size.
    """
    started = time.perf_counter()
    piece, lost = piece_bytes(sizes), dict[str, str]()
    buffers = [_Buffer(torch.zeros(piece, dtype=torch.uint8, device=device)) for _ in range(2)]
    head = _send_head(Head(version, piece), links, lost, device)
    filled = turn = 0
    # To the end, though nobody may listen any more: gathering weights is collective.
    for part_B, room in _parts(weights, sizes, piece):
        buffer = buffers[turn]
        if not filled:
            _finish(buffer, lost, timeout_s)
        if part_B is not None:
            buffer.bytes_B[filled : filled + room].copy_(part_B)
        filled += room
        if filled == piece:
            _start(buffer, filled, links, lost)
            filled, turn = 0, 1 - turn
    if filled:
        _start(buffers[turn], filled, links, lost)
    for buffer in (head, buffers[1 - turn], buffers[turn]):
        _finish(buffer, lost, timeout_s)
    return Sent(_stream_bytes(sizes), time.perf_counter() - started, lost)


def receive_head(link: Link, device: torch.device, *, timeout_s: float) -> Head:
    """What comes next. LinkLostError where the sender is gone, DeadlineError after timeout_s."""
    head = torch.empty(2, dtype=torch.int64, device=device)
    link.wait(link.start(head.view(torch.uint8)), timeout_s)
    version, piece = head.tolist()
    return Head(version, piece)


@torch.no_grad()
def receive_block(link: Link, block: WeightBlock, head: Head, *, timeout_s: float) -> None:
    """Take the weights that follow a head into their places. Errors as `receive_head`'s."""
    works = [link.start(part_B) for part_B in block.bytes_B.split(head.piece_bytes) if len(part_B)]
    for work in works:
        link.wait(work, timeout_s)
    if block.bytes_B.is_cuda:
        torch.cuda.current_stream().synchronize()


@dataclass(slots=True, eq=False)
class _Buffer:
    bytes_B: Tensor
    under_way: dict[Link, torch.distributed.Work] = field(default_factory=dict)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _stream_bytes(sizes: Mapping[str, int]) -> int:
    return sum(map(_aligned, sizes.values()))


def _send_head(head: Head, links: Sequence[Link], lost: dict[str, str], device: torch.device) -> _Buffer:
    buffer = _Buffer(torch.tensor([head.version, head.piece_bytes], device=device).view(torch.uint8))
    _start(buffer, len(buffer.bytes_B), links, lost)
    return buffer


def _parts(
    weights: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], piece: int
) -> Iterator[tuple[Tensor | None, int]]:
    """The stream in parts that end where a piece does at the latest: bytes and their number, None for what lies between
    weights.
    """
    at = 0
    for (name, weight), size in zip(weights, sizes.values(), strict=True):
        flat_B = weight.detach().contiguous().view(-1).view(torch.uint8)
        if len(flat_B) != size:
            raise ValueError(f"weight {name} has {len(flat_B)} bytes, {size} were announced")
        start, end = 0, _aligned(size)
        while start < end:
            stop = min(start + piece - at % piece, size if start < size else end)
            yield (flat_B[start:stop] if start < size else None), stop - start
            start, at = stop, at + stop - start


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
