"""The actors of a run as one crew: start them, send them weights, have groups sampled and scored.

Groups stream: as soon as one has ended in a rollout worker it goes to a reward worker, while others are still sampled.
Which worker does what changes no result, so work is dealt out for speed alone.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from cispo.actors import LearnerActor, RewardWorker, RolloutWorker, SampleRequest
from cispo.broadcast import Weights, verify_receipt
from cispo.errors import DeadlineError
from cispo.ray_runtime import await_result
from cispo.recipe.schema import TrainRecipe
from cispo.types import Prompt, ScoredGroup

CLOSE_TIMEOUT_S = 10.0
Progress = Callable[[int, int], None]
"""(groups done, groups in all), called as they end."""


class Crew:
    """Rollout workers, reward workers and, for training, the learner; all are ready when the constructor returns."""

    def __init__(self, recipe: TrainRecipe, policy_path: Path, *, cores: int, with_learner: bool) -> None:
        self._recipe = recipe
        rollout_threads = max(1, cores // recipe.rollout.workers)
        self._rollout = [
            self._start(RolloutWorker, f"rollout:{i}", recipe, policy_path, rollout_threads)
            for i in range(recipe.rollout.workers)
        ]
        self._rewards = [self._start(RewardWorker, f"reward:{i}", recipe) for i in range(recipe.sandbox.workers)]
        self._learner = self._start(LearnerActor, "learner", recipe, policy_path, cores) if with_learner else None
        self._wait_until_ready()

    def _start(self, role: type, name: str, *arguments: Any) -> Any:
        # Threads spin from one kernel to the next, some microseconds, and sleep beyond: an actor that waits burns no
        # core of another's. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) made a step a quarter slower.
        threads = {"GOMP_SPINCOUNT": "20000", "TOKENIZERS_PARALLELISM": "false"}
        gpus = self._gpus_of(name)
        actor: Any = ray.remote(role)
        named = actor.options(
            name=f"{self._recipe.name}:{name}", num_cpus=0, num_gpus=gpus, runtime_env={"env_vars": threads}
        )
        return named.remote(*arguments)

    def _gpus_of(self, name: str) -> float:
        """On one GPU learner and rollout workers share it; rewards never see one."""
        if name.startswith("reward") or self._recipe.policy.device == "cpu" or not _gpus():
            return 0.0
        return gpu_share(1 + self._recipe.rollout.workers)

    def _wait_until_ready(self) -> None:
        timeout_s = self._recipe.ray.start_timeout_s
        named = {f"rollout:{i}": actor for i, actor in enumerate(self._rollout)}
        named |= {f"reward:{i}": actor for i, actor in enumerate(self._rewards)}
        if self._learner is not None:
            named["learner"] = self._learner
        for name, actor in named.items():
            await_result(actor.__ray_ready__.remote(), timeout_s=timeout_s, what=f"{name} to start")

    def row_dependent_shapes(self) -> list[str]:
        """Product shapes for which rollout and learner may disagree on this machine; see cispo.model.arithmetic."""
        shapes: list[str] = self._call(
            self._rollout[0].row_dependent_shapes.remote(), "rollout:0 to probe its products"
        )
        return shapes

    def sample_and_score(
        self, prompts: Sequence[Prompt], *, group_size: int, temperature: float, stream: str, progress: Progress
    ) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Sample a group of each prompt, score it, and return the groups in the order of the prompts.

        Prompt ids must differ from each other. The second value holds seconds spent until the last group was sampled
        (time_s/rollout) and from then until the last score (time_s/reward). DeadlineError after rollout.timeout_s.
        """
        started = time.perf_counter()
        deadline = started + self._recipe.rollout.timeout_s
        streams = {
            self._rollout[i]
            .sample.options(num_returns="streaming")
            .remote(
                SampleRequest(tuple(prompts[i :: len(self._rollout)]), group_size, temperature, stream)
            ): f"rollout:{i}"
            for i in range(min(len(self._rollout), len(prompts)))
        }
        idle, waiting = deque(range(len(self._rewards))), deque[Any]()
        scoring: dict[Any, int] = {}
        scored: dict[str, ScoredGroup] = {}
        sampled_at = started
        while len(scored) < len(prompts):
            while waiting and idle:
                worker = idle.popleft()
                scoring[self._rewards[worker].score.remote(waiting.popleft())] = worker
            ready, _ = ray.wait([*streams, *scoring], timeout=max(0.0, deadline - time.perf_counter()))
            if not ready:
                late = [*streams.values(), *(f"reward:{worker}" for worker in scoring.values())]
                raise DeadlineError(
                    f"{len(scored)} of {len(prompts)} groups after {self._recipe.rollout.timeout_s:g} s, waiting for "
                    f"{', '.join(late)}; look at their logs, or raise rollout.timeout_s if they were only slow"
                )
            event: Any = ready[0]
            if event in scoring:
                worker = scoring.pop(event)
                group = self._call(event, f"reward:{worker} to score a group")
                scored[group.prompt.id] = group
                idle.append(worker)
                progress(len(scored), len(prompts))
                continue
            try:
                sampled = next(event)
            except StopIteration:
                del streams[event]
                continue
            # A stream that broke hands out its error as a group; found here, it is not laid at a reward worker's door.
            self._call(sampled, f"{streams[event]} to sample a group")
            waiting.append(sampled)
            sampled_at = time.perf_counter()
        times = {"time_s/rollout": sampled_at - started, "time_s/reward": time.perf_counter() - sampled_at}
        return [scored[prompt.id] for prompt in prompts], times

    def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        assert self._learner is not None
        metrics: dict[str, float] = self._call(
            self._learner.train.remote(list(groups), step), f"learner in step {step}"
        )
        return metrics

    def broadcast(self) -> dict[str, float]:
        """Give every rollout worker the learner's weights; BroadcastError unless each proves that it holds them."""
        assert self._learner is not None
        started = time.perf_counter()
        reference = self._learner.weights.remote()
        weights: Weights = self._call(reference, "learner to hand out its weights")
        receipts = [worker.update_weights.remote(reference) for worker in self._rollout]
        for index, receipt in enumerate(receipts):
            name = f"rollout:{index}"
            version, checksum = self._call(receipt, f"{name} to take weights of version {weights.version}")
            verify_receipt(name, weights, version, checksum)
        return {
            "broadcast/bytes": float(weights.bytes),
            "broadcast/checksum_ok": 1.0,
            "time_s/broadcast": time.perf_counter() - started,
        }

    def reward_statistics(self) -> list[dict[str, float]]:
        """Counters of each reward worker since the last call."""
        calls = [(f"reward:{i}", worker.statistics.remote()) for i, worker in enumerate(self._rewards)]
        return [self._call(call, f"{name} for its counters") for name, call in calls]

    def save(self, path: Path, loop_state: dict[str, Any]) -> None:
        assert self._learner is not None
        keep = self._recipe.checkpoint.keep
        self._call(self._learner.save.remote(path, loop_state, keep), f"learner to write {path.name}")

    def load(self, path: Path) -> dict[str, Any]:
        assert self._learner is not None
        state: dict[str, Any] = self._call(self._learner.load.remote(path), f"learner to read {path.name}")
        return state

    def close(self) -> None:
        """Close the sandboxes and end the actors; raises nothing.

        A reward worker that is dead or busy is not waited for long: its sandbox's wardens end with it in any case.
        """
        closing = [worker.close.remote() for worker in self._rewards]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for actor in (*self._rollout, *self._rewards, *([self._learner] if self._learner is not None else [])):
            ray.kill(actor)

    def _call(self, reference: Any, what: str) -> Any:
        return await_result(reference, timeout_s=self._recipe.ray.call_timeout_s, what=what)


def gpu_share(actors: int) -> float:
    """An equal share of one GPU, rounded down to the 1/10000 that Ray counts in: rounded up, the last would not fit."""
    return math.floor(10_000 / actors) / 10_000


def _gpus() -> float:
    resources: dict[str, float] = ray.cluster_resources()
    return resources.get("GPU", 0.0)
