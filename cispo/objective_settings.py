"""Which objective trains the policy, and with which numbers; loads neither torch nor ray.

Bounds on the importance ratio are absolute (`ratio_max: 5.0` caps the ratio at 5), never `1 + epsilon`, and the policy
in the ratio's denominator is named: `rollout` is the policy that sampled the token, `proximal` is the learner's policy
before the first update on the generation batch. The rules themselves are in `cispo/objective.py`.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Anchor = Literal["rollout", "proximal"]
Correction = Literal["none", "truncated", "masked"]
Reduction = Literal["token", "prompt", "sample", "mixed", "constant"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kl_coefficient: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the KL penalty to the frozen reference policy (the run's first weights); 0 switches it off."""

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient > 0

    @property
    def needs_proximal(self) -> bool:
        return getattr(self, "anchor", None) == "proximal"


class _AnchoredSettings(_Settings):
    """What has an importance ratio: the policy in its denominator, and the step from the rollout policy to that one.

    With the anchor `proximal` the ratio leaves out what lies between the rollout policy and the learner's before its
    first update: tokens of older versions, and arithmetic that differs. A correction weighs a token by proximal over
    rollout policy, and no gradient flows through it.
    """

    anchor: Anchor = "rollout"
    """Policy in the ratio's denominator."""
    rollout_correction: Correction = "none"
    """With anchor `proximal`: `truncated` caps that weight, `masked` leaves out tokens where it is out of bounds."""
    rollout_correction_min: float | None = None
    """Least weight of a token that is not masked, in (0, 1]; null is 0.5."""
    rollout_correction_max: float | None = None
    """Cap of the weight, or with `masked` the largest of a token that stays; at least 1; null is 2, with `masked` 5."""

    @property
    def correction_bounds(self) -> tuple[float, float]:
        """Least and largest weight; (0, max) where it is truncated."""
        is_masked = self.rollout_correction == "masked"
        low, high = (0.5, 5.0) if is_masked else (0.0, 2.0)
        given_low, given_high = self.rollout_correction_min, self.rollout_correction_max
        return (low if given_low is None else given_low), (high if given_high is None else given_high)

    @field_validator("rollout_correction_max")
    @classmethod
    def _largest_is_at_least_one(cls, value: float | None) -> float | None:
        if value is not None and not value >= 1:
            raise ValueError(f"must be at least 1 or null, got {value:g}: a token of the newest weights has weight 1")
        return value

    @field_validator("rollout_correction_min")
    @classmethod
    def _least_is_at_most_one(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"must be in (0, 1] or null, got {value:g}: a token of the newest weights has weight 1")
        return value

    @model_validator(mode="after")
    def _counts_once(self) -> Self:
        if self.rollout_correction == "none":
            given = [name for name in ("min", "max") if getattr(self, f"rollout_correction_{name}") is not None]
            if given:
                raise ValueError(f"rollout_correction_{given[0]} does nothing while rollout_correction is none")
        elif self.anchor == "rollout":
            raise ValueError(
                f"rollout_correction is {self.rollout_correction} with anchor rollout: the ratio to the rollout policy "
                "is in the objective already and would count twice; set anchor to proximal, or the correction to none"
            )
        if self.rollout_correction == "truncated" and self.rollout_correction_min is not None:
            raise ValueError("rollout_correction_min is for rollout_correction masked; truncated has a cap alone")
        return self


class CispoSettings(_AnchoredSettings):
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5) with the optional token mask of its eq. 6 and 7."""

    name: Literal["cispo"] = "cispo"
    ratio_max: float = 5.0
    """Cap on the importance ratio, absolute, at least 1; `.inf` removes it."""
    ratio_min: float = 0.0
    """Floor of the importance ratio, absolute, in [0, 1]; above 0 only with `mask_ratio_low`."""
    reduction: Literal["token", "prompt", "sample", "mixed"] = "prompt"
    """How tokens are averaged over a mini batch; `prompt` is eq. 4 as printed, `token` is what most code bases do."""
    mixed_sample_weight: float | None = Field(default=None, ge=0, le=1)
    """Share of the sample mean in the `mixed` reduction (the rest is the token mean); null with every other one."""
    mask_ratio_low: float | None = None
    """Mask of eq. 7: a negative advantage and a ratio below this give no gradient; in (0, 1], null is off."""
    mask_ratio_high: float | None = None
    """Mask of eq. 7: a positive advantage and a ratio above this give no gradient; at least 1, null is off."""

    @field_validator("ratio_max")
    @classmethod
    def _cap_is_at_least_one(cls, value: float) -> float:
        if not value >= 1:
            raise ValueError(
                f"must be at least 1, got {value:g}: it is the absolute cap on the ratio (not epsilon), "
                f"and a cap below 1 shrinks every on-policy token; for 1 + epsilon = {1 + value:g} write {1 + value:g}"
            )
        return value

    @field_validator("ratio_min")
    @classmethod
    def _floor_is_at_most_one(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError(f"must be in [0, 1], got {value:g}: it is the absolute floor of the ratio; 0 is no floor")
        return value

    @field_validator("mask_ratio_low")
    @classmethod
    def _low_mask_is_at_most_one(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"must be in (0, 1] or null, got {value:g}: it masks tokens whose ratio fell below it")
        return value

    @field_validator("mask_ratio_high")
    @classmethod
    def _high_mask_is_at_least_one(cls, value: float | None) -> float | None:
        if value is not None and not value >= 1:
            raise ValueError(f"must be at least 1 or null, got {value:g}: it masks tokens whose ratio rose above it")
        return value

    @model_validator(mode="after")
    def _fields_agree(self) -> "CispoSettings":
        if self.ratio_min > 0 and self.mask_ratio_low is None:
            raise ValueError(
                f"ratio_min is {self.ratio_min:g} without mask_ratio_low: tokens that the policy has left keep being "
                "pushed away with that weight and diverge without end; set ratio_min to 0 or give mask_ratio_low"
            )
        if (self.mixed_sample_weight is not None) != (self.reduction == "mixed"):
            raise ValueError(
                f"reduction is {self.reduction} and mixed_sample_weight is {self.mixed_sample_weight}: "
                "the mixed reduction needs a weight (0.5 weighs both means alike), every other one takes none"
            )
        return self


class _ClippedSettings(_AnchoredSettings):
    """Bounds of the clipped surrogate that GRPO, DAPO and Dr. GRPO share."""

    clip_low: float = 0.8
    """Lower bound of the importance ratio, absolute, in [0, 1]."""
    clip_high: float = 1.2
    """Upper bound of the importance ratio, absolute, at least 1."""

    @field_validator("clip_low")
    @classmethod
    def _low_is_at_most_one(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError(f"must be in [0, 1], got {value:g}: it is the absolute lower bound (0.8, not 0.2)")
        return value

    @field_validator("clip_high")
    @classmethod
    def _high_is_at_least_one(cls, value: float) -> float:
        if not value >= 1:
            raise ValueError(f"must be at least 1, got {value:g}: it is the absolute upper bound (1.2, not 0.2)")
        return value


class GrpoSettings(_ClippedSettings):
    """GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3): clipped surrogate, mean over a sample's tokens, then samples."""

    name: Literal["grpo"] = "grpo"

    @property
    def reduction(self) -> Reduction:
        return "sample"


class DapoSettings(_ClippedSettings):
    """DAPO (arXiv 2503.14476, eq. 8): clipped surrogate with a higher upper bound, mean over all tokens."""

    name: Literal["dapo"] = "dapo"
    clip_high: float = 1.28
    """Upper bound of the importance ratio, absolute, at least 1."""

    @property
    def reduction(self) -> Reduction:
        return "token"


class DrGrpoSettings(_ClippedSettings):
    """Dr. GRPO (arXiv 2503.20783): clipped surrogate, tokens summed and divided by a constant length.

    Its advantage has no standard deviation: set `advantage.scale: none` with it.
    """

    name: Literal["dr_grpo"] = "dr_grpo"
    normaliser_tokens: int | None = Field(default=None, ge=1)
    """Constant that each sample's token sum is divided by; null takes the recipe's `max_completion_tokens`.

    That is the last of `rollout.length_windows`, so a window that opens changes no weight of a token.
    """

    @property
    def reduction(self) -> Reduction:
        return "constant"


class ReinforceSettings(_Settings):
    """REINFORCE (Williams, 1992) with the group baseline: no importance ratio and no clipping."""

    name: Literal["reinforce"] = "reinforce"
    reduction: Literal["token", "prompt", "sample"] = "token"
    """How tokens are averaged over a mini batch."""


ObjectiveSettings = Annotated[
    CispoSettings | GrpoSettings | DapoSettings | DrGrpoSettings | ReinforceSettings, Field(discriminator="name")
]
