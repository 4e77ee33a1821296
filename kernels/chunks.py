"""The chunk grid: packed tokens seen as chunks of 64 that count from the start of each sequence.

Lightning and softmax attention walk the same grid in training, prefill and decode, so that all three add the same
numbers in the same order. A sequence of T tokens has ceil(T / 64) chunks; the tail of its last chunk is padding, which
exists only inside a kernel: a padded row reads zeros and its output is dropped.

N packed tokens, B sequences, M chunks, C = 64 rows of a chunk, H heads, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_LENGTH = 64


@dataclass(frozen=True, slots=True, eq=False)
class ChunkGrid:
    """Where each packed token lies on the chunk grid. All tensors are int64 on the tokens' device.

    row_of_token_N: row of each token in the flattened grid [M * C].
    token_of_row_R: token at each row of the flattened grid, R = M * C; padded rows hold N, one past the last token.
    chunk_index_M: index of each chunk within its own sequence, from 0.
    last_chunk_B: the last chunk of each sequence, as an index into the M chunks.
    lengths: tokens of each sequence.
    steps: for each index j, the chunks whose sequence has a chunk j at or before them, and that chunk j; the loops of
        the attention twins walk it in order.
    """

    row_of_token_N: Tensor
    token_of_row_R: Tensor
    chunk_index_M: Tensor
    last_chunk_B: Tensor
    lengths: tuple[int, ...]
    steps: tuple[tuple[Tensor, Tensor], ...]

    @property
    def chunks(self) -> int:
        return self.chunk_index_M.numel()

    def scatter(self, x_NHD: Tensor) -> Tensor:
        """Lay packed rows [N, H, D] on the grid as [M, H, C, D]; padded rows are zero."""
        heads, dim = x_NHD.shape[1:]
        rows_RHD = x_NHD.new_zeros(self.token_of_row_R.numel(), heads, dim)
        rows_RHD.index_copy_(0, self.row_of_token_N, x_NHD)
        return rows_RHD.view(self.chunks, CHUNK_LENGTH, heads, dim).transpose(1, 2).contiguous()

    def gather(self, x_MHCD: Tensor) -> Tensor:
        """Take the rows of real tokens back from the grid: [M, H, C, D] to packed [N, H, D]."""
        heads, dim = x_MHCD.shape[1], x_MHCD.shape[3]
        rows_RHD = x_MHCD.transpose(1, 2).reshape(-1, heads, dim)
        return rows_RHD.index_select(0, self.row_of_token_N)


def chunk_grid(lengths: list[int], device: torch.device) -> ChunkGrid:
    """Build the grid of sequences of these lengths (tokens, each at least 1), packed one after the other.

    Raises ValueError for a sequence without tokens: it has no chunk to lie in.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"every packed sequence needs at least one token, got lengths {lengths[:8]}; drop empty ones")
    lengths_B = torch.tensor(lengths)
    chunks_B = (lengths_B + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    first_chunk_B = torch.cumsum(chunks_B, 0) - chunks_B
    first_token_B = torch.cumsum(lengths_B, 0) - lengths_B
    tokens = int(lengths_B.sum())
    chunks = int(chunks_B.sum())
    offset_N = torch.arange(tokens) - torch.repeat_interleave(first_token_B, lengths_B)
    row_of_token_N = torch.repeat_interleave(first_chunk_B * CHUNK_LENGTH, lengths_B) + offset_N
    token_of_row_R = torch.full((chunks * CHUNK_LENGTH,), tokens)
    token_of_row_R[row_of_token_N] = torch.arange(tokens)
    first_of_chunk_M = torch.repeat_interleave(first_chunk_B, chunks_B)
    chunk_index_M = torch.arange(chunks) - first_of_chunk_M
    steps = []
    for j in range(int(chunks_B.max())):
        at_or_after = torch.nonzero(chunk_index_M >= j).squeeze(1)
        steps.append((at_or_after.to(device), (first_of_chunk_M[at_or_after] + j).to(device)))
    return ChunkGrid(
        row_of_token_N=row_of_token_N.to(device),
        token_of_row_R=token_of_row_R.to(device),
        chunk_index_M=chunk_index_M.to(device),
        last_chunk_B=(first_chunk_B + chunks_B - 1).to(device),
        lengths=tuple(lengths),
        steps=tuple(steps),
    )
