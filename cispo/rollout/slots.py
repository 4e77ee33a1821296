"""What the engine keeps of the sequences in its slots, as arrays: tokens so far, and what ends or draws them.

Arrays, because a step touches every sequence: rows of a step are gathered and written at once. A sequence that leaves
its slot before its end takes its tokens along (`Tokens`) and gets them back with the next slot.

S slots, T tokens after the prompt, L layers that have a router, K experts a token.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cispo.model.cache import Slots
from cispo.types import ExpertIdArray, Turn


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The tokens after a prompt: id, whether the policy drew it, logprob, policy version; [T] each."""

    ids_T: npt.NDArray[np.int32]
    is_sampled_T: npt.NDArray[np.bool_]
    logprobs_T: npt.NDArray[np.float32]
    versions_T: npt.NDArray[np.int32]
    expert_ids_TLK: ExpertIdArray | None = None

    @staticmethod
    def none() -> "Tokens":
        """No tokens yet."""
        return Tokens(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(0, np.float32), np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.ids_T)

    def with_given(self, ids: list[int]) -> "Tokens":
        """These and some that the policy did not sample."""
        zeros = np.zeros(len(ids))
        experts = self.expert_ids_TLK
        return Tokens(
            np.concatenate((self.ids_T, np.array(ids, np.int32))),
            np.concatenate((self.is_sampled_T, zeros.astype(np.bool_))),
            np.concatenate((self.logprobs_T, zeros.astype(np.float32))),
            np.concatenate((self.versions_T, zeros.astype(np.int32))),
            None
            if experts is None
            else np.concatenate((experts, np.zeros((len(ids), *experts.shape[1:]), experts.dtype))),
        )

    def turns(self) -> tuple[Turn, ...]:
        """Runs of tokens that were sampled, or put in."""
        borders = np.flatnonzero(np.diff(self.is_sampled_T)) + 1
        return tuple(
            Turn(
                token_ids_T=self.ids_T[run],
                loss_mask_T=self.is_sampled_T[run],
                logprobs_T=self.logprobs_T[run],
                policy_versions_T=self.versions_T[run],
                expert_ids_TLK=None if self.expert_ids_TLK is None else self.expert_ids_TLK[run],
            )
            for run in np.split(np.arange(len(self)), borders)
        )


class SlotArrays:
    """One row a slot. count_S: tokens after the prompt; launched_S: those and the ones that are still being sampled.

    epoch_S: changes whenever a token under way is no longer wanted. limit_S: most tokens. run_S: how many tokens in a
    row were likelier than likely_S (a logprob); run_limit_S of them end a completion. is_watched_S: whether every token
    has to be looked at by itself.
    """

    def __init__(self, slots: int, limit: int, expert_ids_STLK: ExpertIdArray | None) -> None:
        self.ids_ST = np.zeros((slots, limit), np.int32)
        self.is_sampled_ST = np.zeros((slots, limit), np.bool_)
        self.logprobs_ST = np.zeros((slots, limit), np.float32)
        self.versions_ST = np.zeros((slots, limit), np.int32)
        self.expert_ids_STLK = expert_ids_STLK
        self.count_S = np.zeros(slots, np.int64)
        self.launched_S = np.zeros(slots, np.int64)
        self.epoch_S = np.zeros(slots, np.int64)
        self.limit_S = np.zeros(slots, np.int64)
        self.run_S = np.zeros(slots, np.int64)
        self.run_limit_S = np.zeros(slots, np.int64)
        self.likely_S = np.zeros(slots, np.float32)
        self.is_watched_S = np.zeros(slots, np.bool_)
        self.key_S = np.zeros(slots, np.uint64)
        self.temperature_S = np.ones(slots, np.float32)
        self.has_cut_S = np.zeros(slots, np.bool_)
        self.threshold_S = np.zeros(slots, np.float32)
        self.log_sequence_S = np.zeros(slots, np.int64)

    def tokens(self, slot: int) -> Tokens:
        """A copy of what a sequence has so far."""
        run = slice(int(self.count_S[slot]))
        experts = self.expert_ids_STLK
        return Tokens(
            self.ids_ST[slot, run].copy(),
            self.is_sampled_ST[slot, run].copy(),
            self.logprobs_ST[slot, run].copy(),
            self.versions_ST[slot, run].copy(),
            None if experts is None else experts[slot, run].copy(),
        )

    def put(self, slot: int, tokens: Tokens) -> None:
        """Give a slot the tokens that a sequence brought along."""
        count = len(tokens)
        self.ids_ST[slot, :count] = tokens.ids_T
        self.is_sampled_ST[slot, :count] = tokens.is_sampled_T
        self.logprobs_ST[slot, :count] = tokens.logprobs_T
        self.versions_ST[slot, :count] = tokens.versions_T
        if self.expert_ids_STLK is not None and tokens.expert_ids_TLK is not None:
            self.expert_ids_STLK[slot, :count] = tokens.expert_ids_TLK
        self.count_S[slot] = self.launched_S[slot] = count

    def append_sampled(
        self, slots: Slots, ids_B: npt.NDArray[np.int64], logprob_B: npt.NDArray[np.float32], version: int
    ) -> None:
        """One token more for each of these slots."""
        at = self.count_S[slots]
        self.ids_ST[slots, at] = ids_B
        self.is_sampled_ST[slots, at] = True
        self.logprobs_ST[slots, at] = logprob_B
        self.versions_ST[slots, at] = version
        self.count_S[slots] = at + 1
        self.run_S[slots] = np.where(logprob_B > self.likely_S[slots], self.run_S[slots] + 1, 0)

    def stop_launching(self, slot: int) -> None:
        """Want nothing more of what is still under way for a slot."""
        self.launched_S[slot] = self.count_S[slot]
        self.epoch_S[slot] += 1

    def append_given(self, slot: int, ids: list[int]) -> None:
        """Tokens that the policy did not sample; what was still under way for the slot is no longer wanted."""
        count = int(self.count_S[slot])
        given = slice(count, count + len(ids))
        self.ids_ST[slot, given] = ids
        self.is_sampled_ST[slot, given] = False
        self.logprobs_ST[slot, given] = 0.0
        self.versions_ST[slot, given] = 0
        self.count_S[slot] = given.stop
        self.run_S[slot] = 0
        self.stop_launching(slot)
