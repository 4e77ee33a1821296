"""The chunk grid: packed tokens seen as chunks of 64 that count from the start of each sequence.

Lightning and softmax attention walk the same grid in training, prefill and decode, so that all three add the same
numbers in the same order. What is packed is a sequence or a piece of one that goes on from a cache: a piece that starts
in the middle of a chunk lies at its place in it, after rows that only the cache has. Rows of the grid without a token
exist only inside a kernel: they read zeros and their output is dropped.

In training on CPU a piece may be a branch, which goes on from the end of a prompt that is packed just before it and its
fellows: a prompt and its branches are a family, and everything else is a family of one.

N packed tokens, B pieces, F families, M chunks, C = 64 rows of a chunk, H heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

CHUNK_LENGTH = 64


@dataclass(frozen=True, eq=False)
class ChunkGrid:
    """Where each packed token lies on the chunk grid. All tensors are int64, but for the three that CUDA kernels read.

    lengths: tokens of each piece. starts: position of its first token in its sequence, 0 for a whole sequence.
    families: index of the first piece of each family, and the number of pieces.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    device: torch.device
    families: tuple[int, ...]

    @property
    def chunks(self) -> int:
        return self.chunk_index_M.numel()

    @property
    def has_branches(self) -> bool:
        return len(self.families) <= len(self.lengths)

    @cached_property
    def lengths_B(self) -> Tensor:
        """`lengths` on the host, as the CPU kernels read them; so are the next three."""
        return torch.tensor(self.lengths)

    @cached_property
    def starts_B(self) -> Tensor:
        return torch.tensor(self.starts)

    @cached_property
    def families_F(self) -> Tensor:
        """`families`, [F + 1]."""
        return torch.tensor(self.families)

    @cached_property
    def ends_B(self) -> Tensor:
        """The packed token that each piece starts at, and the number of them all, [B + 1]."""
        return torch.tensor([0, *accumulate(self.lengths)])

    def refuse_branches(self) -> None:
        """ValueError where there are branches, in code that serves none."""
        if self.has_branches:
            raise ValueError(
                "branches of a shared prompt are served by the CPU kernels alone, in float32 and without a cache; "
                "pack whole sequences (see Decoder.takes_branches)"
            )

    @cached_property
    def _chunks_B(self) -> Tensor:
        """Chunks that each piece touches; on the host, like everything before it is moved."""
        return (self.starts_B % CHUNK_LENGTH + self.lengths_B + CHUNK_LENGTH - 1) // CHUNK_LENGTH

    @cached_property
    def _first_chunk_B(self) -> Tensor:
        return torch.cumsum(self._chunks_B, 0) - self._chunks_B

    @cached_property
    def _offset_M(self) -> Tensor:
        """Place of each chunk among its piece's, from 0."""
        return torch.arange(int(self._chunks_B.sum())) - self._first_chunk_B.repeat_interleave(self._chunks_B)

    @cached_property
    def piece_M(self) -> Tensor:
        """The piece that each chunk belongs to."""
        return torch.arange(len(self.lengths)).repeat_interleave(self._chunks_B).to(self.device)

    @cached_property
    def first_chunk_B(self) -> Tensor:
        """The first chunk of each piece, as an index into the M chunks."""
        return self._first_chunk_B.to(self.device)

    @cached_property
    def last_chunk_B(self) -> Tensor:
        """The last chunk of each piece."""
        return (self._first_chunk_B + self._chunks_B - 1).to(self.device)

    @cached_property
    def chunk_index_M(self) -> Tensor:
        """Index of each chunk within its sequence, from 0."""
        start_chunk_B = self.starts_B // CHUNK_LENGTH
        return (self._offset_M + start_chunk_B.repeat_interleave(self._chunks_B)).to(self.device)

    @cached_property
    def row_of_token_N(self) -> Tensor:
        """Row of each token in the flattened grid [M * C]."""
        lengths_B, starts_B = self.lengths_B, self.starts_B
        first_token_B = torch.cumsum(lengths_B, 0) - lengths_B
        first_row_B = self._first_chunk_B * CHUNK_LENGTH + starts_B % CHUNK_LENGTH
        tokens_N = torch.arange(sum(self.lengths))
        return (tokens_N + (first_row_B - first_token_B).repeat_interleave(lengths_B)).to(self.device)

    @cached_property
    def cu_seqlens_B1(self) -> Tensor:
        """First token of each piece, then their number, int32 [B + 1]."""
        lengths_B1 = torch.tensor((0, *self.lengths), dtype=torch.int64)
        return torch.cumsum(lengths_B1, 0).to(self.device, torch.int32)

    @cached_property
    def start_B(self) -> Tensor:
        """`starts`, int32."""
        return torch.tensor(self.starts, dtype=torch.int32).to(self.device)

    @cached_property
    def longest_first_B(self) -> Tensor:
        """The pieces by falling length, int32."""
        return torch.argsort(torch.tensor(self.lengths), descending=True, stable=True).to(self.device, torch.int32)

    @cached_property
    def steps(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """For each place j: the chunks whose piece has a chunk j at or before them, and that chunk j."""
        first_of_chunk_M = self._first_chunk_B.repeat_interleave(self._chunks_B)
        steps = []
        for j in range(int(self._chunks_B.max())):
            at_or_after = torch.nonzero(self._offset_M >= j).squeeze(1)
            steps.append((at_or_after.to(self.device), (first_of_chunk_M[at_or_after] + j).to(self.device)))
        return tuple(steps)

    @cached_property
    def at_place(self) -> tuple[Tensor, ...]:
        """For each place j: the chunks that are the j-th of their piece."""
        places = range(int(self._chunks_B.max()))
        return tuple(torch.nonzero(self._offset_M == j).squeeze(1).to(self.device) for j in places)

    def scatter(self, x_NHD: Tensor) -> Tensor:
        """Lay packed rows [N, H, D] on the grid as [M, H, C, D]; rows without a token are zero."""
        heads, dim = x_NHD.shape[1:]
        rows_RHD = x_NHD.new_zeros(self.chunks * CHUNK_LENGTH, heads, dim)
        rows_RHD.index_copy_(0, self.row_of_token_N, x_NHD)
        return rows_RHD.view(self.chunks, CHUNK_LENGTH, heads, dim).transpose(1, 2).contiguous()

    def gather(self, x_MHCD: Tensor) -> Tensor:
        """Take the rows of tokens back from the grid: [M, H, C, D] to packed [N, H, D]."""
        heads, dim = x_MHCD.shape[1], x_MHCD.shape[3]
        rows_RHD = x_MHCD.transpose(1, 2).reshape(-1, heads, dim)
        return rows_RHD.index_select(0, self.row_of_token_N)


def chunk_grid(
    lengths: Sequence[int],
    device: torch.device,
    starts: Sequence[int] | None = None,
    families: Sequence[int] | None = None,
) -> ChunkGrid:
    """The grid of pieces of these lengths (tokens, each at least 1), packed one after the other.

    starts: the position that each piece starts at; None where all are whole sequences. families: the first piece of
    each family; None where each piece is one. The first of a family is a whole sequence, which the others start at the
    end of, so both are not given. Raises ValueError for a piece without tokens (it has no chunk to lie in), and for
    families that do not begin at increasing pieces from 0.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"every packed sequence needs at least one token, got lengths {lengths[:8]}; drop empty ones")
    count = len(lengths)
    if families is None:
        starts = (0,) * count if starts is None else starts
        return ChunkGrid(tuple(lengths), tuple(starts), device, tuple(range(count + 1)))
    bounds = (*families, count)
    if starts is not None or bounds[0] != 0 or any(left >= right for left, right in pairwise(bounds)):
        raise ValueError(
            f"families begin at increasing pieces from 0 to {count - 1}, and are not given with starts; "
            f"got {families[:8]}"
        )
    branches = ((0, *(lengths[left],) * (right - left - 1)) for left, right in pairwise(bounds))
    return ChunkGrid(tuple(lengths), tuple(chain.from_iterable(branches)), device, bounds)
