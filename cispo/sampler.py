"""Groups on their way: queued, sampled by a rollout worker, scored by a reward worker, collected by the loop.

Everything that the run waits for passes through one place, `_turn`: groups go on being sampled and scored while the
learner trains, and an actor that dies is replaced there, its groups given to another. With equal weights a group
sampled again is the same group, so deaths change no number of a synchronous run.

A group that was held by actors that died is sampled apart from others the third time; if its actor dies again, the
prompt is to blame: it is quarantined, and the run goes on without it.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from cispo.broadcast import verify_receipt
from cispo.errors import ActorLostError, CispoError, DeadlineError
from cispo.member import Member, Promise
from cispo.parallel.link import LinkLostError
from cispo.ray_runtime import await_result
from cispo.rollout.request import GroupRequest
from cispo.rollout.slice import SLICE_S, Slice
from cispo.types import Group, Score, ScoredGroup, ScoreStatus

Key = tuple[str, str]
"""A group by the stream of its noise and its prompt's id."""
Progress = Callable[[int, int], None]
"""(groups done, groups in all), called as they end."""

CALLS_AHEAD = 2
"""Slices of work asked of a rollout worker at a time; one would leave it idle while its answer travels."""
DEATHS_OF_A_GROUP = 3
"""Actors that may die with a group in their hands before its prompt is quarantined."""
DEATHS_IN_A_ROW = 8
"""Deaths of a rollout worker without a slice of work in between that end the run."""


@dataclass(frozen=True, slots=True, eq=False)
class Collected:
    """Scored groups in the order they were asked for; prompts without one, by id, with the reason; seconds."""

    groups: list[ScoredGroup]
    failed: dict[str, str]
    times: dict[str, float]


@dataclass(slots=True, eq=False)
class _Desk:
    """What one rollout worker has in hand.

    fresh: requests that go with the next call. calls: slices asked for, with the weights that each must prove.
    """

    member: Member
    held: dict[Key, GroupRequest] = field(default_factory=dict)
    fresh: list[GroupRequest] = field(default_factory=list)
    calls: dict[Any, Promise | None] = field(default_factory=dict)
    deaths_in_a_row: int = 0


class Sampler:
    """Deals requests out to workers and follows them to their scores.

    on_death: called for a rollout worker that is gone; replaces it, or raises. on_ready: called for the new one when it
    has started, before it gets work; sends it its weights. say: tells a person. groups_per_worker: groups that a
    rollout worker holds at most.
    """

    def __init__(
        self,
        rollout: Sequence[Member],
        rewards: Sequence[Member],
        *,
        groups_per_worker: int,
        on_death: Callable[[Member], None],
        on_ready: Callable[[Member], None],
        say: Callable[[str], None],
    ) -> None:
        self._desks = [_Desk(member) for member in rollout]
        self._idle = deque(rewards)
        self._groups_per_worker = groups_per_worker
        self._on_death, self._on_ready, self._say = on_death, on_ready, say
        self.quarantined: dict[str, str] = {}
        self._queue: deque[GroupRequest] = deque()
        self._slices: dict[Any, _Desk] = {}
        self._to_score: deque[tuple[Key, Group]] = deque()
        self._scoring: dict[Any, tuple[Member, Key, Group]] = {}
        self._scored: dict[Key, ScoredGroup] = {}
        self._failed: dict[Key, str] = {}
        self._sampled_at: dict[Key, float] = {}
        self._deaths: Counter[Key] = Counter()
        self._reward_deaths: Counter[Key] = Counter()
        self._busy_s = 0.0
        self._deaths_by_role: Counter[str] = Counter()

    def submit(self, requests: Iterable[GroupRequest]) -> None:
        """Queue groups; each must be collected once. No two under way may share stream and prompt id."""
        for request in requests:
            if request.prompt.id in self.quarantined:
                self._failed[_key(request)] = f"quarantined: {self.quarantined[request.prompt.id]}"
            else:
                self._queue.append(request)
        self._deal()

    def collect(self, requests: Sequence[GroupRequest], progress: Progress, timeout_s: float) -> Collected:
        """Wait for groups that were submitted. DeadlineError, naming who is waited for, after `timeout_s`."""
        started = time.perf_counter()
        keys = [_key(request) for request in requests]
        told = -1
        while True:
            done = sum(key in self._scored or key in self._failed for key in keys)
            if done > told:
                progress(done, len(keys))
                told = done
            if done == len(keys):
                break
            if self._turn(started + timeout_s - time.perf_counter()) is None:
                raise DeadlineError(
                    f"{done} of {len(keys)} groups after {timeout_s:g} s, waiting for {self._waited_for()}; "
                    "raise rollout.timeout_s if it was only slow"
                )
        ended = time.perf_counter()
        sampled = max((self._sampled_at.pop(key, started) for key in keys), default=started)
        sampled = max(sampled, started)
        times = {"time_s/rollout": sampled - started, "time_s/reward": ended - sampled}
        groups = [self._scored.pop(key) for key in keys if key in self._scored]
        failed = {key[1]: self._failed.pop(key) for key in keys if key in self._failed}
        return Collected(groups, failed, times)

    def wait_for(self, reference: Any, *, timeout_s: float, what: str) -> Any:
        """The value of another actor's answer; groups go on meanwhile. Errors as `await_result`'s."""
        return self.wait_for_all({reference: what}, timeout_s=timeout_s)[0]

    def wait_for_all(self, waits: Mapping[Any, str], *, timeout_s: float) -> list[Any]:
        """The values of several answers, in order; the first error among them ends the wait.

        waits: what each reference is waited for, in words.
        """
        deadline = time.perf_counter() + timeout_s
        values: dict[Any, Any] = {}
        while len(values) < len(waits):
            waiting = [reference for reference in waits if reference not in values]
            answered = self._turn(deadline - time.perf_counter(), waiting)
            if answered is None:
                raise DeadlineError(f"waited {timeout_s:g} s for {'; '.join(waits[one] for one in waiting)}")
            if answered in waits:
                values[answered] = await_result(answered, timeout_s=0, what=waits[answered])
        return [values[reference] for reference in waits]

    def take_receipts(self, timeout_s: float) -> None:
        """Until every worker has proved what it holds; groups go on meanwhile. DeadlineError after timeout_s."""
        deadline = time.perf_counter() + timeout_s
        while waiting := [desk.member for desk in self._desks if desk.member.receipts]:
            if self._turn(deadline - time.perf_counter()) is None:
                late = "; ".join(f"{member.name} ({member.last_log_line()})" for member in waiting)
                raise DeadlineError(f"waited {timeout_s:g} s for {late} to take weights")

    def counts(self) -> tuple[float, dict[str, int]]:
        """Seconds that rollout workers have sampled, and deaths by role, since the last call."""
        found = self._busy_s, dict(self._deaths_by_role)
        self._busy_s = 0.0
        self._deaths_by_role.clear()
        return found

    @property
    def has_work(self) -> bool:
        """Whether a rollout worker has groups in hand or any are queued."""
        return bool(self._queue) or any(desk.held for desk in self._desks)

    def forget_all(self) -> None:
        """Drop every group under way; rollout workers are told, and what they still send is not used."""
        for desk in self._desks:
            desk.held.clear()
            desk.fresh.clear()
            desk.calls.clear()
            desk.member.forget_weights()
            desk.member.actor.forget.remote()
        for member, _, _ in self._scoring.values():
            # It scores to the end what nobody wants; its next group waits for that.
            self._idle.append(member)
        for waiting in (self._queue, self._slices, self._to_score, self._scoring, self._scored, self._failed):
            waiting.clear()
        self._sampled_at.clear()

    def _turn(self, timeout_s: float, others: Sequence[Any] = ()) -> Any:
        """Let one thing happen: the reference that answered, or None where none did in time."""
        self._deal()
        receipts = {receipt: desk for desk in self._desks for receipt in desk.member.receipts}
        starts = {desk.member.ready: desk for desk in self._desks if desk.member.ready is not None}
        # Receipts come first: what a worker sampled is looked at when it is known what it holds.
        waited = [*receipts, *starts, *self._slices, *self._scoring, *others]
        ready, _ = ray.wait(waited, timeout=max(0.0, timeout_s)) if waited else ([], [])
        if not ready:
            return None
        answered = ready[0]
        if answered in receipts:
            self._take_receipt(receipts[answered], answered)
        elif answered in starts:
            self._take_start(starts[answered], answered)
        elif answered in self._slices:
            self._take_slice(self._slices.pop(answered), answered)
        elif answered in self._scoring:
            self._take_scores(*self._scoring.pop(answered), answered)
        return answered

    def _deal(self) -> None:
        """Give what is queued to workers that have room, and ask for the next slice of what they hold."""
        while self._queue:
            desk = self._desk_for(self._queue[0])
            if desk is None:
                break
            request = self._queue.popleft()
            desk.held[_key(request)] = request
            desk.fresh.append(request)
        for desk in self._desks:
            while desk.held and len(desk.calls) < CALLS_AHEAD:
                call = desk.member.actor.run_slice.remote(tuple(desk.fresh), SLICE_S)
                desk.fresh = []
                desk.calls[call] = desk.member.proof
                self._slices[call] = desk
        while self._to_score and self._idle:
            member, (key, group) = self._idle.popleft(), self._to_score.popleft()
            self._scoring[member.actor.score.remote(group)] = (member, key, group)

    def _desk_for(self, request: GroupRequest) -> _Desk | None:
        """The worker with least in hand that has room; one to itself for a group that two have died with."""
        present = [desk for desk in self._desks if desk.member.ready is None]
        if self._is_suspect(_key(request)):
            return next((desk for desk in present if not desk.held), None)
        free = [desk for desk in present if not any(map(self._is_suspect, desk.held))]
        desk = min(free, key=lambda one: len(one.held), default=None)
        return desk if desk is not None and len(desk.held) < self._groups_per_worker else None

    def _is_suspect(self, key: Key) -> bool:
        return self._deaths[key] >= DEATHS_OF_A_GROUP - 1

    def _take_start(self, desk: _Desk, started: Any) -> None:
        try:
            await_result(started, timeout_s=0, what=f"{desk.member.name} to start")
        except ActorLostError as lost:
            self._bury_rollout(desk, lost)
            return
        desk.member.ready = None
        self._on_ready(desk.member)

    def _take_receipt(self, desk: _Desk, receipt: Any) -> None:
        """A worker that cannot take weights is replaced, as it may hold parts of two policies."""
        proof = desk.member.receipts.pop(receipt)
        try:
            held = await_result(receipt, timeout_s=0, what=f"{desk.member.name} to take weights")
        except (ActorLostError, LinkLostError) as lost:
            self._bury_rollout(desk, lost)
            return
        verify_receipt(desk.member.name, proof(), *held)

    def _take_slice(self, desk: _Desk, call: Any) -> None:
        if call not in desk.calls:
            return
        try:
            done: Slice = await_result(call, timeout_s=0, what=f"{desk.member.name} to sample groups")
        except ActorLostError as lost:
            self._bury_rollout(desk, lost)
            return
        proof = desk.calls.pop(call)
        if proof is not None:
            verify_receipt(desk.member.name, proof(), done.policy_version, done.weights_checksum)
        desk.deaths_in_a_row = 0
        self._busy_s += done.busy_s
        for group in done.groups:
            key = (group.stream, group.prompt.id)
            del desk.held[key]
            self._deaths.pop(key, None)
            self._sampled_at[key] = time.perf_counter()
            self._to_score.append((key, group))
        for failure in done.failures:
            key = (failure.stream, failure.prompt_id)
            del desk.held[key]
            self._failed[key] = failure.message

    def _take_scores(self, member: Member, key: Key, group: Group, call: Any) -> None:
        try:
            scores = await_result(call, timeout_s=0, what=f"{member.name} to score a group")
            self._scored[key] = ScoredGroup(group.prompt, group.rollouts, scores)
        except ActorLostError as lost:
            self._deaths_by_role["reward"] += 1
            self._reward_deaths[key] += 1
            member.replace()
            self._say(f"{member.name} died ({lost}); another scores prompt {key[1]} again")
            if self._reward_deaths[key] < DEATHS_OF_A_GROUP:
                self._to_score.appendleft((key, group))
            else:
                message = f"the reward's process died {DEATHS_OF_A_GROUP} times while it scored this group"
                error = Score(0.0, ScoreStatus.ERROR, message=message)
                self._scored[key] = ScoredGroup(group.prompt, group.rollouts, (error,) * len(group.rollouts))
        self._idle.append(member)

    def _bury_rollout(self, desk: _Desk, lost: CispoError) -> None:
        """Replace a worker that died; its groups go back to the head of the queue, or into quarantine."""
        self._deaths_by_role["rollout"] += 1
        desk.deaths_in_a_row += 1
        if desk.deaths_in_a_row >= DEATHS_IN_A_ROW:
            raise ActorLostError(f"{desk.member.name} died {DEATHS_IN_A_ROW} times in a row; the last time: {lost}")
        again = f"{len(desk.held)} groups are sampled again" if desk.held else "another takes its place"
        self._say(f"{desk.member.name} died ({lost}); {again}")
        for key, request in reversed(desk.held.items()):
            self._deaths[key] += 1
            if self._deaths[key] < DEATHS_OF_A_GROUP:
                self._queue.appendleft(request)
                continue
            reason = f"{DEATHS_OF_A_GROUP} rollout workers died while they sampled it, the last time it alone"
            self.quarantined[key[1]] = reason
            self._failed[key] = f"quarantined: {reason}"
            self._say(f"prompt {key[1]} is quarantined: {reason}")
        for call in desk.calls:
            self._slices.pop(call, None)
        desk.held.clear()
        desk.fresh.clear()
        desk.calls.clear()
        self._on_death(desk.member)

    def _waited_for(self) -> str:
        late = [desk.member for desk in self._desks if desk.calls or desk.member.ready is not None]
        late += [member for member, _, _ in self._scoring.values()]
        return "; ".join(f"{member.name} ({member.last_log_line()})" for member in late) or "nobody"


def _key(request: GroupRequest) -> Key:
    return request.stream, request.prompt.id
