"""Completions that may grow in stages: MiniMax-M1's way from 40K to 80K tokens (arXiv 2506.13585, section 5).

A run begins with the smallest window and goes up when two gates hold at once: the perplexity of what is sampled has
converged, and the longest completions have come near the window. So a policy that still learns to use its room is not
given more, and one that does not need more never gets it. The stage and what the gates remember are part of a
checkpoint.

A step keeps the window that its prompts were handed out with. Where sampling runs ahead (rollout.max_off_policy_steps),
steps that come in after a window has opened may still have the one before, and say nothing of the new one: they feed no
gate.

Everything else that knows a limit has the last window, rollout.max_completion_tokens, in every stage: evaluations, the
engine's caches and the estimate of its memory, `max_completion_tokens` of rewards, the constant of Dr. GRPO. So scores
and gradients mean the same in all of them, and no penalty of length works against a gate. What is cut off at its window
is truncated.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cispo.errors import CheckpointError
from cispo.recipe.rollout_schema import LengthWindowSettings
from cispo.types import ScoredGroup


class LengthWindows:
    """The window of prompts that are handed out; `record` takes what a step has sampled, and may open the next.

    last_tokens: of the last window, rollout.max_completion_tokens.
    """

    def __init__(self, settings: LengthWindowSettings, last_tokens: int) -> None:
        self._settings = settings
        self._windows = (*settings.tokens, last_tokens)
        self._stage = 0
        self._perplexities: list[float] = []

    @property
    def tokens(self) -> int:
        """New tokens that a completion of a prompt handed out from now on may have."""
        return self._windows[self._stage]

    def record(self, groups: Sequence[ScoredGroup], window_tokens: int) -> dict[str, float]:
        """Take a step's groups; returns the metrics of their lengths, nothing without groups.

        window_tokens: the window that the step's prompts were handed out with; an earlier one feeds no gate.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        if not rollouts:
            return {}
        logprobs = np.concatenate([rollout.logprobs_T[rollout.loss_mask_T] for rollout in rollouts])
        perplexity = math.exp(-float(logprobs.mean(dtype=np.float64)))
        lengths = [rollout.completion_length_tokens for rollout in rollouts]
        longest = float(np.quantile(lengths, 0.99, method="higher"))
        if window_tokens == self.tokens:
            self._ask_gates(perplexity, longest)
        return {
            "completion/window_tokens": float(window_tokens),
            "completion/perplexity": perplexity,
            "completion/length_tokens/p99": longest,
        }

    def _ask_gates(self, perplexity: float, longest: float) -> None:
        """Open the next window where both hold. longest: the 99th percentile of a step's lengths, in tokens."""
        self._perplexities = [*self._perplexities, perplexity][-self._settings.steps :]
        is_near = longest >= self._settings.near * self.tokens
        if self._stage + 1 < len(self._windows) and is_near and self._has_converged():
            self._stage += 1
            self._perplexities = []

    def _has_converged(self) -> bool:
        """Whether the newer half of the steps that are looked at differs little from the older."""
        count = self._settings.steps
        if len(self._perplexities) < count:
            return False
        older, newer = self._perplexities[: count // 2], self._perplexities[-(count // 2) :]
        before, now = sum(older) / len(older), sum(newer) / len(newer)
        return abs(now - before) <= self._settings.perplexity_change * before

    def state_dict(self) -> dict[str, Any]:
        return {"window_tokens": self.tokens, "perplexities": list(self._perplexities)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; without one, at the first window."""
        if not state:
            self._stage, self._perplexities = 0, []
            return
        if state["window_tokens"] not in self._windows:
            raise CheckpointError(
                f"the checkpoint is in a window of {state['window_tokens']} tokens, the recipe has "
                f"{', '.join(map(str, self._windows))}; resume with rollout.length_windows as it was"
            )
        self._stage = self._windows.index(state["window_tokens"])
        self._perplexities = [float(value) for value in state["perplexities"]]
