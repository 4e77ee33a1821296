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

    def __init__(self, members: Sequence[Member], wait_for_all: WaitForAll, *, start_timeout_s: float) -> None:
        self.members = tuple(members)
        self._wait_for_all = wait_for_all
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

    def ask(self, method: str, doing: str, *arguments: Any) -> Any:
        """What the first rank answers when all are asked. doing: in words, as in `learner to DOING`.

        LearnerLostError where a member is gone; what the others did came to nothing then.
        """
        return self.hear(self.tell(method, doing, *arguments))

    def tell(self, method: str, doing: str, *arguments: Any) -> dict[Any, str]:
        """Ask all ranks; Ray's references to their answers, the first rank's first, with what is waited for."""
        if len(self.members) > 1:
            arguments = tuple(ray.put(argument) for argument in arguments)
        return {getattr(one.actor, method).remote(*arguments): f"{one.name} to {doing}" for one in self.members}

    def hear(self, calls: Mapping[Any, str]) -> Any:
        """Wait for what all were told to do; what the first rank answers. Errors as `ask`'s."""
        try:
            return self._wait_for_all(calls)[0]
        except LearnerLostError:
            raise
        except ActorLostError as lost:
            raise LearnerLostError(*lost.args) from lost
        except (ray.exceptions.RayTaskError, CispoError) as error:
            dead = self._find_dead()
            if dead is None:
                raise
            waited = next(iter(calls.values()))
            raise LearnerLostError(f"{dead.name} died while the run waited for {waited}") from error

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
