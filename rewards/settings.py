"""One item of the section `rewards` of a recipe."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class RewardSettings(BaseModel):
    """A reward function, its weight in the sum, and keyword arguments beyond those every reward gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    """The name of a built-in reward, such as `code`; `file.py:function`, relative to the recipe;
    `package.module:function`; or the name of an entry point of the group `cispo.rewards`."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """What the reward's value is multiplied by before the values are added."""
    args: dict[str, Any] = {}
    """Keyword arguments for the function, the same for every completion."""
    timeout_s: float = Field(default=60.0, gt=0, le=86_400)
    """Seconds that one call of a function of your own may take; the built-in rewards are bounded by the sandbox."""
