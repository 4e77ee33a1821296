"""The Ray actors of a run, named after their roles: `rollout:i`, `reward:i`, `learner`.

Each is a thin shell around a plain class that knows nothing of Ray (Engine, RewardSet, Learner). What a shell adds: the
process's threads and arithmetic, and messages that Ray can carry.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cispo.recipe.schema import TrainRecipe
from cispo.rollout.request import GroupRequest
from cispo.types import Group, Score, ScoredGroup


def prepare_process(threads: int) -> None:
    """Settings of every process that computes: thread count, row-independent products, repeatable kernels."""
    from cispo.model.arithmetic import prepare_products

    prepare_products()
    # cuBLAS promises to repeat beside other streams only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory finds reads of what nobody wrote; it costs a tenth of a step and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch sets it at run time


class Shell:
    """What every actor of a run can be asked."""

    def log_path(self) -> str:
        """Where this process writes its errors: a file on its own machine."""
        return os.readlink("/proc/self/fd/2")


class RolloutWorker(Shell):
    """Samples groups with its own copy of the policy, whose weights the learner's broadcasts replace.

    links: whether these come through links.
    """

    def __init__(self, recipe: TrainRecipe, policy_path: Path, threads: int, name: str, links: bool = False) -> None:
        prepare_process(threads)
        self._receiver: Any = None
        decoder, self._block = load_decoder_and_block(recipe, policy_path, links=links)
        self._open_engine(recipe, policy_path, decoder, name)

    def _open_engine(self, recipe: TrainRecipe, policy_path: Path, decoder: Any, name: str) -> None:
        from cispo.model.tokenizer import Tokenizer
        from cispo.rollout.engine import Engine, SamplingSettings
        from cispo.rollout.gauges import EngineGauges

        rollout = recipe.rollout
        self._checksum = ""
        self._caches_after_update = rollout.caches_after_update
        self._learner_ranks = recipe.resources.learner_ranks
        self._engine = Engine(
            decoder,
            Tokenizer.load(policy_path),
            SamplingSettings(rollout.max_completion_tokens, recipe.seed),
            max_concurrent_completions=rollout.max_concurrent_completions,
            max_prompt_tokens=rollout.max_prompt_tokens,
            records_experts=recipe.learner.routing_replay,
        )
        self._gauges = EngineGauges(self._engine, run=recipe.name, worker=name)

    def run_slice(self, requests: Sequence[GroupRequest], slice_s: float) -> Any:
        """Queue the requests and sample for a moment; a `cispo.rollout.slice.Slice`."""
        from cispo.rollout.slice import run_slice

        done = run_slice(self._engine, requests, slice_s, self._checksum)
        self._gauges.update(done.busy_s)
        return done

    def forget(self) -> None:
        """Drop all groups under way."""
        self._engine.park()
        self._engine.collect()
        self._engine.collect_failures()

    def update_weights(self, weights: Any) -> tuple[int, str]:
        """Take the weights and answer with the version and checksum of what this worker holds afterwards."""
        from cispo.broadcast import weights_checksum

        self._engine.update_weights(weights.version, weights.tensors(), caches=self._caches_after_update)
        self._checksum = weights_checksum(dict(self._engine.decoder.named_parameters()))
        return self._engine.policy_version, self._checksum

    def receive_weights(self, address: str, timeout_s: float, link: str) -> tuple[int, str]:
        """Wait for weights through a link of the meeting at this address; the answer as `update_weights`'s."""
        from cispo.weight_links import WeightReceiver

        if self._receiver is None:
            in_block = self._learner_ranks == 1
            self._receiver = WeightReceiver(address, self._block, in_block=in_block, timeout_s=timeout_s)
        # Where it fails half-way, nothing that is sampled afterwards passes for the policy's.
        self._checksum = "incomplete"
        held = self._receiver.receive(link, self._engine, self._caches_after_update)
        self._checksum = held.checksum
        return held.version, held.checksum

    def row_dependent_shapes(self) -> list[str]:
        """Shapes of this policy's products whose bits depend on the rows beside a row, on this machine."""
        from cispo.model.arithmetic import row_dependent_shapes

        return row_dependent_shapes([p for p in self._engine.decoder.parameters() if p.dim() == 2])


class RewardWorker(Shell):
    """Scores groups, one program at a time in a sandbox of its own."""

    def __init__(self, recipe: TrainRecipe) -> None:
        from cispo.rewards.reward_set import RewardSet

        self._rewards = RewardSet(
            recipe.rewards,
            recipe.sandbox.model_copy(update={"workers": 1}),
            base_path=recipe.base_path,
            max_completion_tokens=recipe.rollout.max_completion_tokens,
        )

    def score(self, group: Group) -> tuple[Score, ...]:
        """The score of each rollout, in their order."""
        return self._rewards.score(group)

    def statistics(self) -> dict[str, float]:
        """Counts since the last call."""
        return self._rewards.statistics()

    def close(self) -> None:
        self._rewards.close()


class LearnerActor(Shell):
    """Holds the learner, hands out its weights, and writes and reads checkpoints where the learner's state is.

    With resources.learner_ranks above 1 it is one rank of several, has a learner from `join` on, and every method that
    the others are asked for it must be asked for too. links: whether weights are sent through links.
    """

    def __init__(
        self, recipe: TrainRecipe, policy_path: Path, threads: int, rank: int = 0, links: bool = False
    ) -> None:
        prepare_process(threads)
        self._recipe, self._policy_path, self._rank = recipe, policy_path, rank
        self._sender: Any = None
        self._block: Any = None
        if recipe.resources.learner_ranks == 1:
            decoder, self._block = load_decoder_and_block(recipe, policy_path, links=links)
            self._open_learner(recipe, policy_path, decoder)

    def open_meeting(self) -> str:
        """Where the ranks can meet: the address of a store that this process holds."""
        import ray

        from cispo.parallel.meeting import Meeting

        self._meeting = Meeting.open(ray.util.get_node_ip_address())
        return self._meeting.address

    def join(self, address: str) -> None:
        """Become one of the learner's ranks; returns when all have."""
        from cispo.devices import own_device, resolve_device
        from cispo.parallel.meeting import Meeting
        from cispo.parallel.ranks import Ranks, RankSettings

        recipe, timeout_s = self._recipe, self._recipe.ray.start_timeout_s
        if self._rank:
            self._meeting = Meeting.enter(address, timeout_s)
        settings = RankSettings(
            rank=self._rank,
            world_size=recipe.resources.learner_ranks,
            expert_parallel=recipe.resources.expert_parallel,
            timeout_s=recipe.ray.call_timeout_s,
        )
        device = own_device(resolve_device(recipe.policy.device))
        ranks = Ranks.join(settings, device, self._meeting.room("learner"))
        # On the CPU: a rank's device holds its shards, and may have no room for all weights.
        self._open_learner(recipe, self._policy_path, load_decoder(recipe, self._policy_path, device="cpu"), ranks)

    def _open_learner(self, recipe: TrainRecipe, policy_path: Path, decoder: Any, ranks: Any = None) -> None:
        from cispo.model.tokenizer import Tokenizer

        self._tokenizer = Tokenizer.load(policy_path)
        self._learner = new_learner(recipe, policy_path, decoder, ranks)

    def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        """A step on the groups, of which each rank takes its share; the metrics of all."""
        metrics: dict[str, float] = self._learner.train(groups, step)
        return metrics

    def weights(self) -> Any:
        """The policy's weights, ready to broadcast: a `cispo.broadcast.Weights`, and None of ranks but the first."""
        from cispo.broadcast import Proof, pack_weights

        learner, rank = self._learner, self._rank
        proof = Proof(learner.policy_version, learner.weights_checksum())
        weights = pack_weights(proof, (named for named in learner.each_weight() if rank == 0))
        return weights if rank == 0 else None

    def send_weights(self, address: str, timeout_s: float, links: Sequence[str]) -> Any:
        """Send the policy's weights through these links of the meeting at this address.

        Returns what was sent, a `cispo.weight_links.SentWeights`, and None of ranks but the first.
        """
        from collections import deque

        from cispo.broadcast import Proof
        from cispo.devices import own_device
        from cispo.weight_links import WeightSender

        learner = self._learner
        proof = Proof(learner.policy_version, learner.weights_checksum())
        if self._rank:
            deque(learner.each_weight(), maxlen=0)
            return None
        if self._sender is None:
            self._sender = WeightSender(address, own_device(learner.device), timeout_s)
        weights = learner.each_weight() if self._block is None else self._block
        return self._sender.send(links, proof, weights, learner.weight_sizes())

    def save(self, path: Path, loop_state: dict[str, Any], keep: int) -> None:
        """Write a checkpoint of policy, learner and loop, then remove all but the `keep` newest."""
        from cispo.checkpoint import save_checkpoint

        learner_state, policy = self._learner.state_dict(), self._learner.whole_policy()
        if policy is not None:
            save_checkpoint(
                path,
                decoder=policy,
                tokenizer=self._tokenizer,
                learner_state=learner_state,
                loop_state=loop_state,
                keep=keep,
            )

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a verified checkpoint; returns its loop state."""
        from cispo.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(path)
        self._learner.load_state_dict(checkpoint.learner_state)
        return dict(checkpoint.loop_state)


class ColocatedActor(RolloutWorker, LearnerActor):
    """Engine and learner over one copy of the weights, for a single GPU, where two processes would only take turns."""

    def __init__(self, recipe: TrainRecipe, policy_path: Path, threads: int, name: str) -> None:
        prepare_process(threads)
        self._rank, self._sender, self._receiver, self._block = 0, None, None, None
        decoder = load_decoder(recipe, policy_path)
        self._open_engine(recipe, policy_path, decoder, name)
        self._open_learner(recipe, policy_path, decoder)

    def share_weights(self) -> int:
        """Sample with the learner's weights from now on; the policy version that they have."""
        self._engine.update_weights(
            self._learner.policy_version, self._learner.policy_tensors(), caches=self._caches_after_update
        )
        return self._engine.policy_version


def new_learner(recipe: TrainRecipe, policy_path: Path, decoder: Any, ranks: Any = None) -> Any:
    """The learner of a recipe at its start, with this policy; a `cispo.learner.Learner`.

    ranks: a `cispo.parallel.ranks.Ranks`, of a learner of several.
    """
    from cispo.learner import Learner
    from cispo.parallel.ranks import ALONE

    reference = None
    if recipe.objective.needs_reference:
        reference = load_decoder(recipe, policy_path, device=None if ranks is None else "cpu").requires_grad_(False)
    return Learner(
        decoder,
        objective=recipe.objective,
        advantage=recipe.advantage,
        settings=recipe.learner,
        temperature=recipe.rollout.temperature,
        max_completion_tokens=recipe.rollout.max_completion_tokens,
        total_updates=recipe.steps * recipe.learner.updates_per_step,
        seed=recipe.seed,
        reference=reference,
        ranks=ALONE if ranks is None else ranks,
    )


def load_decoder_and_block(recipe: TrainRecipe, policy_path: Path, *, links: bool) -> tuple[Any, Any]:
    """The recipe's policy, and its `cispo.weight_stream.WeightBlock` where its weights travel through links."""
    if not links:
        return load_decoder(recipe, policy_path), None
    from cispo.devices import own_device, resolve_device
    from cispo.weight_stream import WeightBlock

    # By way of the CPU, so that the device never holds them twice.
    decoder = load_decoder(recipe, policy_path, device="cpu")
    return decoder, WeightBlock(decoder, own_device(resolve_device(recipe.policy.device)))


def load_decoder(recipe: TrainRecipe, policy_path: Path, device: str | None = None) -> Any:
    """The recipe's policy on its device, or on another; a `cispo.model.decoder.Decoder`."""
    from cispo.devices import resolve_device, resolve_dtype
    from cispo.model.checkpoint import load_policy

    policy = recipe.policy
    return load_policy(policy_path, dtype=resolve_dtype(policy.dtype), device=resolve_device(device or policy.device))
