"""Groups under way and what becomes of them: they end, they fail, or a turn of theirs waits for the next."""

from collections import Counter

import numpy as np

from cispo.model.tokenizer import Tokenizer
from cispo.rollout import ends
from cispo.rollout.request import RequestError
from cispo.rollout.room import Room
from cispo.rollout.sequence import GroupState, OpenTurn, ParkedCompletion, ParkedGroup, RequestFailure, Sequence, Stage
from cispo.rollout.slots import SlotArrays, Tokens
from cispo.types import Group, Rollout, StopReason


class Groups:
    """All groups of an engine that have not ended, and what it has to hand out.

    stop_reasons: of all completions so far. finished, failures, turns: what nobody has collected yet.
    """

    def __init__(self, tokenizer: Tokenizer, arrays: SlotArrays, room: Room) -> None:
        self._tokenizer, self._arrays, self._room = tokenizer, arrays, room
        self._under_way: dict[int, GroupState] = {}
        self._open: dict[OpenTurn, Sequence] = {}
        self._turns_opened = 0
        self.stop_reasons: Counter[StopReason] = Counter()
        self.finished: list[Group] = []
        self.failures: list[RequestFailure] = []
        self.turns: list[OpenTurn] = []

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def open_turns(self) -> int:
        return len(self._open)

    def in_order(self) -> list[GroupState]:
        """All groups under way, first to last in rank."""
        return sorted(self._under_way.values(), key=lambda group: group.rank)

    def add(self, group: GroupState) -> None:
        """Take a new group, with a sequence for each completion that has not ended."""
        for index in range(group.request.group_size):
            if index not in group.rollouts:
                has_budget = group.request.stops.thinking is not None
                sequence = Sequence(group, index, Stage.READING, is_thinking=has_budget)
                if ends.reads_text(group):
                    sequence.text_decoder = self._tokenizer.text_decoder()
                group.sequences.append(sequence)
        self._under_way[group.order] = group

    def tokens(self, sequence: Sequence) -> Tokens:
        """What a sequence has so far, wherever it is."""
        if sequence.aside is not None:
            return sequence.aside
        return self._arrays.tokens(sequence.slot) if sequence.slot >= 0 else Tokens.none()

    def count(self, sequence: Sequence) -> int:
        """How many tokens that is."""
        return len(sequence.aside) if sequence.aside is not None else int(self._arrays.count_S[sequence.slot])

    def end(self, sequence: Sequence, reason: StopReason) -> None:
        """End a completion, and its group with the last of them."""
        tokens, group = self.tokens(sequence), sequence.group
        is_cut = reason is StopReason.STOP_STRING
        group.rollouts[sequence.index] = Rollout(
            prompt_id=group.request.prompt.id,
            completion_index=sequence.index,
            prompt_token_ids_T=np.asarray(group.prompt_ids, np.int32),
            turns=tokens.turns(),
            stop_reason=reason,
            text=ends.text_before_stop(sequence) if is_cut else self._tokenizer.decode(tokens.ids_T.tolist()),
            prompt_expert_ids_TLK=group.prompt_expert_ids_TLK,
            is_interrupted=sequence.is_interrupted,
        )
        self.stop_reasons[reason] += 1
        self._room.vacate(sequence)
        sequence.stage, sequence.aside, sequence.states = Stage.ENDED, None, None
        if len(group.rollouts) == group.request.group_size:
            in_order = tuple(group.rollouts[index] for index in range(group.request.group_size))
            self.finished.append(Group(group.request.prompt, in_order, group.request.stream))
            del self._under_way[group.order]

    def fail(self, group: GroupState, message: str) -> None:
        """Give a group up."""
        request = group.request
        failure = RequestFailure(request.prompt.id, request.stream, f"prompt {request.prompt.id}: {message}")
        self.failures.append(failure)
        self.drop(group)

    def drop(self, group: GroupState) -> None:
        """Forget a group and all that it has."""
        self._room.forget(group)
        self._open = {turn: sequence for turn, sequence in self._open.items() if sequence.group is not group}
        self.turns = [turn for turn in self.turns if turn in self._open]
        self._under_way.pop(group.order, None)

    def open_turn(self, sequence: Sequence, reason: StopReason) -> None:
        """Let a completion whose turn has ended wait for the next."""
        sequence.stage, sequence.ended_by = Stage.OPEN, reason
        if sequence.slot >= 0:
            self._arrays.stop_launching(sequence.slot)
        request, last = sequence.group.request, self.tokens(sequence).turns()[-1]
        ids = tuple(last.token_ids_T.tolist())
        text = self._tokenizer.decode(ids)
        self._turns_opened += 1
        turn = OpenTurn(self._turns_opened, request.prompt.id, request.stream, sequence.index, ids, text)
        self._open[turn] = sequence
        self.turns.append(turn)

    def take_opened(self, turn: OpenTurn) -> Sequence:
        """The sequence that waits with this turn, which is open no more; RequestError where none does."""
        if turn not in self._open:
            raise RequestError(
                f"turn {turn.number}, of completion {turn.completion_index} of prompt {turn.prompt_id}, is not open; "
                "extend or close each turn of collect_turns once, in the engine that gave it"
            )
        return self._open.pop(turn)

    def park(self, group: GroupState) -> ParkedGroup:
        """Take a group out, with all that was sampled of it."""
        completions = {
            one.index: ParkedCompletion(self.tokens(one), one.is_thinking, one.is_interrupted, one.ended_by)
            for one in group.sequences
            if one.index not in group.rollouts
        }
        self.drop(group)
        return ParkedGroup(group.request, dict(group.rollouts), completions)

    def put_back(self, group: GroupState, parked: ParkedGroup) -> None:
        """Go on with the completions of a new group where those of a parked one were."""
        for sequence in group.sequences:
            before = parked.completions[sequence.index]
            sequence.aside, sequence.is_thinking = before.tokens, before.is_thinking
            sequence.is_interrupted = before.is_interrupted
            ends.follow(sequence, before.tokens)
            if before.ended_by is not None:
                self.open_turn(sequence, before.ended_by)
            else:
                sequence.stage = Stage.ASIDE
                self._room.queue(sequence)
