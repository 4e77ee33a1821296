"""The vocabulary shared by every room: prompts, turns, rollouts, groups, scores.

A rollout is a list of turns, and nothing here assumes that there is one turn only. All records are plain, frozen and
picklable, because they cross process borders as they are.

Shape suffixes: T tokens of one sequence, L layers that have a router, K experts a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
ExpertIdArray = npt.NDArray[np.uint8 | np.int16]


class StopReason(StrEnum):
    """Why sampling of a completion ended."""

    EOS = "eos"
    """The policy sampled its end-of-sequence token, which is the completion's last token."""
    LENGTH = "length"
    """The completion reached the recipe's limit of tokens and is truncated."""
    STOP_STRING = "stop_string"
    """Its text came to hold a string that was asked to end it."""
    STOP_TOKEN = "stop_token"
    """It sampled a token that was asked to end it."""
    REPETITION = "repetition"
    """Too many tokens in a row were almost certain, as in a text that goes round in circles; it is truncated."""


class ScoreStatus(StrEnum):
    """Whether a score may train the policy."""

    OK = "ok"
    ERROR = "error"
    """The reward raised, returned no finite number, or its infrastructure failed: masked, never scored 0."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set, ready to sample from.

    id: stable name of the row, unique in its data set; sampling noise depends on it.
    text: what the user says to the policy (before chat rendering).
    row: every other column of the data set, handed to rewards by name.
    earlier: messages of the conversation before `text`, each as role and content; worked examples, say.
    """

    id: str
    text: str
    row: Mapping[str, Any] = field(default_factory=dict)
    earlier: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """Consecutive tokens after the prompt, with what was known when they were sampled; all arrays have shape [T].

    loss_mask is True where the policy sampled the token itself; logprobs and policy versions elsewhere are 0.
    expert_ids_TLK: the experts that the routers chose where each token was predicted, that is at the token before it;
    None unless they were recorded. They stay in memory: no file of a run holds them.
    """

    token_ids_T: Int32Array
    loss_mask_T: BoolArray
    logprobs_T: Float32Array
    policy_versions_T: Int32Array
    expert_ids_TLK: ExpertIdArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled completion of one prompt: `completion_index` of the `group_size` in its group.

    text is the completion decoded without special tokens, over all turns, and before the string that stopped it.
    prompt_expert_ids_TLK: as in Turn, of the prompt's tokens from the second on. is_interrupted: whether its budget of
    thinking was spent, so that tokens which are not the policy's were put in.
    """

    prompt_id: str
    completion_index: int
    prompt_token_ids_T: Int32Array
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    text: str
    prompt_expert_ids_TLK: ExpertIdArray | None = None
    is_interrupted: bool = False

    @property
    def expert_ids_TLK(self) -> ExpertIdArray | None:
        """The experts of all tokens of prompt and completion but the last, which predicted none; None if unrecorded."""
        parts = [self.prompt_expert_ids_TLK, *(turn.expert_ids_TLK for turn in self.turns)]
        recorded = [part for part in parts if part is not None]
        return np.concatenate(recorded) if len(recorded) == len(parts) else None

    @property
    def completion_token_ids_T(self) -> Int32Array:
        return np.concatenate([turn.token_ids_T for turn in self.turns])

    @property
    def loss_mask_T(self) -> BoolArray:
        return np.concatenate([turn.loss_mask_T for turn in self.turns])

    @property
    def logprobs_T(self) -> Float32Array:
        return np.concatenate([turn.logprobs_T for turn in self.turns])

    @property
    def policy_versions_T(self) -> Int32Array:
        return np.concatenate([turn.policy_versions_T for turn in self.turns])

    @property
    def completion_length_tokens(self) -> int:
        return sum(len(turn.token_ids_T) for turn in self.turns)

    @property
    def is_truncated(self) -> bool:
        return self.stop_reason in (StopReason.LENGTH, StopReason.REPETITION)


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward says of one completion.

    value: the reward, finite; 0.0 and meaningless when status is ERROR.
    parts: named components of the value (for instance code, format, length), logged as reward/{part}/mean.
    info: details for the rollout log, such as verdict status or tests passed; never expected values or test text.
    message: why the status is ERROR, one line; empty otherwise.
    """

    value: float
    status: ScoreStatus = ScoreStatus.OK
    parts: Mapping[str, float] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""

    @property
    def is_correct(self) -> bool:
        """By the part `correct` where a reward gives one, else a full reward of 1."""
        return self.parts.get("correct", self.value) >= 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The completions of one prompt that were sampled together. stream: as in the request for them."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    stream: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredGroup:
    """A group with the score of each of its rollouts, in the same order."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]
