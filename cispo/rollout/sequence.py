"""The engine's own records: groups under way, their sequences, and pieces of text that are waiting to be read.

A sequence is queued with its group, then its prompt (or what was put in) is read, then it decodes; it may wait for its
next turn, or be set aside for want of room, and go on from there.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from cispo.model.cache import PAGE_LENGTH, State
from cispo.model.text_stream import TextDecoder
from cispo.rollout.request import GroupRequest
from cispo.rollout.slots import Tokens
from cispo.types import ExpertIdArray, Rollout, StopReason


class Stage(Enum):
    """Where a sequence stands."""

    READING = auto()
    """In a slot; tokens that it has not read are queued."""
    DECODING = auto()
    OPEN = auto()
    """Its turn has ended, and the next has not been given."""
    ASIDE = auto()
    """Without a slot, to go on as soon as there is room."""
    ENDED = auto()


@dataclass(slots=True, eq=False)
class GroupState:
    """A group under way; `order` is its place in the queue. rollouts: completions that have ended, by index."""

    request: GroupRequest
    prompt_ids: list[int]
    order: int
    forced_ids: list[int] = field(default_factory=list)
    thinking_end_id: int | None = None
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    sequences: list["Sequence"] = field(default_factory=list)
    prompt_expert_ids_TLK: ExpertIdArray | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first."""
        return (-self.request.priority, self.order)


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion under way.

    ended_by: what ended the turn that is open. aside: its tokens while it has no slot; states: what the cache held of
    it then, on the host, after `read` tokens; None where all is to be read again. text: what its tokens have made so
    far, where strings may stop it; turn_start: from which character on that is the policy's present turn.
    is_interrupted: whether its thinking was.
    """

    group: GroupState
    index: int
    stage: Stage
    slot: int = -1
    ended_by: StopReason | None = None
    aside: Tokens | None = None
    states: list[State] | None = None
    read: int = 0
    is_thinking: bool = False
    is_interrupted: bool = False
    text_decoder: TextDecoder | None = None
    text: str = ""
    turn_start: int = 0

    @property
    def rank(self) -> tuple[int, int, int]:
        return (*self.group.rank, self.index)


@dataclass(slots=True, eq=False)
class Reading:
    """All ids that a slot's sequence has read once this is done; then `sequences` go on from there, the first in place.

    Of a group's prompt it is for all of the group, else for one sequence.
    """

    slot: int
    ids: list[int]
    sequences: list[Sequence]

    def pages_wanted(self, read: int) -> int:
        """Pages that are still to be taken, where `read` tokens have been read."""
        end, forks = len(self.ids), len(self.sequences) - 1
        new = -(-end // PAGE_LENGTH) - -(-read // PAGE_LENGTH)
        return new + (forks if end % PAGE_LENGTH else 0)


@dataclass(frozen=True, slots=True)
class OpenTurn:
    """A turn that has ended, for `Engine.extend` or `close_turn`. token_ids: of the turn, with what ended it.

    number: of the turn, in its engine.
    """

    number: int
    prompt_id: str
    stream: str
    completion_index: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """A group that could not be sampled to its end; nothing of it is in `Engine.collect`."""

    prompt_id: str
    stream: str
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class ParkedCompletion:
    """Where a completion was when its group was parked. ended_by: what ended its turn, if that is open."""

    tokens: Tokens
    is_thinking: bool
    is_interrupted: bool
    ended_by: StopReason | None


@dataclass(frozen=True, slots=True, eq=False)
class ParkedGroup:
    """A group taken out of an engine before its end, for the same or another engine to go on with; can be pickled.

    rollouts: completions that had ended, by index; completions: the others. Tokens carry the versions of the policies
    that sampled them.
    """

    request: GroupRequest
    rollouts: dict[int, Rollout]
    completions: dict[int, ParkedCompletion]

    @property
    def has_begun(self) -> bool:
        """Whether any token of it was sampled."""
        return bool(self.rollouts) or any(len(one.tokens) for one in self.completions.values())


def text_cut(text: str, strings: tuple[str, ...], searched_from: int) -> int | None:
    """Where the first of the strings begins in the text, looking from a character on; None where none is in it."""
    places = [place for place in (text.find(string, searched_from) for string in strings) if place >= 0]
    return min(places, default=None)
