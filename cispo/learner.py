"""The learner: a generation batch of scored groups in, a better policy out.

One call of `train` is one step: advantages, drop, split into mini batches of whole groups, and for each mini batch one
update: forward and backward over packed micro batches, clip, AdamW. The loss is fused with the LM head: coefficients
come from the objective in the same pass that makes the logprobs. Nothing here knows of Ray, files or the loop.

Mismatch is measured in every step: the difference between the logprobs stored while sampling and those of the learner's
own forward before its first update, at equal weights.

A learner of several ranks is this class in each of them (`cispo.parallel`): every rank is given the same groups and
trains on its part. What is called collective must be called in all of them.

Shape suffixes: N packed tokens or tokens of a TokenBatch, M loss tokens of a micro batch, D model width.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cispo.advantage import AdvantageSettings, group_advantages
from cispo.batch import TrainSequence, split_mini_batches, token_weights, training_sequences
from cispo.devices import peak_flops
from cispo.errors import CheckpointError, CispoError
from cispo.kernels.head_loss import HeadLoss, head_logprobs, head_policy_loss
from cispo.learner_metrics import StepRecord
from cispo.learner_settings import LearnerSettings, scheduled_learning_rate
from cispo.model.decoder import Decoder
from cispo.model.router_sums import RouterSums
from cispo.model.routing import RoutingControl
from cispo.model.sizes import training_flops
from cispo.objective import build_objective
from cispo.objective_settings import DrGrpoSettings, ObjectiveSettings
from cispo.optimizer import MasterAdamW
from cispo.packing import MicroBatch, deal_micro_batches
from cispo.parallel.parallelise import parallelise, release
from cispo.parallel.ranks import ALONE, Ranks
from cispo.router_balance import RouterBalance
from cispo.types import ScoredGroup


class Learner:
    """Owns the policy's weights, the optimiser and the policy version.

    decoder: the policy, trained in place. temperature: that of sampling; logprobs on both sides are taken at it.
    max_completion_tokens: the constant of Dr. GRPO unless its settings name one. total_updates: length of the learning
    rate's schedule. reference: a frozen policy for the KL penalty, needed exactly when the objective has one.
    ranks: the processes that the learner is spread over. Each loads the same policies, on the CPU where they would not
    fit a device whole, and from then on they are sharded.
    shares_prompts: whether the completions of a group are packed with their prompt once, where the policies take that.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        objective: ObjectiveSettings,
        advantage: AdvantageSettings,
        settings: LearnerSettings,
        temperature: float,
        max_completion_tokens: int,
        total_updates: int,
        seed: int,
        reference: Decoder | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if objective.needs_reference != (reference is not None):
            raise ValueError("a reference policy is needed exactly when kl_coefficient is above 0")
        self.decoder = decoder
        self.policy_version = 0
        # The load-balancing loss counts tokens, and a prompt would count as often as the split has copies of it.
        is_counted = settings.router_aux_loss_coef > 0
        policies = [decoder] if reference is None else [decoder, reference]
        self.shares_prompts = not is_counted and all(policy.takes_branches for policy in policies)
        self._ranks = ranks
        self.device = ranks.device or decoder.head_weight.device
        peak = peak_flops(self.device, decoder.head_weight.dtype)
        self._peak_flops = None if peak is None else peak * ranks.world_size
        shards = parallelise(decoder, ranks, activation_checkpointing=settings.activation_checkpointing)
        if reference is not None:
            parallelise(reference, ranks, activation_checkpointing=False)
        self._reference = reference
        self._objective_settings = objective
        self._objective = build_objective(objective)
        self._advantage = advantage
        self._settings = settings
        self._temperature = temperature
        self._max_completion_tokens = max_completion_tokens
        self._total_updates = total_updates
        self._seed = seed
        self._optimizer = MasterAdamW(
            decoder,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            ranks=ranks,
            shards=shards,
        )

    def train(self, groups: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        """Train on one generation batch and return the step's metrics, those of all ranks in each; collective.

        Raises CispoError, before the weights change, when a loss or gradient is not finite. A step in which every group
        was dropped makes no update; the policy version grows all the same, because the step is over.
        """
        started = time.perf_counter()
        record = StepRecord(self.policy_version, self._peak_flops)
        advantages = group_advantages(groups, self._advantage)
        kept = training_sequences(groups, advantages)
        record.add_groups(groups, advantages, kept_groups=len(kept))
        mini_batches = [
            self._micro_batches(sequences)
            for sequences in split_mini_batches(kept, self._settings.updates_per_step, seed=self._seed, step=step)
        ]
        if self._objective_settings.needs_proximal or self._objective_settings.needs_reference:
            mini_batches = [[self._scored(micro, record) for micro in mini_batch] for mini_batch in mini_batches]
        for index, mini_batch in enumerate(mini_batches):
            self._update(mini_batch, record, groups, step, is_first=index == 0)
        self.policy_version += 1
        record.merge(self._ranks)
        return record.metrics(self.policy_version, time.perf_counter() - started)

    def policy_tensors(self) -> dict[str, Tensor]:
        """The policy's weights by name, in the dtype it computes in; those in use, not copies. Collective.

        Of several ranks, the first gets them whole, on its device; the others get none.
        """
        if self._ranks.is_alone:
            return {name: parameter.detach() for name, parameter in self.decoder.named_parameters()}
        return {name: weight for name, weight in self.each_weight() if self._ranks.rank == 0}

    def weights_checksum(self) -> str:
        """As `cispo.broadcast.weights_checksum` has it of the whole policy, which is not gathered; collective."""
        return self._optimizer.weights_checksum()

    def each_weight(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights one after the other, whole on every rank; collective, to the end.

        For several ranks to send them on: no more than one is whole at a time.
        """
        return self._optimizer.parameters()

    def weight_sizes(self) -> dict[str, int]:
        """Bytes of each weight that `each_weight` hands out, in its order."""
        return self._optimizer.weight_sizes()

    def whole_policy(self) -> Decoder | None:
        """The policy to be saved: the decoder itself, or, of several ranks, a copy on the first's CPU. Collective.

        None on the others.
        """
        if self._ranks.is_alone:
            return self.decoder
        weights = {name: weight.cpu() for name, weight in self.each_weight() if self._ranks.rank == 0}
        if self._ranks.rank:
            return None
        whole = Decoder(self.decoder.config)
        whole.trained_ids = self.decoder.trained_ids
        whole.load_state_dict(weights, assign=True)
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that an exact continuation needs: masters, moments, update count and policy version. Collective.

        Of several ranks, the first gets it, the same as of one, on the CPU; the others get an empty dict.
        """
        state = self._optimizer.state_dict()
        return {"policy_version": torch.tensor(self.policy_version), **state} if state else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken, with the same number of ranks or another.

        The policy's own weights are restored with it. Every rank takes the whole state, and its part of it.
        """
        rest = dict(state)
        version = rest.pop("policy_version", None)
        if version is None:
            raise CheckpointError("the learner state has no policy_version; resume from a checkpoint of `cispo train`")
        self._optimizer.load_state_dict(rest)
        self.policy_version = int(version)

    def _micro_batches(self, sequences: Sequence[TrainSequence]) -> list[MicroBatch]:
        settings = self._objective_settings
        normaliser = settings.normaliser_tokens if isinstance(settings, DrGrpoSettings) else None
        weights = token_weights(
            sequences,
            settings.reduction,
            mixed_sample_weight=getattr(settings, "mixed_sample_weight", None),
            normaliser_tokens=normaliser or self._max_completion_tokens,
        )
        budget = self._settings.tokens_per_micro_batch
        return deal_micro_batches(
            sequences,
            weights,
            budget,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            shares_prompts=self.shares_prompts,
        )

    @torch.no_grad()
    def _scored(self, micro: MicroBatch, record: StepRecord) -> MicroBatch:
        """The micro batch with the logprobs that the objective needs from before the first update."""
        tokens = micro.tokens
        if self._objective_settings.needs_proximal:
            proximal_logprob_N = self._logprobs(self.decoder, micro)
            if not micro.is_filler:
                record.add_mismatch(tokens, proximal_logprob_N)
            tokens = replace(tokens, proximal_logprob_N=proximal_logprob_N)
        if self._reference is not None:
            tokens = replace(tokens, reference_logprob_N=self._logprobs(self._reference, micro))
        return replace(micro, tokens=tokens)

    def _logprobs(self, decoder: Decoder, micro: MicroBatch) -> Tensor:
        there = micro.to(self.device)
        hidden_MD = self._hidden(decoder, there)
        logprob_M, _ = head_logprobs(hidden_MD, decoder.head_weight, there.targets_M, temperature=self._temperature)
        release(decoder)
        return logprob_M.cpu()

    def _hidden(self, decoder: Decoder, micro: MicroBatch, sums: RouterSums | None = None) -> Tensor:
        """Hidden states of the rows that predict a loss token; the reference routes by itself, it is another policy."""
        is_replayed = self._settings.routing_replay and decoder is self.decoder
        replayed_ids_NLK = _recorded_experts(micro) if is_replayed else None
        routing = RoutingControl(replayed_ids_NLK=replayed_ids_NLK, sums=sums) if is_replayed or sums else None
        hidden_MD: Tensor = decoder(
            micro.ids_N,
            micro.positions_N,
            micro.cu_seqlens,
            rows_M=micro.rows_M,
            routing=routing,
            families=micro.families,
        )
        return hidden_MD

    def _update(
        self,
        mini_batch: Sequence[MicroBatch],
        record: StepRecord,
        groups: Sequence[ScoredGroup],
        step: int,
        *,
        is_first: bool,
    ) -> None:
        balance = self._balance(mini_batch) if self._settings.router_aux_loss_coef else None
        # All at once: a copy to the device waits for what the device does.
        there = [micro.to(self.device) for micro in mini_batch]
        heads = [self._forward_backward(micro, balance, record) for micro in there]
        trained = [(micro, head) for micro, head in zip(there, heads, strict=True) if not micro.is_filler]
        results = [self._objective.coefficients(micro.tokens.with_logprob(head.logprob_N)) for micro, head in trained]
        losses = [(result.loss_N, micro.tokens.group_N) for result, (micro, _) in zip(results, trained, strict=True)]
        norm = self._optimizer.clip(self._settings.max_grad_norm)
        self._refuse_non_finite(losses, norm, groups, step)
        learning_rate = scheduled_learning_rate(
            self._settings.learning_rate,
            self._optimizer.updates,
            warmup_updates=self._settings.warmup_updates,
            schedule=self._settings.schedule,
            total_updates=self._total_updates,
        )
        self._optimizer.update(learning_rate)
        record.add_update(float(norm), learning_rate)
        # Last, because reading what the device computed waits for it.
        for result, (micro, head) in zip(results, trained, strict=True):
            flops = training_flops(self.decoder.config, micro.cu_seqlens.diff().tolist(), len(micro.rows_M))
            record.add_micro_batch(result, head.entropy_N, tokens=len(micro.ids_N), flops=flops)
            if is_first and not self._objective_settings.needs_proximal:
                record.add_mismatch(micro.tokens, head.logprob_N)

    def _balance(self, mini_batch: Sequence[MicroBatch]) -> RouterBalance:
        config = self.decoder.config
        if self._settings.routing_replay:
            ids = [_recorded_experts(micro) for micro in mini_batch if not micro.is_filler]
            return RouterBalance.of_replayed(ids, config, self.device, self._ranks)

        def route(micro: MicroBatch, sums: RouterSums) -> None:
            unheard = RouterSums(config, self.device, for_loss=True)
            self._hidden(self.decoder, micro.to(self.device), unheard if micro.is_filler else sums)
            release(self.decoder)

        return RouterBalance.of(mini_batch, config, self.device, route, self._ranks)

    def _forward_backward(self, micro: MicroBatch, balance: RouterBalance | None, record: StepRecord) -> HeadLoss:
        def coefficients(logprob_C: Tensor, rows: slice) -> Tensor:
            tokens = micro.tokens.rows(rows).with_logprob(logprob_C)
            return self._objective.coefficients(tokens).coefficient_N

        sums = None
        if balance is not None or self._settings.routing_replay:
            sums = RouterSums(self.decoder.config, self.device, for_loss=balance is not None)
        head = head_policy_loss(
            self._hidden(self.decoder, micro, sums),
            self.decoder.head_weight,
            micro.targets_M,
            coefficients,
            temperature=self._temperature,
        )
        router_loss = balance.loss(sums) if balance and sums and not micro.is_filler else None
        if sums is not None and not micro.is_filler:
            # Before the backward, which may run the routers again, and they would be counted twice.
            record.routers.add(sums, router_loss)
        coefficient = self._settings.router_aux_loss_coef
        torch.autograd.backward(head.loss if router_loss is None else (head.loss, coefficient * router_loss))
        self._optimizer.collect()
        # Without its graph, which holds on to a micro batch.
        return replace(head, loss=head.loss.detach())

    def _refuse_non_finite(
        self, losses: Sequence[tuple[Tensor, Tensor]], norm: Tensor, groups: Sequence[ScoredGroup], step: int
    ) -> None:
        is_fine = all(bool(loss_N.isfinite().all()) for loss_N, _ in losses)
        if bool(norm.isfinite()) and all(self._ranks.gather_objects(is_fine)):
            return
        self._optimizer.forget()
        own_bad = {int(group) for loss_N, group_N in losses for group in group_N[~loss_N.isfinite()].tolist()}
        own = {int(group) for _, group_N in losses for group in group_N.tolist()}
        of_ranks = self._ranks.gather_objects((own_bad, own))
        bad = set().union(*(of_rank for of_rank, _ in of_ranks))
        what = "the loss" if bad else "the gradient"
        suspects = sorted(bad or set().union(*(of_rank for _, of_rank in of_ranks)))
        names = ", ".join(repr(groups[group].prompt.id) for group in suspects[:4])
        more = f" and {len(suspects) - 4} more" if len(suspects) > 4 else ""
        raise CispoError(
            f"step {step}: {what} is not finite in the groups of prompts {names}{more}; "
            "the weights are unchanged: look at these rollouts, then lower learner.learning_rate or the ratio's bounds"
        )


def _recorded_experts(micro: MicroBatch) -> Tensor:
    if micro.expert_ids_NLK is None:
        raise ValueError("routing_replay needs rollouts with expert ids; sample with records_experts=True")
    return micro.expert_ids_NLK
