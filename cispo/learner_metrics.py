"""What the learner measures in a step: sums over tokens, reduced once at the end to the names of metric_table.py.

Shape suffix: N tokens of a TokenBatch.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cispo.advantage import AdvantageBatch, Float64Array
from cispo.batch import TokenBatch
from cispo.objective import Coefficients
from cispo.parallel.ranks import Ranks
from cispo.router_balance import RouterTotals
from cispo.types import Int32Array, ScoredGroup

_MEANS = {
    "ratio": "policy/ratio/mean",
    "clipped_high": "loss/frac_clipped_high",
    "clipped_low": "loss/frac_clipped_low",
    "correction": "policy/rollout_correction/mean",
    "correction_bounded": "loss/frac_correction_bounded",
    "kl_reference": "policy/kl_reference",
    "entropy": "policy/entropy",
}


class StepRecord:
    """The measurements of one step; `policy_version` is the learner's before it. routers: what its routers did.

    peak_flops: operations a second that all devices of the learner can do at best; None where that is not known.
    """

    def __init__(self, policy_version: int, peak_flops: float | None = None) -> None:
        self._policy_version = policy_version
        self._peak_flops = peak_flops
        self._sums: dict[str, float] = defaultdict(float)
        self._ratio_max = 0.0
        self._mismatch: list[Float64Array] = []
        self._ages: list[Int32Array] = []
        self._norms: list[float] = []
        self._learning_rate = 0.0
        self._dropped = 0
        self.routers = RouterTotals()

    def add_groups(self, groups: Sequence[ScoredGroup], advantages: AdvantageBatch, *, kept_groups: int) -> None:
        """Count what is left out, and how old the sampled tokens of the scored samples are."""
        self._dropped = len(groups) - kept_groups
        for group, advantage in zip(groups, advantages.groups, strict=True):
            for rollout, is_scored in zip(group.rollouts, advantage.is_scored_G, strict=True):
                sampled = rollout.loss_mask_T
                if not is_scored:
                    self._sums["unscored_tokens"] += int(sampled.sum())
                elif advantage.group in advantages.kept:
                    self._ages.append(self._policy_version - rollout.policy_versions_T[sampled])

    def add_micro_batch(self, result: Coefficients, entropy_N: Tensor, *, tokens: int, flops: float) -> None:
        """Add one micro batch of `tokens` packed tokens, whose forward and backward are so many operations."""
        sums = {**result.sums, "entropy": entropy_N.sum(dtype=torch.float64)}
        *values, ratio_max = torch.stack([*sums.values(), result.maxima["ratio"].double()]).tolist()
        for name, value in zip(sums, values, strict=True):
            self._sums[name] += value
        self._sums["packed_tokens"] += tokens
        self._sums["flops"] += flops
        self._ratio_max = max(self._ratio_max, ratio_max)

    def add_mismatch(self, tokens: TokenBatch, logprob_N: Tensor) -> None:
        """Compare logprobs at equal weights: of the completions that this very policy version sampled from their start.

        Where weights changed on the way, a token may go on from states that the older ones left.
        """
        difference_N = logprob_N.double().cpu() - tokens.rollout_logprob_N.double().cpu()
        is_older_N = tokens.policy_version_N.cpu() != self._policy_version
        sequence_N = tokens.sequence_N.cpu()
        is_equal_N = ~torch.isin(sequence_N, sequence_N[is_older_N])
        self._mismatch.append(difference_N[is_equal_N].numpy())

    def add_update(self, grad_norm: float, learning_rate: float) -> None:
        self._norms.append(grad_norm)
        self._learning_rate = learning_rate

    def merge(self, ranks: Ranks) -> None:
        """Add what the other ranks measured in their micro batches; collective, once, before `metrics`.

        What was measured on the groups, the gradient norms and the learning rate are the same on every rank.
        """
        if ranks.is_alone:
            return
        own = {name: value for name, value in self._sums.items() if name != "unscored_tokens"}
        for name in own:
            self._sums[name] = 0.0
        of_ranks = ranks.gather_objects((own, self._ratio_max, self._mismatch))
        for sums, _, _ in of_ranks:
            for name, value in sums.items():
                self._sums[name] += value
        self._ratio_max = max(ratio_max for _, ratio_max, _ in of_ranks)
        self._mismatch = [difference for _, _, differences in of_ranks for difference in differences]
        self.routers.merge(ranks)

    def metrics(self, policy_version: int, seconds: float) -> dict[str, float]:
        """The step's metrics; those that had nothing to measure are absent."""
        metrics = {
            "group/dropped": float(self._dropped),
            "optim/updates": float(len(self._norms)),
            "policy/version": float(policy_version),
            "time_s/forward_backward": seconds,
        }
        if self._norms:
            metrics |= self._training(seconds) | self.routers.metrics(len(self._norms))
        difference = np.concatenate([np.zeros(0), *self._mismatch])
        if len(difference):
            metrics |= _mismatch(difference)
        return metrics

    def _training(self, seconds: float) -> dict[str, float]:
        sums, tokens = self._sums, self._sums["tokens"]
        unscored = sums["unscored_tokens"]
        ages = np.concatenate(self._ages)
        metrics = {metric: sums[name] / tokens for name, metric in _MEANS.items() if name in sums}
        if self._peak_flops is not None:
            metrics["perf/mfu"] = sums["flops"] / seconds / self._peak_flops
        return metrics | {
            "loss/policy": sums["loss"] / len(self._norms),
            "loss/frac_masked": (sums["masked"] + unscored) / (tokens + unscored),
            "policy/ratio/max": self._ratio_max,
            "optim/grad_norm": max(self._norms),
            "optim/lr": self._learning_rate,
            "off_policy/steps/mean": float(ages.mean()),
            "off_policy/steps/max": float(ages.max()),
            "perf/learner_tokens_per_s": sums["packed_tokens"] / seconds,
        }


def _mismatch(difference: Float64Array) -> dict[str, float]:
    """Of log pi_learner - log pi_rollout; the KL is the k3 estimate under rollout samples, `e^d - d - 1`."""
    size = np.abs(difference)
    return {
        "policy/mismatch/max": float(size.max()),
        "policy/mismatch/mean": float(size.mean()),
        "policy/mismatch/p999": float(np.quantile(size, 0.999, method="higher")),
        "policy/mismatch_kl": float(np.mean(np.expm1(difference) - difference)),
    }
