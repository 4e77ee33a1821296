"""The policy-gradient objectives: each is a rule for one number per token.

The gradient of every objective here is a sum over tokens of `coefficient * grad(log pi)`, where the coefficient is a
function of the batch that no gradient flows through. So the learner minimises `-sum(coefficient_N * logprob_N)` for all
of them, and an objective only has to say its coefficients. What is logged is the paper's loss, not that surrogate.

Notation: r is the importance ratio pi / pi_anchor of a token, A its advantage, w its weight (the reduction's
normaliser, see `token_weights` in batch.py). Everything is elementwise, so it does not depend on how tokens are split.

Shape suffix: N tokens of a TokenBatch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from cispo.batch import TokenBatch
from cispo.objective_settings import (
    CispoSettings,
    DapoSettings,
    DrGrpoSettings,
    GrpoSettings,
    ObjectiveSettings,
    ReinforceSettings,
)

_Clipped = GrpoSettings | DapoSettings | DrGrpoSettings


class Scope(StrEnum):
    """Which other tokens a token's coefficient depends on."""

    TOKEN = "token"
    """None: it can be worked out in the same pass over the logits that makes the token's logprob."""


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """What an objective says of a TokenBatch.

    coefficient_N: the factor of grad(log pi), weight included.
    loss_N: the terms of the paper's loss, weight included; their sum over the mini batch is the loss.
    sums, maxima: scalar tensors to add up and to take the largest of, over all tokens of a step; `sums["tokens"]` is
    the number of loss tokens, and the means of the others are taken over it.
    """

    coefficient_N: Tensor
    loss_N: Tensor
    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor]


class Objective(Protocol):
    """A rule for the coefficients of tokens."""

    @property
    def scope(self) -> Scope: ...

    def coefficients(self, batch: TokenBatch) -> Coefficients: ...


@dataclass(frozen=True, slots=True)
class Cispo:
    """MiniMax-M1, arXiv 2506.13585, section 3.1."""

    settings: CispoSettings
    scope: Scope = Scope.TOKEN

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        """c = w * clip(r, ratio_min, ratio_max) * M * A: eq. 4 with the ratio clipped by eq. 5 and the mask M of eq. 7.

        Eq. 5 clips the weight and never drops a token: with the mask off, no coefficient is 0 unless r or A is.
        """
        settings = self.settings
        logprob_N, ratio_N = importance_ratio(batch, settings.anchor)
        advantage_N = batch.advantage_N
        is_masked_N = torch.zeros_like(batch.loss_mask_N)
        if settings.mask_ratio_high is not None:
            is_masked_N |= (advantage_N > 0) & (ratio_N > settings.mask_ratio_high)
        if settings.mask_ratio_low is not None:
            is_masked_N |= (advantage_N < 0) & (ratio_N < settings.mask_ratio_low)
        clipped_N = ratio_N.clamp(settings.ratio_min, settings.ratio_max)
        coefficient_N = torch.where(is_masked_N, 0.0, clipped_N * advantage_N)
        return _weighted(
            batch,
            settings.kl_coefficient,
            correction=rollout_correction(batch, settings),
            coefficient_N=coefficient_N,
            loss_N=-coefficient_N * logprob_N,
            ratio_N=ratio_N,
            clipped_high_N=ratio_N > settings.ratio_max,
            clipped_low_N=ratio_N < settings.ratio_min,
            masked_N=is_masked_N,
        )


@dataclass(frozen=True, slots=True)
class ClippedSurrogate:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), which GRPO, DAPO and Dr. GRPO share."""

    settings: _Clipped
    scope: Scope = Scope.TOKEN

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        """c = w * r * A where the unclipped side is the smaller one, else 0; the loss is -w * min(r A, clip(r) A).

        d/dlogpi of r A is r A. Where the minimum takes the clipped side, the loss is constant and the token is lost.
        """
        settings = self.settings
        _, ratio_N = importance_ratio(batch, settings.anchor)
        advantage_N = batch.advantage_N
        clipped_high_N = (advantage_N > 0) & (ratio_N > settings.clip_high)
        clipped_low_N = (advantage_N < 0) & (ratio_N < settings.clip_low)
        masked_N = clipped_high_N | clipped_low_N
        surrogate_N = ratio_N * advantage_N
        bounded_N = ratio_N.clamp(settings.clip_low, settings.clip_high) * advantage_N
        return _weighted(
            batch,
            settings.kl_coefficient,
            correction=rollout_correction(batch, settings),
            coefficient_N=torch.where(masked_N, 0.0, surrogate_N),
            loss_N=-torch.minimum(surrogate_N, bounded_N),
            ratio_N=ratio_N,
            clipped_high_N=clipped_high_N,
            clipped_low_N=clipped_low_N,
            masked_N=masked_N,
        )


@dataclass(frozen=True, slots=True)
class Reinforce:
    """REINFORCE (Williams, 1992) with the group baseline; without a ratio it is right on its own samples only."""

    settings: ReinforceSettings
    scope: Scope = Scope.TOKEN

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        """c = w * A; the loss is -w * A * log pi. The ratio to the rollout policy is logged and not used."""
        logprob_N, ratio_N = importance_ratio(batch, "rollout")
        nowhere_N = torch.zeros_like(batch.loss_mask_N)
        return _weighted(
            batch,
            self.settings.kl_coefficient,
            correction=None,
            coefficient_N=batch.advantage_N,
            loss_N=-batch.advantage_N * logprob_N,
            ratio_N=ratio_N,
            clipped_high_N=nowhere_N,
            clipped_low_N=nowhere_N,
            masked_N=nowhere_N,
        )


def build_objective(settings: ObjectiveSettings) -> Objective:
    """The objective that the settings name."""
    if isinstance(settings, CispoSettings):
        return Cispo(settings)
    if isinstance(settings, ReinforceSettings):
        return Reinforce(settings)
    return ClippedSurrogate(settings)


def importance_ratio(batch: TokenBatch, anchor: str) -> tuple[Tensor, Tensor]:
    """The current logprobs and pi / pi_anchor, both [N]; ValueError when the batch lacks one of the two."""
    anchor_logprob_N = batch.rollout_logprob_N if anchor == "rollout" else batch.proximal_logprob_N
    if batch.logprob_N is None or anchor_logprob_N is None:
        missing = "current" if batch.logprob_N is None else anchor
        raise ValueError(f"the batch has no {missing} logprobs; a logprob pass must come before the objective")
    return batch.logprob_N, (batch.logprob_N - anchor_logprob_N).exp()


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """Weights of tokens between rollout and proximal policy [N], 0 where one is left out, and which met a bound."""

    weight_N: Tensor
    is_bounded_N: Tensor
    is_out_N: Tensor


def rollout_correction(batch: TokenBatch, settings: CispoSettings | _Clipped) -> Correction | None:
    """pi_proximal / pi_rollout of each token, capped, or, outside of the bounds, with the token left out; None if off.

    Truncated importance sampling, and IcePop's mask. Both policies are from before the update, so no gradient flows
    through the weight.
    """
    if settings.rollout_correction == "none":
        return None
    if batch.proximal_logprob_N is None:
        raise ValueError("the batch has no proximal logprobs; a logprob pass must come before the objective")
    low, high = settings.correction_bounds
    weight_N = (batch.proximal_logprob_N - batch.rollout_logprob_N).exp()
    is_bounded_N = (weight_N < low) | (weight_N > high)
    if settings.rollout_correction == "masked":
        return Correction(torch.where(is_bounded_N, 0.0, weight_N), is_bounded_N, is_bounded_N)
    return Correction(weight_N.clamp(max=high), is_bounded_N, torch.zeros_like(is_bounded_N))


def reference_kl(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The k3 estimate of the KL divergence to the reference policy and its coefficient, both [N], without weight.

    With q = pi_ref / pi of a token, k3 = q - 1 - log q >= 0 (Schulman, 2020; GRPO eq. 4). Since dq/dlogpi = -q and
    dlog q/dlogpi = -1, dk3/dlogpi = 1 - q; minimising beta * w * k3 is a coefficient of beta * w * (q - 1). Under
    samples of the current policy its mean gradient is that of KL(pi_ref || pi), as in GRPO; no ratio corrects it.
    """
    if batch.logprob_N is None or batch.reference_logprob_N is None:
        raise ValueError("the batch has no reference logprobs; a pass of the reference policy must come first")
    log_q_N = batch.reference_logprob_N - batch.logprob_N
    excess_N = log_q_N.expm1()
    return excess_N - log_q_N, excess_N


def _weighted(
    batch: TokenBatch,
    kl_coefficient: float,
    *,
    correction: Correction | None,
    coefficient_N: Tensor,
    loss_N: Tensor,
    ratio_N: Tensor,
    clipped_high_N: Tensor,
    clipped_low_N: Tensor,
    masked_N: Tensor,
) -> Coefficients:
    """Correct for the rollout policy, add the KL term, multiply by the weight, leave out tokens outside the loss mask.

    What is logged is summed up. A token that the correction leaves out keeps its KL term.
    """
    mask_N = batch.loss_mask_N
    if correction is not None:
        coefficient_N, loss_N = correction.weight_N * coefficient_N, correction.weight_N * loss_N
        masked_N = masked_N | correction.is_out_N

    def total(values_N: Tensor) -> Tensor:
        return torch.where(mask_N, values_N.double(), 0.0).sum()

    sums = {
        "tokens": mask_N.sum(dtype=torch.float64),
        "ratio": total(ratio_N),
        "clipped_high": total(clipped_high_N),
        "clipped_low": total(clipped_low_N),
        "masked": total(masked_N),
    }
    if correction is not None:
        sums["correction"] = total(correction.weight_N)
        sums["correction_bounded"] = total(correction.is_bounded_N)
    if kl_coefficient > 0:
        kl_N, kl_gradient_N = reference_kl(batch)
        coefficient_N = coefficient_N + kl_coefficient * kl_gradient_N
        loss_N = loss_N + kl_coefficient * kl_N
        sums["kl_reference"] = total(kl_N)
    loss_N = torch.where(mask_N, batch.weight_N * loss_N, 0.0)
    sums["loss"] = loss_N.sum(dtype=torch.float64)
    maxima = {"ratio": torch.where(mask_N, ratio_N, 0.0).max()} if len(batch) else {}
    return Coefficients(torch.where(mask_N, batch.weight_N * coefficient_N, 0.0), loss_N, sums, maxima)
