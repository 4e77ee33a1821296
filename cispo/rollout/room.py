"""Who gets slots and pages, in order of rank: groups, which are admitted whole, and what was set aside.

Pages that admitted prompts will still take are promised to them. When a decode step finds too few others, sequences are
set aside, those that wait for their next turn first, then the last in rank; their states are kept on the host, so
nothing is lost for want of room.
"""

import heapq

import numpy as np

from cispo.model.cache import PAGE_LENGTH, DecodeCache, Slots
from cispo.rollout.sequence import GroupState, Reading, Sequence, Stage
from cispo.rollout.slots import SlotArrays, Tokens


class Room:
    """The slots and pages of a cache, and the sequences that have, had or want them."""

    def __init__(self, cache: DecodeCache, arrays: SlotArrays) -> None:
        self._cache, self._arrays = cache, arrays
        self._free_slots = list(range(cache.capacity - 1, -1, -1))
        self._waiting: list[tuple[tuple[int, ...], GroupState | Sequence]] = []
        self.readings: list[Reading] = []
        self.in_slot: dict[int, Sequence] = {}
        self.times_set_aside = 0

    @property
    def waiting_groups(self) -> int:
        return sum(isinstance(one, GroupState) for _, one in self._waiting)

    @property
    def pages_to_give(self) -> int:
        """Free pages that are promised to nobody."""
        promised = sum(reading.pages_wanted(self._cache.length(reading.slot)) for reading in self.readings)
        return self._cache.free_pages - promised

    def queue(self, waiting: GroupState | Sequence) -> None:
        """Let a group that has not begun, or a sequence that was set aside, wait for room."""
        heapq.heappush(self._waiting, (waiting.rank, waiting))

    def admit(self) -> list[Sequence]:
        """Give room to what waits, first to last, while there is some; the sequences that have a slot now."""
        admitted: list[Sequence] = []
        pages_to_give = self.pages_to_give
        while self._waiting:
            waiting = self._waiting[0][1]
            slots, pages = self._wanted(waiting)
            left = self._make_room(slots, min(pages, self._cache.pages), pages_to_give)
            if left is None:
                break
            heapq.heappop(self._waiting)
            sequences = waiting.sequences if isinstance(waiting, GroupState) else [waiting]
            for sequence in sequences:
                self._occupy(sequence)
            if isinstance(waiting, GroupState):
                self.readings.append(Reading(sequences[0].slot, waiting.prompt_ids, list(sequences)))
                pages_to_give = left - self.readings[-1].pages_wanted(0)
            else:
                pages_to_give = left - (pages - 1)
            admitted += sequences
        return admitted

    def _wanted(self, waiting: GroupState | Sequence) -> tuple[int, int]:
        """Slots and pages; a page more for each sequence keeps it from being set aside at once."""
        if isinstance(waiting, GroupState):
            size = waiting.request.group_size
            return size, -(-len(waiting.prompt_ids) // PAGE_LENGTH) + 2 * size
        return 1, -(-self._tokens_of(waiting) // PAGE_LENGTH) + 1

    def _tokens_of(self, sequence: Sequence) -> int:
        return len(sequence.group.prompt_ids) + len(sequence.aside or ())

    def _make_room(self, slots: int, pages: int, pages_to_give: int) -> int | None:
        """Pages to give once so much is free, if need be by setting aside sequences that wait for their next turn.

        None where so much cannot be had. pages_to_give: as it is now; counting it anew takes all readings.
        """
        while len(self._free_slots) < slots or pages_to_give < pages:
            open_sequences = [one for one in self.in_slot.values() if one.stage is Stage.OPEN]
            if not open_sequences:
                return None
            self.set_aside(max(open_sequences, key=lambda one: one.rank))
            pages_to_give = self.pages_to_give
        return pages_to_give

    def _occupy(self, sequence: Sequence) -> None:
        """Give a sequence a slot, with what it brings along; what of it is unread, or all of it, is queued."""
        slot = sequence.slot = self._free_slots.pop()
        self.in_slot[slot] = sequence
        sequence.stage = Stage.READING
        tokens, states = sequence.aside, sequence.states
        sequence.aside = sequence.states = None
        self._arrays.put(slot, tokens or Tokens.none())
        if tokens is not None:
            if states is not None:
                self._cache.restore(slot, sequence.read, states)
            self.readings.append(self._unread(sequence))

    def read_on(self, sequence: Sequence) -> None:
        """Queue all tokens of a sequence that its slot has not read; set it aside where there are too few pages."""
        reading = self._unread(sequence)
        sequence.stage = Stage.READING
        wanted = reading.pages_wanted(self._cache.length(sequence.slot))
        if wanted and self._make_room(0, wanted, self.pages_to_give) is None:
            self.set_aside(sequence)
        else:
            self.readings.append(reading)

    def _unread(self, sequence: Sequence) -> Reading:
        count = int(self._arrays.count_S[sequence.slot])
        ids = [*sequence.group.prompt_ids, *self._arrays.ids_ST[sequence.slot, :count].tolist()]
        return Reading(sequence.slot, ids, [sequence])

    def make_pages(self, slots: Slots) -> Slots:
        """Those of the slots that a decode step has pages for; the others' sequences were set aside.

        No token may be under way.
        """
        while self._cache.pages_for_step(slots) > max(self.pages_to_give, 0):
            victims = [one for one in self.in_slot.values() if one.stage is Stage.OPEN]
            victims = victims or [self.in_slot[int(slot)] for slot in slots]
            victim = max(victims, key=lambda one: one.rank)
            slots = slots[slots != victim.slot]
            self.set_aside(victim)
        return slots

    def set_aside(self, sequence: Sequence, *, keeps_states: bool = True) -> None:
        """Take a sequence out of its slot, tokens and states kept on the host; it queues unless its turn is open."""
        slot = sequence.slot
        sequence.aside = self._arrays.tokens(slot)
        sequence.read = self._cache.length(slot)
        sequence.states = None
        if keeps_states and sequence.read:
            layers = self._cache.snapshot(slot)
            sequence.states = [{name: x.to("cpu") for name, x in layer.items()} for layer in layers]
        self.vacate(sequence)
        if sequence.stage is not Stage.OPEN:
            sequence.stage = Stage.ASIDE
            self.queue(sequence)
        self.times_set_aside += 1

    def vacate(self, sequence: Sequence) -> None:
        """Take a sequence's slot and pages back."""
        slot, sequence.slot = sequence.slot, -1
        if slot < 0:
            return
        self.readings = [one for one in self.readings if one.slot != slot]
        self._cache.release(slot)
        self._arrays.epoch_S[slot] += 1
        del self.in_slot[slot]
        self._free_slots.append(slot)

    def forget(self, group: GroupState) -> None:
        """Take back all that a group has."""
        for sequence in group.sequences:
            self.vacate(sequence)
            sequence.stage = Stage.ENDED
        self._waiting = [(rank, one) for rank, one in self._waiting if rank[:2] != group.rank]
        heapq.heapify(self._waiting)

    def decoding(self) -> Slots:
        """Slots of the sequences that a decode step may be for, in order of admission."""
        is_decoding = [slot for slot, one in self.in_slot.items() if one.stage is Stage.DECODING]
        return np.array(is_decoding, np.int64)
