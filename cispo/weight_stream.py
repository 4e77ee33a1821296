"""A policy's weights through links, as one stream of bytes cut into pieces.

The stream begins with the weights' version; every weight begins at a multiple of ALIGNMENT_BYTES, in the module's own
order. A module that has its weights in one block of memory in just that way (`WeightBlock`) sends them from where they
lie and receives them into their place, without copies. Weights that are gathered one by one are copied into one of two
buffers, each at most half of the policy's largest layer, while the other is under way; so nobody needs more memory than
one layer takes.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cispo.parallel.link import Link, LinkLostError

ALIGNMENT_BYTES = 256
_VERSION_BYTES = 8
_LEAST_PIECE_BYTES = 1 << 20
_BLOCK_PIECE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes of weights that went through each link that held, and the links that were lost, with the reasons."""

    bytes: int
    seconds: float
    lost: Mapping[str, str]


class WeightBlock:
    """A module's weights in one block of memory on a device, bytes_B, in the order and places of the stream.

    version: of the weights, the only element of a tensor in the block. The weights stay the module's own parameters;
    whoever keeps their addresses must take them after this.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        sizes = weight_sizes(module)
        self.bytes_B = torch.zeros(_stream_bytes(sizes), dtype=torch.uint8, device=device)
        self.version = self.bytes_B[:_VERSION_BYTES].view(torch.int64)
        start = ALIGNMENT_BYTES
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


def piece_bytes(sizes: Mapping[str, int], *, in_block: bool) -> int:
    """Of each piece of the stream but the last: of weights in a block few large ones, else half of the largest layer.

    sizes: bytes of each weight by name; a weight outside of layers is a layer by itself.
    """
    if in_block:
        whole = _stream_bytes(sizes)
        return _aligned(-(-whole // -(-whole // _BLOCK_PIECE_BYTES)))
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        first, _, rest = name.partition(".")
        layer = f"{first}.{rest.partition('.')[0]}" if rest else first
        layers[layer] = layers.get(layer, 0) + size
    return max(_LEAST_PIECE_BYTES, max(layers.values()) // 2)


@torch.no_grad()
def send_block(
    links: Sequence[Link], block: WeightBlock, sizes: Mapping[str, int], version: int, *, timeout_s: float
) -> Sent:
    """Send weights from where they lie, through all links at once; they must not change until it returns.

    sizes: bytes of each weight by name. A link whose other end is gone is left out from there on; DeadlineError where
    not all has gone through the others after timeout_s.
    """
    started = time.perf_counter()
    deadline = started + timeout_s
    block.version.fill_(version)
    lost: dict[str, str] = {}
    pieces = [_Buffer(piece_B) for piece_B in block.bytes_B.split(piece_bytes(sizes, in_block=True))]
    for piece in pieces:
        _start(piece, len(piece.bytes_B), links, lost)
    for piece in pieces:
        _finish(piece, lost, deadline)
    return Sent(sum(sizes.values()), time.perf_counter() - started, lost)


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

    ValueError where a weight has another size.
    """
    started = time.perf_counter()
    deadline = started + timeout_s
    piece = piece_bytes(sizes, in_block=False)
    buffers = [_Buffer(torch.zeros(piece, dtype=torch.uint8, device=device)) for _ in range(2)]
    buffers[0].bytes_B[:_VERSION_BYTES].view(torch.int64).fill_(version)
    lost: dict[str, str] = {}
    filled, turn = ALIGNMENT_BYTES, 0
    # To the end, though nobody may listen any more: gathering weights is collective.
    for part_B, room in _parts(weights, sizes, piece):
        buffer = buffers[turn]
        if not filled:
            _finish(buffer, lost, deadline)
        if part_B is not None:
            buffer.bytes_B[filled : filled + room].copy_(part_B)
        filled += room
        if filled == piece:
            _start(buffer, filled, links, lost)
            filled, turn = 0, 1 - turn
    if filled:
        _start(buffers[turn], filled, links, lost)
    for buffer in (buffers[1 - turn], buffers[turn]):
        _finish(buffer, lost, deadline)
    return Sent(sum(sizes.values()), time.perf_counter() - started, lost)


@torch.no_grad()
def receive_block(link: Link, block: WeightBlock, sizes: Mapping[str, int], *, in_block: bool, timeout_s: float) -> int:
    """Take weights into their places; their version.

    in_block: whether they come from a block, or from `send_weights`. LinkLostError where the sender is gone,
    DeadlineError where nothing comes for timeout_s.
    """
    works = [link.start(piece_B) for piece_B in block.bytes_B.split(piece_bytes(sizes, in_block=in_block))]
    for work in works:
        link.wait(work, timeout_s)
    return int(block.version)


@dataclass(slots=True, eq=False)
class _Buffer:
    bytes_B: Tensor
    under_way: dict[Link, torch.distributed.Work] = field(default_factory=dict)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _stream_bytes(sizes: Mapping[str, int]) -> int:
    return ALIGNMENT_BYTES + sum(map(_aligned, sizes.values()))


def _parts(
    weights: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], piece: int
) -> Iterator[tuple[Tensor | None, int]]:
    """The stream in parts that end where a piece does at the latest: bytes and their number, None for what lies between
    weights.
    """
    at = ALIGNMENT_BYTES
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
            except LinkLostError as error:
                lost[link.name] = str(error)


def _finish(buffer: _Buffer, lost: dict[str, str], deadline: float) -> None:
    """Wait until what was started from the buffer has arrived everywhere."""
    for link, work in buffer.under_way.items():
        if link.name in lost:
            continue
        try:
            link.wait(work, deadline - time.perf_counter())
        except LinkLostError as error:
            lost[link.name] = str(error)
    buffer.under_way.clear()
