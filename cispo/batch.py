"""From scored groups to packed tokens: which tokens train the policy, with what weight, in which micro batch.

The weight of a token (its reduction: token, prompt, sample, mixed, constant) is worked out over the whole mini batch
before anything is split, and multiplied into the coefficient. So loss and gradient are sums over tokens, the same under
any split into micro batches and any order of packing. Nothing is padded.

Where the policy takes it, sequences with one prompt are packed as a family: the prompt once, and after it a branch for
each, its own tokens. A family over the token budget is split, and each part has the prompt again.

Shape suffixes: T tokens of one sequence, N packed tokens of a micro batch (or tokens of a TokenBatch), M loss tokens of
a micro batch, B sequences, L layers that have a router, K experts a token.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.advantage import AdvantageBatch
from cispo.errors import CispoError
from cispo.objective_settings import Reduction
from cispo.parallel.shards import deal
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


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Packed sequences of one forward and backward, and the rows among them that predict a loss token.

    ids_N, positions_N: int64; cu_seqlens: int32 [B + 1]; rows_M: int64, increasing within a sequence; targets_M: int64,
    the token that each of those rows predicts; tokens: the M loss tokens in the same order; expert_ids_NLK: the experts
    of each token while sampling, None unless they were recorded for all of them. families: as `Decoder.forward` takes
    them; the last row of a prompt with branches is in rows_M once for each of their first tokens. is_filler: it only
    keeps a rank in step with others, and its weights are 0.
    """

    ids_N: Tensor
    positions_N: Tensor
    cu_seqlens: Tensor
    rows_M: Tensor
    targets_M: Tensor
    tokens: TokenBatch
    expert_ids_NLK: Tensor | None = None
    families: tuple[int, ...] | None = None
    is_filler: bool = False

    def to(self, device: torch.device) -> "MicroBatch":
        """On another device, but for what the decoder reads on the host: there it would have to wait."""
        of_host = ("cu_seqlens", "families", "is_filler")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in of_host}
        moved: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in values.items()}
        return replace(self, **moved)


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


def pack(lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    """Indices of the lengths in packs of at most tokens_per_pack tokens; a longer one is a pack of its own.

    First fit by falling length, ties by index: the same lengths give the same packs.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((i for i, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            packs.append([])
            room.append(tokens_per_pack)
            place = len(packs) - 1
        packs[place].append(index)
        room[place] -= lengths[index]
    return [sorted(members) for members in packs]


def pack_micro_batches(
    sequences: Sequence[TrainSequence],
    weights: Sequence[float],
    tokens_per_micro_batch: int,
    *,
    shares_prompts: bool = False,
) -> Iterator[MicroBatch]:
    """The sequences of a mini batch in micro batches under the budget; `weights` is one number a sequence.

    shares_prompts: pack sequences with one prompt as families, for a decoder that takes branches.
    """
    parts = _families(sequences, tokens_per_micro_batch) if shares_prompts else [[i] for i in range(len(sequences))]
    lengths = [_part_tokens(sequences, part) for part in parts]
    for members in pack(lengths, tokens_per_micro_batch):
        chosen = [parts[member] for member in members]
        yield _micro_batch(
            [[sequences[i] for i in part] for part in chosen], [weights[i] for part in chosen for i in part]
        )


def deal_micro_batches(
    sequences: Sequence[TrainSequence],
    weights: Sequence[float],
    tokens_per_micro_batch: int,
    *,
    rank: int,
    world_size: int,
    shares_prompts: bool = False,
) -> list[MicroBatch]:
    """One rank's part of a mini batch in micro batches, of which every rank has equally many.

    Every sequence goes to one rank, the longest first and each to the rank with the fewest tokens. A rank that has
    fewer micro batches than another gets the shortest sequence again, with weight 0, for each that it lacks.
    """
    if world_size == 1:
        return list(pack_micro_batches(sequences, weights, tokens_per_micro_batch, shares_prompts=shares_prompts))
    fair_share = -(-sum(sequence.inputs for sequence in sequences) // world_size)
    budget = min(tokens_per_micro_batch, fair_share)
    parts = _families(sequences, budget) if shares_prompts else [[i] for i in range(len(sequences))]
    lengths = [_part_tokens(sequences, part) for part in parts]
    hands = deal(lengths, world_size)
    packs = [pack([lengths[part] for part in hand], tokens_per_micro_batch) for hand in hands]
    own = [[parts[hands[rank][member]] for member in members] for members in packs[rank]]
    micro_batches = [
        _micro_batch([[sequences[i] for i in part] for part in chosen], [weights[i] for part in chosen for i in part])
        for chosen in own
    ]
    lacking = max(map(len, packs)) - len(micro_batches)
    if lacking:
        shortest = min(sequences, key=lambda sequence: sequence.inputs)
        micro_batches += [replace(_micro_batch([[shortest]], [0.0]), is_filler=True)] * lacking
    return micro_batches


def _part_tokens(sequences: Sequence[TrainSequence], part: Sequence[int]) -> int:
    return sequences[part[0]].prompt_tokens + sum(sequences[i].branch_tokens for i in part)


def _families(sequences: Sequence[TrainSequence], budget: int) -> list[list[int]]:
    """Indices of sequences that share a prompt, in order; in parts under the budget, or of one sequence."""
    parts: list[list[int]] = []
    latest: dict[tuple[int, bytes, bytes], tuple[list[int], int]] = {}
    for index, sequence in enumerate(sequences):
        key = sequence.prompt_key
        if key not in latest or latest[key][1] + sequence.branch_tokens > budget:
            latest[key] = [], sequence.prompt_tokens
            parts.append(latest[key][0])
        part, tokens = latest[key]
        part.append(index)
        latest[key] = part, tokens + sequence.branch_tokens
    return parts


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive packed tokens: from `first` on to before `end` of one sequence."""

    sequence: TrainSequence
    first: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.first


def _pieces(part: Sequence[TrainSequence]) -> list[_Piece]:
    """A sequence alone in one piece; else the prompt, then what each sequence has after it, if anything."""
    if len(part) == 1:
        return [_Piece(part[0], 0, part[0].inputs)]
    branches = [_Piece(sequence, sequence.prompt_tokens, sequence.inputs) for sequence in part]
    return [_Piece(part[0], 0, part[0].prompt_tokens), *(branch for branch in branches if branch.length)]


def _loss_rows(part: Sequence[TrainSequence], start: int) -> list[npt.NDArray[np.int64]]:
    """For each sequence of a part that is packed from row `start` on, the rows that predict its loss tokens."""
    rows, branch = [], start + part[0].prompt_tokens
    for sequence in part:
        before = np.flatnonzero(sequence.loss_mask_T) - 1
        own = before - sequence.prompt_tokens
        rows.append(np.where(own < 0, start + before, branch + own))
        branch += sequence.branch_tokens
    return rows


def _micro_batch(parts: Sequence[Sequence[TrainSequence]], weights: Sequence[float]) -> MicroBatch:
    sequences = [sequence for part in parts for sequence in part]
    pieces_of_parts = [_pieces(part) for part in parts]
    pieces = [piece for part in pieces_of_parts for piece in part]
    starts = np.cumsum([0, *(piece.length for piece in pieces)])
    families = np.cumsum([0, *map(len, pieces_of_parts)])[:-1]
    targets = [np.flatnonzero(sequence.loss_mask_T) for sequence in sequences]
    counts = [len(places) for places in targets]

    def per_token(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(torch.tensor(counts))

    def gathered(name: str) -> Tensor:
        return torch.from_numpy(
            np.concatenate([getattr(seq, name)[places] for seq, places in zip(sequences, targets, strict=True)])
        )

    rows = [_loss_rows(part, int(starts[first])) for part, first in zip(parts, families, strict=True)]
    ids = np.concatenate([piece.sequence.token_ids_T[piece.first : piece.end] for piece in pieces])
    return MicroBatch(
        ids_N=torch.from_numpy(ids).long(),
        positions_N=torch.cat([torch.arange(piece.first, piece.end) for piece in pieces]),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        rows_M=torch.from_numpy(np.concatenate([rows_T for part in rows for rows_T in part])),
        targets_M=gathered("token_ids_T").long(),
        tokens=TokenBatch(
            rollout_logprob_N=gathered("rollout_logprob_T"),
            advantage_N=per_token([sequence.advantage for sequence in sequences], torch.float32),
            loss_mask_N=torch.ones(sum(counts), dtype=torch.bool),
            weight_N=per_token(weights, torch.float32),
            sequence_N=per_token([sequence.sequence for sequence in sequences], torch.int64),
            group_N=per_token([sequence.group for sequence in sequences], torch.int64),
            policy_version_N=gathered("policy_version_T").long(),
        ),
        expert_ids_NLK=_expert_ids(pieces),
        families=None if len(families) == len(pieces) else tuple(families.tolist()),
    )


def _expert_ids(pieces: Sequence[_Piece]) -> Tensor | None:
    parts = [
        piece.sequence.expert_ids_TLK[piece.first : piece.end]
        for piece in pieces
        if piece.sequence.expert_ids_TLK is not None
    ]
    return torch.from_numpy(np.concatenate(parts)) if len(parts) == len(pieces) else None
