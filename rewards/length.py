"""The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13).

With L the completion's length in tokens, L_max the limit and L_cache the width of the slope before it:

    0                                   L <= L_max - L_cache
    ((L_max - L_cache) - L) / L_cache   L_max - L_cache < L <= L_max
    -1                                  L_max < L
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LengthArgs(BaseModel):
    """What `args` of the reward `length` may hold."""

    model_config = ConfigDict(extra="forbid", strict=True)

    cache_tokens: int = Field(gt=0)
    """Width of the slope, in tokens."""
    max_tokens: int | None = Field(default=None, gt=0)
    """The limit, in tokens; by default the recipe's rollout.max_completion_tokens, the last of its length_windows.

    A slope before an earlier window would hold completions back from it, and the next might never open.
    """

    @model_validator(mode="after")
    def _slope_fits(self) -> Self:
        if self.max_tokens is not None and self.cache_tokens > self.max_tokens:
            raise ValueError(f"cache_tokens ({self.cache_tokens}) must be at most max_tokens ({self.max_tokens})")
        return self


def length(
    prompt: str,
    completion: str,
    *,
    completion_length_tokens: int,
    max_completion_tokens: int,
    cache_tokens: int,
    max_tokens: int | None = None,
) -> float:
    """The penalty, from -1 to 0; to be added to other rewards."""
    limit = max_completion_tokens if max_tokens is None else max_tokens
    if cache_tokens > limit:
        raise ValueError(f"cache_tokens ({cache_tokens}) must be at most the limit of {limit} tokens")
    if completion_length_tokens > limit:
        return -1.0
    return min(0.0, (limit - cache_tokens - completion_length_tokens) / cache_tokens)
