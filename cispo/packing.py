"""Training sequences packed into micro batches: one row of tokens after the other, nothing padded.

Where the policy takes it, sequences with one prompt are packed as a family: the prompt once, and after it a branch for
each, its own tokens. A family over the token budget is split, and each part has the prompt again.

Shape suffixes: T tokens of one sequence, N packed tokens of a micro batch, M loss tokens of a micro batch, B sequences,
L layers that have a router, K experts a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.batch import TokenBatch, TrainSequence
from cispo.parallel.shards import deal


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
