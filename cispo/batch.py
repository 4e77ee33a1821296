"""From scored groups to training sequences: which tokens train the policy, and with what weight.

The weight of a token (its reduction: token, prompt, sample, mixed, constant) is worked out over the whole mini batch
before anything is split, and multiplied into the coefficient. So loss and gradient are sums over tokens, the same under
any split into micro batches and any order of packing (`cispo.packing`).

Shape suffixes: T tokens of one sequence, N tokens of a TokenBatch, L layers that have a router, K experts a token.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cispo.advantage import AdvantageBatch
from cispo.errors import CispoError
from cispo.objective_settings import Reduction
from cispo.types import BoolArray, ExpertIdArray, Float32Array, Int32Array, Rollout, ScoredGroup


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """What an objective may know of some loss tokens; every tensor has shape [N].

    Logprobs and advantages are float32 and detached; an absent logprob is None. weight_N is the reduction's normaliser:
    the loss is the sum over tokens of weight times term, over all micro batches of a mini batch.
    """

    rollout_logprob_N: Tensor
    advantage_N: Tensor
    loss_mask_N: Tensor
    weight_N: Tensor
    sequence_N: Tensor
    group_N: Tensor
    policy_version_N: Tensor
    logprob_N: Tensor | None = None
    proximal_logprob_N: Tensor | None = None
    reference_logprob_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.advantage_N)

    def rows(self, rows: slice) -> "TokenBatch":
        """The tokens of consecutive rows."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "TokenBatch":
        return self._map(lambda tensor: tensor.to(device))

    def with_logprob(self, logprob_N: Tensor) -> "TokenBatch":
        """The same tokens, with the logprobs of the policy as it is now."""
        return replace(self, logprob_N=logprob_N)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TokenBatch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        return TokenBatch(**changed)


@dataclass(frozen=True, slots=True, eq=False)
class TrainSequence:
    """One completion with its prompt, ready to train on; arrays have shape [T].

    loss_mask_T is True where the policy sampled the token; `sequence` and `group` are indices in the generation batch.
    prompt_tokens: how many tokens come before the completion. expert_ids_TLK: the experts of every token but the last
    while sampling, if they were recorded.
    """

    token_ids_T: Int32Array
    loss_mask_T: BoolArray
    rollout_logprob_T: Float32Array
    policy_version_T: Int32Array
    advantage: float
    sequence: int
    group: int
    prompt_id: str
    prompt_tokens: int
    expert_ids_TLK: ExpertIdArray | None = None

    @property
    def prompt_key(self) -> tuple[int, bytes, bytes]:
        """Equal for sequences that can share a prompt: one group, the same tokens, the same experts."""
        experts = b"" if self.expert_ids_TLK is None else self.expert_ids_TLK[: self.prompt_tokens].tobytes()
        return self.group, self.token_ids_T[: self.prompt_tokens].tobytes(), experts

    @property
    def branch_tokens(self) -> int:
        """Inputs after the prompt; none where its last token predicts the only loss token."""
        return self.inputs - self.prompt_tokens

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask_T.sum())

    @property
    def inputs(self) -> int:
        """Tokens that the forward pass needs: all before the last loss token."""
        return int(np.flatnonzero(self.loss_mask_T)[-1])


def training_sequences(groups: Sequence[ScoredGroup], advantages: AdvantageBatch) -> list[list[TrainSequence]]:
    """The sequences of each kept group that has any: those with a score and at least one sampled token."""
    sizes = np.cumsum([0, *(len(group.rollouts) for group in groups)])
    kept = []
    for index in advantages.kept:
        advantage = advantages.groups[index]
        sequences = [
            _sequence(rollout, float(advantage.advantage_G[i]), int(sizes[index]) + i, index)
            for i, rollout in enumerate(groups[index].rollouts)
            if advantage.is_scored_G[i] and rollout.loss_mask_T.any()
        ]
        if sequences:
            kept.append(sequences)
    return kept


def _sequence(rollout: Rollout, advantage: float, sequence: int, group: int) -> TrainSequence:
    prompt = rollout.prompt_token_ids_T
    if len(prompt) == 0:
        raise CispoError(f"prompt {rollout.prompt_id} has no tokens; the first sampled token needs one before it")
    nothing = np.zeros(len(prompt), dtype=np.int32)
    return TrainSequence(
        token_ids_T=np.concatenate([prompt, rollout.completion_token_ids_T]).astype(np.int32),
        loss_mask_T=np.concatenate([nothing.astype(np.bool_), rollout.loss_mask_T]),
        rollout_logprob_T=np.concatenate([nothing.astype(np.float32), rollout.logprobs_T]),
        policy_version_T=np.concatenate([nothing, rollout.policy_versions_T]),
        advantage=advantage,
        sequence=sequence,
        group=group,
        prompt_id=rollout.prompt_id,
        prompt_tokens=len(prompt),
        expert_ids_TLK=rollout.expert_ids_TLK,
    )


def split_mini_batches(
    groups: Sequence[list[TrainSequence]], count: int, *, seed: int, step: int
) -> list[list[TrainSequence]]:
    """Whole groups in a random order fixed by seed and step, in `count` mini batches that differ by at most one group.

    With fewer groups than `count`, each is a mini batch of its own; with none, there is no mini batch.
    """
    if not groups:
        return []
    order = np.random.default_rng([seed, step]).permutation(len(groups))
    parts = np.array_split(order, min(count, len(groups)))
    return [[sequence for group in part for sequence in groups[group]] for part in parts]


def token_weights(
    sequences: Sequence[TrainSequence],
    reduction: Reduction,
    *,
    mixed_sample_weight: float | None = None,
    normaliser_tokens: int | None = None,
) -> list[float]:
    """The weight of each sequence's loss tokens, over all sequences of a mini batch.

    With |o_i| loss tokens in sample i, S samples and P prompts:
    token     1 / sum_i |o_i|                                      (DAPO eq. 8)
    prompt    1 / (P * sum over the prompt's samples of |o_j|)     (MiniMax-M1 eq. 4)
    sample    1 / (S * |o_i|)                                      (GRPO eq. 3)
    mixed     mixed_sample_weight * sample + (1 - mixed_sample_weight) * token
    constant  1 / (S * normaliser_tokens)                          (Dr. GRPO)
    """
    lengths = [sequence.loss_tokens for sequence in sequences]
    samples, total = len(sequences), sum(lengths)
    if reduction == "token":
        return [1 / total] * samples
    if reduction == "sample":
        return [1 / (samples * length) for length in lengths]
    if reduction == "prompt":
        of_prompt: dict[int, int] = defaultdict(int)
        for sequence, length in zip(sequences, lengths, strict=True):
            of_prompt[sequence.group] += length
        return [1 / (len(of_prompt) * of_prompt[sequence.group]) for sequence in sequences]
    if reduction == "mixed":
        if mixed_sample_weight is None:
            raise ValueError("the mixed reduction needs mixed_sample_weight; give a number in [0, 1]")
        return [mixed_sample_weight / (samples * length) + (1 - mixed_sample_weight) / total for length in lengths]
    if normaliser_tokens is None:
        raise ValueError("the constant reduction needs normaliser_tokens; give the length to divide by")
    return [1 / (samples * normaliser_tokens)] * samples
