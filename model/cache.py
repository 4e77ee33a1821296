"""What a policy remembers of the sequences it is decoding: fixed-size states by slot, and pages of 64 tokens.

A mixer declares what it keeps (`StateSpec`); the cache allocates it for every layer, and knows nothing of its meaning.
Sequences live in dense slots 0 .. active - 1, so that a decode step works on views and copies nothing. A fork shares
the full pages of its source and copies the page that is still being written.

S slots, J pages of one sequence, B active sequences (rounded up to a multiple of 4 with idle slots).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH

PAGE_LENGTH = CHUNK_LENGTH
_SCRATCH_PAGE = 0


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One tensor that a mixer keeps: its shape for one sequence or, if paged, for one page of 64 tokens.

    dtype: float32 for what is summed up; keys and values keep the dtype that they are multiplied in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_paged: bool


State = dict[str, Tensor]
"""The tensors of one layer by name: [S, *shape], or [pages, *shape] where paged."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefillTarget:
    """Where a packed forward goes on from and leaves the state of its pieces, one a sequence.

    layers: the cache's tensors. slot_B: slots of the sequences; pages_BJ: their page tables, up to the pieces' ends
    (both int64). starts: the position of each piece's first token.
    """

    layers: list[State]
    slot_B: Tensor
    pages_BJ: Tensor
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class DecodeStep:
    """One token for each of the slots 0 .. B - 1, with what every layer would otherwise work out again.

    every_B: 0 .. B - 1. position_B: position of the token. row_B: its row in its chunk. full_rows: sequences whose
    chunk it completes, or None. page_BJ: pages of each sequence, up to the longest; it may be a view of the cache's own
    table, good until the cache changes. active: slots in use; those from here on are idle. positions: how many
    positions the longest sequence has. All tensors are int64.
    """

    every_B: Tensor
    position_B: Tensor
    row_B: Tensor
    full_rows: Tensor | None
    page_BJ: Tensor
    active: int
    positions: int


class DecodeCache:
    """States and pages of up to `capacity` sequences of up to `max_tokens` tokens."""

    def __init__(
        self, specs: Sequence[Sequence[StateSpec]], *, capacity: int, max_tokens: int, device: torch.device
    ) -> None:
        self.capacity = -(-capacity // 4) * 4
        self.pages_per_sequence = -(-max_tokens // PAGE_LENGTH)
        pages = 1 + self.capacity * self.pages_per_sequence
        self.layers: list[State] = [
            {
                spec.name: torch.zeros(
                    (pages if spec.is_paged else self.capacity, *spec.shape), dtype=spec.dtype, device=device
                )
                for spec in layer
            }
            for layer in specs
        ]
        self._paged = [{spec.name for spec in layer if spec.is_paged} for layer in specs]
        self._device = device
        self._length_S: npt.NDArray[np.int64] = np.zeros(self.capacity, np.int64)
        self._page_SJ: npt.NDArray[np.int64] = np.full(
            (self.capacity, self.pages_per_sequence), _SCRATCH_PAGE, np.int64
        )
        self._page_table = torch.from_numpy(self._page_SJ)  # the same memory
        self._position_S: npt.NDArray[np.int64] = np.zeros(self.capacity, np.int64)
        self._row_S: npt.NDArray[np.int64] = np.zeros(self.capacity, np.int64)
        self._every_S = torch.arange(self.capacity, device=device)
        self._page_references: npt.NDArray[np.int64] = np.zeros(pages, np.int64)
        self._free_pages = list(range(pages - 1, _SCRATCH_PAGE, -1))

    def _take_page(self) -> int:
        page = self._free_pages.pop()
        self._page_references[page] = 1
        return page

    def _drop_page(self, page: int) -> None:
        self._page_references[page] -= 1
        if self._page_references[page] == 0:
            self._free_pages.append(page)

    def extend(self, slots: Sequence[int], lengths: Sequence[int]) -> PrefillTarget:
        """Take room for so many more tokens of the sequences in these slots; a packed forward of them fills it.

        An empty slot begins a sequence. Raises ValueError for a sequence that would grow past max_tokens.
        """
        starts = tuple(int(self._length_S[slot]) for slot in slots)
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        if max(ends) > self.pages_per_sequence * PAGE_LENGTH:
            raise ValueError(
                f"a sequence would be {max(ends)} tokens long, and this cache holds "
                f"{self.pages_per_sequence * PAGE_LENGTH}; make it with more max_tokens"
            )
        for slot, start, end in zip(slots, starts, ends, strict=True):
            for page in range(-(-start // PAGE_LENGTH), -(-end // PAGE_LENGTH)):
                self._page_SJ[slot, page] = self._take_page()
            self._length_S[slot] = end
        width = -(-max(ends) // PAGE_LENGTH)
        pages_BJ = self._tensor(self._page_SJ[list(slots), :width])
        return PrefillTarget(self.layers, self._tensor(np.asarray(slots, np.int64)), pages_BJ, starts)

    def fork(self, source: int, targets: Sequence[int]) -> None:
        """Give each empty target slot the sequence of the source slot."""
        if not targets:
            return
        length = int(self._length_S[source])
        full = length // PAGE_LENGTH
        partial_pages = []
        for target in targets:
            self._length_S[target] = length
            self._page_SJ[target, :full] = self._page_SJ[source, :full]
            self._page_references[self._page_SJ[source, :full]] += 1
            if length % PAGE_LENGTH:
                self._page_SJ[target, full] = self._take_page()
                partial_pages.append(int(self._page_SJ[target, full]))
        source_page = int(self._page_SJ[source, full]) if partial_pages else _SCRATCH_PAGE
        for state, paged in zip(self.layers, self._paged, strict=True):
            for name, tensor in state.items():
                if name not in paged:
                    tensor[list(targets)] = tensor[source].clone()
                elif partial_pages:
                    tensor[partial_pages] = tensor[source_page].clone()

    def move(self, source: int, target: int) -> None:
        """Move the sequence of the source slot into an empty target slot, and leave the source empty."""
        self._length_S[target] = self._length_S[source]
        self._page_SJ[target] = self._page_SJ[source]
        self._length_S[source] = 0
        self._page_SJ[source] = _SCRATCH_PAGE
        for state, paged in zip(self.layers, self._paged, strict=True):
            for name, tensor in state.items():
                if name not in paged:
                    tensor[target] = tensor[source]

    def release(self, slot: int) -> None:
        """Empty a slot and give back the pages that no other sequence shares."""
        for page in self._page_SJ[slot]:
            if page != _SCRATCH_PAGE:
                self._drop_page(int(page))
        self._page_SJ[slot] = _SCRATCH_PAGE
        self._length_S[slot] = 0

    def advance(self, active: int) -> None:
        """Take room for one more token in each of the first `active` slots, for `every_slot` to say where it goes."""
        position_B, row_B = self._position_S[:active], self._row_S[:active]
        position_B[:] = self._length_S[:active]
        np.bitwise_and(position_B, PAGE_LENGTH - 1, out=row_B)
        if not row_B.all():
            for slot in np.nonzero(row_B == 0)[0]:
                self._page_SJ[slot, self._length_S[slot] // PAGE_LENGTH] = self._take_page()
        self._length_S[:active] += 1

    def every_slot(self) -> DecodeStep:
        """A step of all slots on the cache's own tensors, for a plan: `advance` writes them, on CPU only."""
        position_S, row_S = torch.from_numpy(self._position_S), torch.from_numpy(self._row_S)
        positions = self.pages_per_sequence * PAGE_LENGTH
        return DecodeStep(self._every_S, position_S, row_S, None, self._page_table, self.capacity, positions)

    def begin_step(self, active: int) -> DecodeStep:
        """Take room for one more token in each of the first `active` slots, and say where it goes."""
        self.advance(active)
        batch = -(-active // 4) * 4
        position_B, row_B = self._position_S[:batch].copy(), self._row_S[:batch].copy()
        position_B[active:] = row_B[active:] = 0
        full = np.nonzero(row_B == PAGE_LENGTH - 1)[0]
        longest = int(position_B.max())
        return DecodeStep(
            every_B=self._every_S[:batch],
            position_B=torch.from_numpy(position_B).to(self._device),
            row_B=torch.from_numpy(row_B).to(self._device),
            full_rows=torch.from_numpy(full).to(self._device) if full.size else None,
            page_BJ=self._page_table[:batch, : longest // PAGE_LENGTH + 1].to(self._device),
            active=active,
            positions=longest + 1,
        )

    def length(self, slot: int) -> int:
        """Tokens of the sequence in a slot; 0 where it is empty."""
        return int(self._length_S[slot])

    def snapshot(self, slot: int) -> list[State]:
        """Copies of all that the cache holds of one sequence: per layer, states and the pages in order."""
        pages = self._tensor(self._page_SJ[slot, : -(-self.length(slot) // PAGE_LENGTH)])
        return [
            {name: x.index_select(0, pages) if name in paged else x[slot].clone() for name, x in state.items()}
            for state, paged in zip(self.layers, self._paged, strict=True)
        ]

    def restore(self, slot: int, length: int, layers: Sequence[State]) -> None:
        """Put a sequence of `length` tokens, as `snapshot` gave it, into an empty slot."""
        pages = self.extend([slot], [length]).pages_BJ[0]
        for state, paged, stored in zip(self.layers, self._paged, layers, strict=True):
            for name, tensor in state.items():
                if name in paged:
                    tensor.index_copy_(0, pages, stored[name].to(tensor.device))
                else:
                    tensor[slot] = stored[name]

    @property
    def pages_in_use(self) -> int:
        return int((self._page_references > 0).sum())

    def _tensor(self, values: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values).copy()).to(self._device)
