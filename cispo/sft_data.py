"""Prompts with their completions as tokens, and the batches that supervised training makes of them.

The order of rows is a permutation for each epoch, fixed by the seed, and batches are cut from the endless row of
epochs. So a batch follows from its number alone, and a resumed run goes on with the batch that it would have had.

Shape suffixes: T tokens of one example, N packed tokens, M loss tokens of a micro batch, B examples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cispo.data import DataSettings, load_prompts
from cispo.errors import DataError
from cispo.model.tokenizer import Tokenizer
from cispo.packing import pack
from cispo.types import Int32Array, Prompt


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One rendered prompt and its completion, which ends with eos; the loss is on all but the first prompt_tokens."""

    token_ids_T: Int32Array
    prompt_tokens: int

    @property
    def inputs(self) -> int:
        """Tokens of the forward pass: the last one predicts nothing."""
        return len(self.token_ids_T) - 1

    @property
    def loss_tokens(self) -> int:
        return len(self.token_ids_T) - self.prompt_tokens


@dataclass(frozen=True, slots=True, eq=False)
class SftMicroBatch:
    """Packed examples. ids_N, positions_N, rows_M, targets_M: int64; cu_seqlens: int32 [B + 1], on the CPU."""

    ids_N: Tensor
    positions_N: Tensor
    rows_M: Tensor
    targets_M: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device) -> "SftMicroBatch":
        """On another device, without waiting for the copy; cu_seqlens stays, since the decoder reads it on the host."""
        if device.type == "cpu":
            return self
        names = [field.name for field in fields(self) if field.name != "cu_seqlens"]
        moved = {name: getattr(self, name).pin_memory().to(device, non_blocking=True) for name in names}
        return SftMicroBatch(cu_seqlens=self.cu_seqlens, **moved)


def load_examples(settings: DataSettings, tokenizer: Tokenizer, *, base_path: Path) -> list[Example]:
    """Every row as tokens. Raises DataError for a row without a completion, and whatever `load_prompts` raises."""
    return [_example(prompt, tokenizer, settings) for prompt in load_prompts(settings, base_path=base_path)]


def _example(prompt: Prompt, tokenizer: Tokenizer, settings: DataSettings) -> Example:
    completion = prompt.row.get("completion")
    if completion is not None and not isinstance(completion, str):
        raise DataError(
            f"{settings.path}: the completion of row {prompt.id} is no text but {type(completion).__name__}; "
            "map a text column with data.columns.completion"
        )
    if completion is None:
        raise DataError(
            f"{settings.path}: row {prompt.id} has no text in the column `completion` "
            f"(it has {', '.join(sorted(prompt.row)) or 'no others'}); name its column under data.columns"
        )
    prompt_ids = tokenizer.render_prompt(prompt.text, prompt.earlier)
    if not prompt_ids:
        raise DataError(f"{settings.path}: the prompt of row {prompt.id} renders to no tokens; give it a text")
    ids = [*prompt_ids, *tokenizer.encode(completion), tokenizer.eos_id]
    return Example(np.array(ids, dtype=np.int32), len(prompt_ids))


def batches(lengths: Sequence[int], tokens_per_batch: int, *, seed: int, first: int = 0) -> Iterator[list[int]]:
    """Batch after batch without end, from number `first`: indices of examples, of tokens_per_batch tokens at most.

    An example longer than that is a batch of its own.
    """
    number = 0
    batch: list[int] = []
    tokens = 0
    for index in _shuffled_epochs(len(lengths), seed):
        if batch and tokens + lengths[index] > tokens_per_batch:
            if number >= first:
                yield batch
            number += 1
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]


def _shuffled_epochs(count: int, seed: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, epoch]).permutation(count).tolist()
        epoch += 1


def micro_batches(examples: Sequence[Example], tokens_per_micro_batch: int) -> list[SftMicroBatch]:
    """The examples packed under a budget of tokens."""
    packs = pack([example.inputs for example in examples], tokens_per_micro_batch)
    return [_micro_batch([examples[i] for i in members]) for members in packs]


def _micro_batch(examples: Sequence[Example]) -> SftMicroBatch:
    lengths = np.array([example.inputs for example in examples])
    ends = np.cumsum(lengths)
    offsets = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    is_loss_row = offsets >= np.repeat([example.prompt_tokens - 1 for example in examples], lengths)
    targets = np.concatenate([example.token_ids_T[example.prompt_tokens :] for example in examples])
    return SftMicroBatch(
        ids_N=torch.from_numpy(np.concatenate([example.token_ids_T[:-1] for example in examples])).long(),
        positions_N=torch.from_numpy(offsets),
        rows_M=torch.from_numpy(np.flatnonzero(is_loss_row)),
        targets_M=torch.from_numpy(targets).long(),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
    )
