"""What a policy remembers of the sequences it is decoding: fixed-size states by slot, and pages of 64 tokens.

A mixer declares what it keeps (`StateSpec`); the cache allocates it for every layer, and knows nothing of its meaning.
A sequence stays in its slot from its first token to its release; a decode step names the slots it is for. A fork shares
the full pages of its source and copies the page that is still being written.

S slots, J pages of one sequence, B sequences of a step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH

PAGE_LENGTH = CHUNK_LENGTH
SPARE_PAGE = 0

Slots = npt.NDArray[np.int64]


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
    """One token for each of B sequences, with what every layer would otherwise work out again.

    slot_B: slots of the sequences; idle rows have the spare one. position_B: position of the token. row_B: its row in
    its chunk. full_rows: rows of the step whose chunk the token completes, or None (CUDA kernels find them in row_B).
    page_BJ: pages of each sequence, up to the longest at least. active: rows in use; those from here on are idle.
    positions: how many positions the longest sequence has at most. All tensors are int64.
    """

    slot_B: Tensor
    position_B: Tensor
    row_B: Tensor
    full_rows: Tensor | None
    page_BJ: Tensor
    active: int
    positions: int


class OutOfPagesError(RuntimeError):
    """A sequence wants a page and none is free."""


class DecodeCache:
    """States and pages of up to `capacity` sequences of up to `max_tokens` tokens.

    pages: of 64 tokens each, in all sequences together; None has enough for all at their longest. Besides, one slot
    and one page are spare: what idle rows of a step read and write. page_table: int64 [S, J] on the device; of pages
    that a step takes it knows only once the step has written them there.
    """

    def __init__(
        self,
        specs: Sequence[Sequence[StateSpec]],
        *,
        capacity: int,
        max_tokens: int,
        device: torch.device,
        pages: int | None = None,
    ) -> None:
        self.capacity = self.spare_slot = capacity
        self.pages_per_sequence = -(-max_tokens // PAGE_LENGTH)
        self.pages = capacity * self.pages_per_sequence if pages is None else pages
        self.layers: list[State] = [
            {
                spec.name: torch.zeros(
                    (self.pages + 1 if spec.is_paged else capacity + 1, *spec.shape), dtype=spec.dtype, device=device
                )
                for spec in layer
            }
            for layer in specs
        ]
        self._paged = [{spec.name for spec in layer if spec.is_paged} for layer in specs]
        self._device = device
        self._length_S: npt.NDArray[np.int64] = np.zeros(capacity + 1, np.int64)
        self._page_SJ: npt.NDArray[np.int64] = np.full((capacity + 1, self.pages_per_sequence), SPARE_PAGE, np.int64)
        self.page_table = torch.from_numpy(self._page_SJ).to(device)
        self._plan_arrays = tuple(np.zeros(capacity, np.int64) for _ in range(3))
        self._plan_page_BJ = np.zeros((capacity, self.pages_per_sequence), np.int64)
        self._page_references: npt.NDArray[np.int64] = np.zeros(self.pages + 1, np.int64)
        self._free_pages = list(range(self.pages, SPARE_PAGE, -1))

    @property
    def bytes(self) -> int:
        """Memory of all states and pages."""
        return sum(tensor.nbytes for state in self.layers for tensor in state.values())

    @property
    def free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def pages_in_use(self) -> int:
        return self.pages - self.free_pages

    def length(self, slot: int) -> int:
        """Tokens of the sequence in a slot; 0 where it is empty."""
        return int(self._length_S[slot])

    def lengths(self, slots: Slots) -> Slots:
        """Tokens of the sequences in these slots."""
        lengths: Slots = self._length_S[slots]
        return lengths

    def pages_for_step(self, slots: Slots) -> int:
        """How many free pages a step of these slots takes."""
        return int(np.count_nonzero(self._length_S[slots] % PAGE_LENGTH == 0))

    def _take_page(self) -> int:
        if not self._free_pages:
            raise OutOfPagesError(f"all {self.pages} pages of the cache are in use; release a sequence first")
        page = self._free_pages.pop()
        self._page_references[page] = 1
        return page

    def _drop_page(self, page: int) -> None:
        self._page_references[page] -= 1
        if self._page_references[page] == 0:
            self._free_pages.append(page)

    def extend(self, slots: Sequence[int], lengths: Sequence[int]) -> PrefillTarget:
        """Take room for so many more tokens of the sequences in these slots; a packed forward of them fills it.

        An empty slot begins a sequence. Raises ValueError for a sequence that would grow past max_tokens, and
        OutOfPagesError, before anything is taken, where there are too few pages.
        """
        starts = tuple(int(self._length_S[slot]) for slot in slots)
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        if max(ends) > self.pages_per_sequence * PAGE_LENGTH:
            raise ValueError(
                f"a sequence would be {max(ends)} tokens long, and this cache holds "
                f"{self.pages_per_sequence * PAGE_LENGTH}; make it with more max_tokens"
            )
        new = [
            (slot, page)
            for slot, start, end in zip(slots, starts, ends, strict=True)
            for page in range(-(-start // PAGE_LENGTH), -(-end // PAGE_LENGTH))
        ]
        if len(new) > self.free_pages:
            raise OutOfPagesError(f"{len(new)} pages are wanted and {self.free_pages} are free")
        for slot, page in new:
            self._page_SJ[slot, page] = self._take_page()
        self._length_S[list(slots)] = ends
        self._mirror(slots)
        width = -(-max(ends) // PAGE_LENGTH)
        pages_BJ = self._tensor(self._page_SJ[list(slots), :width])
        return PrefillTarget(self.layers, self._tensor(np.asarray(slots, np.int64)), pages_BJ, starts)

    def fork(self, source: int, targets: Sequence[int]) -> None:
        """Give each empty target slot the sequence of the source slot."""
        self.fork_all([(source, targets)])

    def fork_all(self, forks: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Several forks at once, each a source slot and its empty target slots."""
        slots: list[tuple[int, int]] = []
        pages: list[tuple[int, int]] = []
        for source, targets in forks:
            length = int(self._length_S[source])
            full = length // PAGE_LENGTH
            for target in targets:
                self._length_S[target] = length
                self._page_SJ[target, :full] = self._page_SJ[source, :full]
                self._page_references[self._page_SJ[source, :full]] += 1
                slots.append((source, target))
                if length % PAGE_LENGTH:
                    self._page_SJ[target, full] = self._take_page()
                    pages.append((int(self._page_SJ[source, full]), int(self._page_SJ[target, full])))
        self._mirror([target for _, target in slots])
        copies = [self._tensor(np.array(pairs, np.int64).reshape(-1, 2).T) for pairs in (slots, pages)]
        for state, paged in zip(self.layers, self._paged, strict=True):
            for name, tensor in state.items():
                source_P, target_P = copies[name in paged]
                if source_P.numel():
                    tensor.index_copy_(0, target_P, tensor.index_select(0, source_P))

    def release(self, slot: int) -> None:
        """Empty a slot and give back the pages that no other sequence shares."""
        for page in self._page_SJ[slot, : -(-int(self._length_S[slot]) // PAGE_LENGTH)]:
            self._drop_page(int(page))
        self._page_SJ[slot] = SPARE_PAGE
        self._length_S[slot] = 0

    def advance(self, slots: Slots) -> tuple[Slots, Slots]:
        """Take room for one more token of the sequences in these slots; its position, and the page it lies in.

        Raises OutOfPagesError before anything is taken where `pages_for_step` is more than there are free.
        """
        if self.pages_for_step(slots) > self.free_pages:
            raise OutOfPagesError(f"{self.pages_for_step(slots)} pages are wanted and {self.free_pages} are free")
        position_B = self._length_S[slots]
        for slot in slots[position_B % PAGE_LENGTH == 0]:
            self._page_SJ[slot, self._length_S[slot] // PAGE_LENGTH] = self._take_page()
        self._length_S[slots] += 1
        return position_B, self._page_SJ[slots, position_B // PAGE_LENGTH]

    def plan_step(self) -> DecodeStep:
        """A step of as many rows as there are slots, on tensors that `fill_plan_step` fills; on CPU, for a plan."""
        slot_S, position_S, row_S = (torch.from_numpy(array) for array in self._plan_arrays)
        positions = self.pages_per_sequence * PAGE_LENGTH
        return DecodeStep(
            slot_S, position_S, row_S, None, torch.from_numpy(self._plan_page_BJ), self.capacity, positions
        )

    def fill_plan_step(self, slots: Slots) -> None:
        """`advance`, and what the tensors of `plan_step` hold from then on."""
        rows = len(slots)
        position_B, _ = self.advance(slots)
        for array, values in zip(self._plan_arrays, (slots, position_B, position_B % PAGE_LENGTH), strict=True):
            array[:rows] = values
        np.take(self._page_SJ, slots, 0, out=self._plan_page_BJ[:rows])

    def begin_step(self, slots: Slots) -> DecodeStep:
        """Take room for one more token of the sequences in these slots, and say where it goes.

        Rows are made up to a multiple of 4 with idle ones, as products of the twins want it.
        """
        active, spare = len(slots), -len(slots) % 4
        position_B, _ = self.advance(slots)
        slots = np.concatenate((slots, np.full(spare, self.spare_slot)))
        position_B = np.concatenate((position_B, np.zeros(spare, np.int64)))
        row_B = position_B % PAGE_LENGTH
        full = np.nonzero(row_B == PAGE_LENGTH - 1)[0]
        longest = int(position_B.max())
        return DecodeStep(
            slot_B=self._tensor(slots),
            position_B=self._tensor(position_B),
            row_B=self._tensor(row_B),
            full_rows=self._tensor(full) if full.size else None,
            page_BJ=self._tensor(self._page_SJ[slots, : longest // PAGE_LENGTH + 1]),
            active=active,
            positions=longest + 1,
        )

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

    def _mirror(self, slots: Sequence[int]) -> None:
        """Bring the device's page table up to date; on CPU it is the same memory."""
        if self._device.type != "cpu" and slots:
            rows = self._tensor(np.asarray(slots, np.int64))
            self.page_table.index_copy_(0, rows, self._tensor(self._page_SJ[list(slots)]))

    def _tensor(self, values: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values).copy()).to(self._device)
