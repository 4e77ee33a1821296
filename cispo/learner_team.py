"""The learner in a crew: one actor, or one a rank, which are asked together, and which end together when one dies."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from cispo.errors import ActorLostError, CispoError, LearnerLostError
from cispo.member import Member
from cispo.ray_runtime import await_result

DEATH_NOTICE_S = 15.0
"""Seconds until Ray knows of a death that other ranks have seen already, as a connection that closed."""

WaitForAll = Callable[[Mapping[Any, str]], list[Any]]
"""Values of references, each with what it is waited for; the first error among them ends the wait."""


class LearnerTeam:
    """The learner's members, by rank. start_timeout_s: for all of them to be ready."""

    def __init__(self, members: Sequence[Member], *, start_timeout_s: float) -> None:
        self.members = tuple(members)
        self._start_timeout_s = start_timeout_s

    @property
    def first(self) -> Member:
        """The rank that answers for all."""
        return self.members[0]

    def wait_until_ready(self) -> None:
        """Until every member has its learner. Errors as `await_result`'s."""
        started = {member.actor.__ray_ready__.remote(): f"{member.name} to start" for member in self.members}
        self._await(started)
        if len(self.members) > 1:
            meeting = self.first.actor.open_meeting.remote()
            address = self._await({meeting: f"{self.first.name} to open a meeting"})[0]
            self._await({one.actor.join.remote(address): f"{one.name} to join its ranks" for one in self.members})

    def ask(self, wait_for_all: WaitForAll, method: str, doing: str, *arguments: Any) -> tuple[Any, Any]:
        """What the first rank answers when all are asked, after Ray's reference to it.

        doing: in words, as in `learner to DOING`.
 LearnerLostError where a member is gone; what the others did came to nothing
        then.
        """
        if len(self.members) > 1:
            arguments = tuple(ray.put(argument) for argument in arguments)
        calls = {
            getattr(member.actor, method).remote(*arguments): f"{member.name} to {doing}" for member in self.members
        }
        try:
            return next(iter(calls)), wait_for_all(calls)[0]
        except LearnerLostError:
            raise
        except ActorLostError as lost:
            raise LearnerLostError(*lost.args) from lost
        except (ray.exceptions.RayTaskError, CispoError) as error:
            dead = self._find_dead()
            if dead is None:
                raise
            raise LearnerLostError(f"{dead.name} died while the run waited for the learner to {doing}") from error

    def replace(self) -> None:
        """End every member that lives, and start them all anew; they must be waited for."""
        for member in self.members:
            member.replace()

    def _find_dead(self) -> Member | None:
        """A member that is gone, of several: what another one raised may be how it saw that."""
        if len(self.members) == 1:
            return None
        asked = {member.actor.log_path.remote(): member for member in self.members}
        # Who is busy in a collective does not answer, and who is gone does at once.
        waiting = list(asked)
        while waiting:
            answered, waiting = ray.wait(waiting, timeout=DEATH_NOTICE_S)
            if not answered:
                return None
            try:
                ray.get(answered[0])
            except ray.exceptions.RayActorError:
                return asked[answered[0]]
        return None

    def _await(self, waits: Mapping[Any, str]) -> list[Any]:
        return [await_result(one, timeout_s=self._start_timeout_s, what=what) for one, what in waits.items()]
