"""The settings of sampling for training: the section `rollout` of a recipe."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cispo.recipe.section import Section


class ThinkingSettings(Section):
    """A budget of thinking: a completion that has not ended it by then is interrupted, and goes on with its answer.

    The tokens put in are not the policy's and carry no loss.
    """

    tokens: int = Field(ge=1)
    """Tokens of a completion after which its thinking is interrupted; MiniMax-M1 had 40,000 and 80,000."""
    end: str = Field(default="</think>", min_length=1)
    """Text that ends thinking; a completion that has it is not interrupted."""
    interruption: str = Field(
        default="Okay, time is up. Let me stop thinking and formulate a final answer now.</think>", min_length=1
    )
    """Text that is put in, what ends thinking included."""

    @model_validator(mode="after")
    def _interruption_ends_thinking(self) -> "ThinkingSettings":
        if self.end not in self.interruption:
            raise ValueError(
                f"interruption must hold {self.end!r}, which ends thinking: else the completion goes on thinking"
            )
        return self


class RepetitionSettings(Section):
    """Ends a completion that goes round in circles; it counts as truncated (MiniMax-M1 report, section 4.2)."""

    tokens: int = Field(default=3000, ge=1)
    """Tokens in a row that must be almost certain."""
    probability: float = Field(default=0.99, gt=0, lt=1)
    """Probability above which a token is almost certain."""


class LengthWindowSettings(Section):
    """Windows that completions of training grow through (cispo/length_windows.py); all else goes by the last."""

    tokens: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """New tokens that a completion may have, stage by stage, rising; the last stage is `max_completion_tokens`."""
    steps: int = Field(default=10, ge=2)
    """Steps whose perplexity is looked at, the newer half against the older."""
    perplexity_change: float = Field(default=0.02, gt=0, allow_inf_nan=False)
    """Relative difference between the two halves up to which perplexity has converged."""
    near: float = Field(default=0.9, gt=0, le=1)
    """Share of the window that the 99th percentile of lengths must have reached."""


class RolloutSettings(Section):
    """How completions are sampled for training."""

    prompts_per_step: int = Field(ge=1)
    """Prompts of one generation batch."""
    group_size: int = Field(default=8, ge=1)
    """Completions sampled for each prompt, at least 2: advantages compare them with each other."""
    max_prompt_tokens: int = Field(default=512, ge=1)
    """Tokens of the longest prompt, chat template included; a longer one is refused at the start."""
    max_completion_tokens: int = Field(ge=1)
    """Tokens after which a completion is cut off."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divides the logits, while sampling and in the learner's logprobs alike."""
    top_p: float = 1.0
    """Nucleus; training samples from the whole distribution, so only 1 is accepted."""
    top_k: int = 0
    """Most likely tokens kept; only 0 (all) is accepted."""
    min_p: float = 0.0
    """Least probability relative to the likeliest token; only 0 is accepted."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a completion, in training and evaluation; rewards see the text before the one that did."""
    thinking: ThinkingSettings | None = None
    """Interrupts long thinking, in training and evaluation; null never does."""
    repetition: RepetitionSettings | None = None
    """Ends repetitive completions, in training and evaluation; null never does, `{}` has MiniMax-M1's rule."""
    workers: int = Field(default=1, ge=1)
    """Rollout actors; each holds a copy of the policy and samples its share of a step's groups."""
    max_concurrent_completions: int = Field(default=256, ge=1)
    """Completions that one rollout actor decodes at a time; it bounds memory and changes no result."""
    max_off_policy_steps: int = Field(default=0, ge=0)
    """Training steps that sampling may run ahead of the learner, its weights updated in flight; 0 is synchronous."""
    length_windows: LengthWindowSettings | None = None
    """Smaller limits that training begins with, as MiniMax-M1 did; null has `max_completion_tokens` from the start."""
    caches_after_update: Literal["keep", "recompute"] = "keep"
    """What completions under way do when weights change: go on from the states they have, or read all again."""
    drop_solved_at: float | None = Field(default=None, gt=0, le=1)
    """Pass rate of a prompt's group from which on later passes over the data leave it out (ScaleRL: 0.9)."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds to wait for a step's completions before the run ends with an error."""

    @field_validator("group_size")
    @classmethod
    def _group_has_siblings(cls, value: int) -> int:
        if value < 2:
            raise ValueError(
                f"must be at least 2, got {value}: an advantage is a difference from the group's mean, "
                "which is always 0 for a single completion"
            )
        return value

    @field_validator("top_p", "top_k", "min_p")
    @classmethod
    def _samples_whole_distribution(cls, value: float, info: object) -> float:
        name = getattr(info, "field_name", "")
        neutral = 1 if name == "top_p" else 0
        if value != neutral:
            raise ValueError(
                f"must be {neutral} in training, got {value:g}: sampling from a cut distribution makes every "
                "importance ratio wrong, since the learner's logprobs are those of the whole one; use temperature"
            )
        return value

    @property
    def first_limit(self) -> tuple[str, int]:
        """New tokens that a completion of training may have at the start of a run, and the setting that says so."""
        if self.length_windows is None:
            return "max_completion_tokens", self.max_completion_tokens
        return "length_windows.tokens.0", self.length_windows.tokens[0]

    @model_validator(mode="after")
    def _windows_rise(self) -> "RolloutSettings":
        if self.length_windows is not None:
            windows = [*self.length_windows.tokens, self.max_completion_tokens]
            if any(later <= earlier for earlier, later in pairwise(windows)):
                raise ValueError(
                    f"length_windows.tokens are {list(self.length_windows.tokens)} with max_completion_tokens "
                    f"{self.max_completion_tokens}, which is the last window; each must be larger than the one before"
                )
        return self

    @model_validator(mode="after")
    def _budget_leaves_room(self) -> "RolloutSettings":
        name, least = self.first_limit
        if self.thinking is not None and self.thinking.tokens >= least:
            raise ValueError(
                f"thinking.tokens is {self.thinking.tokens} with {name} {least}: nothing would be left for an answer; "
                "lower the former or raise the latter"
            )
        return self
