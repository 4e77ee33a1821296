"""Who gets slots and pages: groups are admitted whole, and what was set aside comes first.

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
        self._waiting: list[tuple[tuple[int, int], GroupState]] = []
        self.readings: list[Reading] = []
        self.aside: list[Sequence] = []
        self.in_slot: dict[int, Sequence] = {}
        self.times_set_aside = 0

    @property
    def waiting_groups(self) -> int:
        return len(self._waiting)

    @property
    def pages_to_give(self) -> int:
        """Free pages that are promised to nobody."""
        promised = sum(reading.pages_wanted(self._cache.length(reading.slot)) for reading in self.readings)
        return self._cache.free_pages - promised

    def queue(self, group: GroupState) -> None:
        heapq.heappush(self._waiting, (group.rank, group))

    def take_waiting(self) -> list[GroupState]:
        """All groups that wait, first to last; none waits any more."""
        waiting = [heapq.heappop(self._waiting)[1] for _ in range(len(self._waiting))]
        return waiting

    def admit(self) -> list[Sequence]:
        """Give room to what was set aside, then to groups, while there is some; who has a slot now and had none."""
        admitted: list[Sequence] = []
        pages_to_give = self.pages_to_give
        for sequence in sorted(self.aside, key=lambda one: one.rank):
            wanted = min(-(-self._tokens_of(sequence) // PAGE_LENGTH) + 1, self._cache.pages)
            if self._make_room(1, wanted, pages_to_give) is None:
                return admitted
            self.aside.remove(sequence)
            self._occupy(sequence)
            admitted.append(sequence)
            pages_to_give = self.pages_to_give
        while self._waiting:
            group = self._waiting[0][1]
            size, pages = group.request.group_size, -(-len(group.prompt_ids) // PAGE_LENGTH)
            # A page more for each keeps a group that was just admitted from being set aside at once.
            left = self._make_room(size, min(pages + 2 * size, self._cache.pages), pages_to_give)
            if left is None:
                return admitted
            heapq.heappop(self._waiting)
            for sequence in group.sequences:
                self._occupy(sequence)
            admitted += group.sequences
            self.readings.append(Reading(group.sequences[0].slot, group.prompt_ids, list(group.sequences)))
            pages_to_give = left - self.readings[-1].pages_wanted(0)
        return admitted

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
        self._arrays.put(slot, sequence.aside or Tokens.none())
        if sequence.aside is not None:
            if sequence.states is not None:
                self._cache.restore(slot, sequence.read, sequence.states)
            self.read_on(sequence)
        sequence.aside = sequence.states = None

    def read_on(self, sequence: Sequence) -> None:
        """Queue all tokens of a sequence that its slot has not read."""
        count = int(self._arrays.count_S[sequence.slot])
        ids = [*sequence.group.prompt_ids, *self._arrays.ids_ST[sequence.slot, :count].tolist()]
        sequence.stage = Stage.READING
        self.readings.append(Reading(sequence.slot, ids, [sequence]))

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
            self.aside.append(sequence)
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
        self.aside = [one for one in self.aside if one.group is not group]

    def decoding(self) -> Slots:
        """Slots of the sequences that a decode step may be for, in order of admission."""
        is_decoding = [slot for slot, one in self.in_slot.items() if one.stage is Stage.DECODING]
        return np.array(is_decoding, np.int64)
