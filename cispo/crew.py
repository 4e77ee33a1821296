"""The actors of a run as one crew: started, replaced when they die, asked for work, sent the learner's weights.

Every wait goes through the sampler, so groups go on being sampled and scored whatever the loop waits for. Who does what
changes no result, so work is dealt out for speed alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from cispo.actors import ColocatedActor, LearnerActor, RewardWorker, RolloutWorker
from cispo.errors import ActorLostError, LearnerLostError
from cispo.gpu_places import GpuPlaces
from cispo.learner_team import LearnerTeam
from cispo.member import Member
from cispo.placement import place
from cispo.ray_runtime import await_result
from cispo.recipe.schema import TrainRecipe
from cispo.rollout.request import GroupRequest
from cispo.sampler import Collected, Progress, Sampler
from cispo.transport import LinkTransport, ObjectStoreTransport, Transport
from cispo.types import ScoredGroup

CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Roles:
    """The classes of a run's actors."""

    rollout: type = RolloutWorker
    reward: type = RewardWorker
    learner: type = LearnerActor
    colocated: type = ColocatedActor


@dataclass(frozen=True, slots=True)
class CrewCounts:
    """Since the last look: seconds that samplers (all together) and learner worked, and deaths by role."""

    rollout_busy_s: float
    learner_busy_s: float
    deaths: dict[str, int]

    def metrics(self, seconds: float, rollout_workers: int) -> dict[str, float]:
        """Shares of so many seconds in which they had nothing to do, and the deaths, where there were any."""
        idle = {
            "perf/rollout_idle_share": 1.0 - self.rollout_busy_s / (rollout_workers * seconds),
            "perf/learner_idle_share": 1.0 - self.learner_busy_s / seconds,
        }
        return {name: max(0.0, share) for name, share in idle.items()} | {
            f"faults/{role}": float(count) for role, count in self.deaths.items()
        }


class Crew:
    """Rollout workers, reward workers and, for training, the learner; all are ready when the constructor returns.

    say: tells a person what happened to an actor.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        policy_path: Path,
        *,
        cores: int,
        with_learner: bool,
        say: Callable[[str], None] = print,
        roles: Roles = Roles(),
    ) -> None:
        self._recipe, self._policy_path, self._roles, self._say = recipe, policy_path, roles, say
        self.placement = place(recipe, cores=cores, gpus=_gpu_count())
        self._is_colocated = with_learner and self.placement.colocated
        self._gpus = GpuPlaces(self.placement.gpus, timeout_s=recipe.ray.start_timeout_s)
        self._rollout = [Member(f"rollout:{i}", partial(self._start_rollout, i)) for i in range(recipe.rollout.workers)]
        self._rewards = [Member(f"reward:{i}", self._start_reward) for i in range(recipe.sandbox.workers)]
        self._learner_busy_s = 0.0
        rollout = recipe.rollout
        self._sampler = Sampler(
            self._rollout,
            self._rewards,
            # Twice what it can decode at once, so that a slot that falls free finds a group that waits.
            groups_per_worker=max(1, 2 * rollout.max_concurrent_completions // rollout.group_size),
            on_death=self._replace_rollout,
            on_ready=self._supply_rollout,
            say=say,
        )
        self._learner: LearnerTeam | None = None
        self._transport: Transport | None = None
        if with_learner:
            self._learner = self._new_team()
            self._transport = None if self._is_colocated else self._new_transport(self._learner)
        self._wait_until_ready()

    def _new_team(self) -> LearnerTeam:
        members = [self._rollout[0]] if self._is_colocated else self._new_learners()
        wait_for_all = partial(self._sampler.wait_for_all, timeout_s=self._recipe.ray.call_timeout_s)
        return LearnerTeam(members, wait_for_all, start_timeout_s=self._recipe.ray.start_timeout_s)

    def _new_transport(self, learner: LearnerTeam) -> Transport:
        if self.placement.links:
            return LinkTransport(learner, timeout_s=self._recipe.ray.call_timeout_s)
        return ObjectStoreTransport(learner)

    def _start_rollout(self, index: int, name: str) -> Any:
        plan = self.placement
        place = plan.rollout_places[index] if plan.rollout_places else 0
        if self._is_colocated:
            arguments: tuple[Any, ...] = (self._recipe, self._policy_path, plan.learner_threads, name)
            return self._start(self._roles.colocated, name, self._gpus.share(plan.learner_gpus, place), *arguments)
        arguments = (self._recipe, self._policy_path, plan.rollout_threads, name, plan.links)
        return self._start(self._roles.rollout, name, self._gpus.share(plan.rollout_gpus, place), *arguments)

    def _start_reward(self, name: str) -> Any:
        return self._start(self._roles.reward, name, {"num_gpus": 0}, self._recipe)

    def _new_learners(self) -> list[Member]:
        ranks = self.placement.learner_ranks
        names = ["learner"] if ranks == 1 else [f"learner:{rank}" for rank in range(ranks)]
        return [Member(name, partial(self._start_learner, rank)) for rank, name in enumerate(names)]

    def _start_learner(self, rank: int, name: str) -> Any:
        plan = self.placement
        arguments = (self._recipe, self._policy_path, plan.learner_threads, rank, plan.links)
        return self._start(self._roles.learner, name, self._gpus.share(plan.learner_gpus, rank), *arguments)

    def _start(self, role: type, name: str, gpus: dict[str, Any], *arguments: Any) -> Any:
        # Threads spin from one kernel to the next, some microseconds, and sleep beyond: an actor that waits burns no
        # core of another's. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) made a step a quarter slower.
        threads = {"GOMP_SPINCOUNT": "20000", "TOKENIZERS_PARALLELISM": "false"}
        actor: Any = ray.remote(role)
        named = actor.options(
            name=f"{self._recipe.name}:{name}", num_cpus=0, runtime_env={"env_vars": threads}, **gpus
        )
        return named.remote(*arguments)

    @property
    def _members(self) -> list[Member]:
        own_learner = self._learner.members if self._learner is not None and not self._is_colocated else ()
        return [*self._rollout, *self._rewards, *own_learner]

    def _wait_until_ready(self) -> None:
        timeout_s = self._recipe.ray.start_timeout_s
        for member in (*self._rollout, *self._rewards):
            await_result(member.ready, timeout_s=timeout_s, what=f"{member.name} to start")
            member.ready = None
        if self._learner is not None:
            self._learner.wait_until_ready()

    def row_dependent_shapes(self) -> list[str]:
        """Product shapes for which rollout and learner may disagree on this machine; see cispo.model.arithmetic."""
        member = self._rollout[0]
        shapes: list[str] = self._wait_for(
            member.actor.row_dependent_shapes.remote(), f"{member.name} to probe its products"
        )
        return shapes

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Queue groups to be sampled and scored; each must be collected once."""
        self._sampler.submit(requests)

    def collect(self, requests: Sequence[GroupRequest], progress: Progress) -> Collected:
        """Wait for groups that were submitted. DeadlineError after rollout.timeout_s."""
        return self._sampler.collect(requests, progress, self._recipe.rollout.timeout_s)

    def sample_and_score(self, requests: Sequence[GroupRequest], progress: Progress) -> Collected:
        """A group of each request, in their order."""
        self.submit(requests)
        return self.collect(requests, progress)

    def quarantine(self, prompts: dict[str, str]) -> None:
        """Sample these prompts no more; ids with the reasons."""
        self._sampler.quarantined.update(prompts)

    @property
    def quarantined(self) -> dict[str, str]:
        """Prompts that are not sampled, with the reasons."""
        return dict(self._sampler.quarantined)

    def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        """One step of the learner; LearnerLostError where its process dies."""
        metrics: dict[str, float] = self._ask_learner("train", f"train in step {step}", list(groups), step)
        self._learner_busy_s += metrics.get("time_s/forward_backward", 0.0)
        return metrics

    def broadcast(self) -> dict[str, float]:
        """Send every rollout worker the learner's weights; BroadcastError unless each proves that it holds them.

        Workers that have groups under way take them after their slice of work, and nobody waits for their proof: what
        they answer is used only with it. One that is just starting gets them when it has.
        """
        started = time.perf_counter()
        if self._transport is None:
            self._ask_learner("share_weights", "share its weights")
            return {"time_s/broadcast": time.perf_counter() - started}
        metrics = self._transport.broadcast([member for member in self._rollout if member.ready is None])
        if not self._sampler.has_work:
            self._sampler.take_receipts(self._recipe.ray.call_timeout_s)
        return {**metrics, "broadcast/checksum_ok": 1.0, "time_s/broadcast": time.perf_counter() - started}

    @property
    def weights_checksum(self) -> str | None:
        """Of the weights last sent; None where engine and learner share one copy."""
        proof = self._transport.proof if self._transport is not None else None
        return None if proof is None else proof.checksum

    def counts(self) -> CrewCounts:
        """What has added up since the last call."""
        busy_s, deaths = self._sampler.counts()
        found = CrewCounts(busy_s, self._learner_busy_s, deaths)
        self._learner_busy_s = 0.0
        return found

    def reward_statistics(self) -> list[dict[str, float]]:
        """Counters of each reward worker since the last call; those of a worker that died are lost."""
        calls = [(member, member.actor.statistics.remote()) for member in self._rewards]
        found = []
        for member, call in calls:
            try:
                found.append(self._wait_for(call, f"{member.name} for its counters"))
            except ActorLostError:
                # It is replaced when it is next given a group; here it only has nothing to tell.
                continue
        return found

    def save(self, path: Path, loop_state: dict[str, Any]) -> None:
        """Write a checkpoint; LearnerLostError where the learner's process dies."""
        self._ask_learner("save", f"write {path.name}", path, loop_state, self._recipe.checkpoint.keep)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns its loop state."""
        state: dict[str, Any] = self._ask_learner("load", f"read {path.name}", path)
        return state

    def restart_learner(self) -> None:
        """Drop all that is under way and start a learner anew, as the policy that the run began with."""
        assert self._learner is not None
        if self._transport is not None:
            self._transport.lose_learner()
        self._learner.replace()
        self._sampler.forget_all()
        self._learner.wait_until_ready()

    def close(self) -> None:
        """Close the sandboxes and end the actors; raises nothing.

        A reward worker that is dead or busy is not waited for long: its sandbox's wardens end with it in any case.
        """
        closing = [member.actor.close.remote() for member in self._rewards]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for member in self._members:
            ray.kill(member.actor)
        self._gpus.free()

    def _replace_rollout(self, member: Member) -> None:
        """Start another in its place."""
        if self._is_colocated:
            raise LearnerLostError(f"{member.name}, which is also the learner, died")
        if self._transport is not None:
            self._transport.lose(member)
        member.replace()

    def _supply_rollout(self, member: Member) -> None:
        """Send one that has started the weights that all others hold."""
        if self._transport is not None:
            self._transport.supply(member)

    def _ask_learner(self, method: str, doing: str, *arguments: Any) -> Any:
        assert self._learner is not None
        return self._learner.ask(method, doing, *arguments)

    def _wait_for(self, reference: Any, what: str) -> Any:
        return self._sampler.wait_for(reference, timeout_s=self._recipe.ray.call_timeout_s, what=what)


def _gpu_count() -> float:
    resources: dict[str, float] = ray.cluster_resources()
    return resources.get("GPU", 0.0)
