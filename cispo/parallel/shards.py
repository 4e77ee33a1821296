"""Who has what: a rank's part of a parameter, which is consecutive rows along one dim, and its share of the work."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cispo.parallel.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Shard:
    """A parameter of `shape` as the ranks hold it.

    bounds: for each rank, the first row that it holds along `dim` and the one after its last; no row is held twice.
    None where every rank holds all of it.
    """

    shape: torch.Size
    dim: int = 0
    bounds: tuple[tuple[int, int], ...] | None = None

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's part of the whole; a view."""
        if self.bounds is None:
            return whole
        start, end = self.bounds[rank]
        return whole.narrow(self.dim, start, end - start)

    @torch.no_grad()
    def gather(self, part: Tensor, ranks: Ranks) -> Tensor:
        """The whole from this rank's part, on every rank; collective."""
        if self.bounds is None:
            return part
        most = max(end - start for start, end in self.bounds)
        rows = part.movedim(self.dim, 0)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = padded.new_empty(ranks.world_size * most, *rows.shape[1:])
        dist.all_gather_into_tensor(parts, padded)
        held = sorted((start, end - start, rank * most) for rank, (start, end) in enumerate(self.bounds))
        return torch.cat([parts[at : at + count] for _, count, at in held]).movedim(0, self.dim).contiguous()


def even_bounds(first: int, end: int, parts: int) -> list[tuple[int, int]]:
    """Rows first to end in chunks of one size, the last ones shorter or empty, as FSDP2 shards them."""
    size = -(-(end - first) // parts)
    return [(min(first + size * i, end), min(first + size * (i + 1), end)) for i in range(parts)]


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of the lengths in so many parts of about the same sum; the same lengths are dealt the same."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    sums = [0] * hands
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        hand = sums.index(min(sums))
        dealt[hand].append(index)
        sums[hand] += lengths[index]
    return [sorted(part) for part in dealt]
