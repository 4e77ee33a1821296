"""How the learner turns a generation batch into updates; loads neither torch nor ray."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Schedule = Literal["constant", "linear", "cosine"]


class LearnerSettings(BaseModel):
    """Updates, optimiser (AdamW on float32 master weights) and packing.

    The defaults of `betas` and `eps` are MiniMax-M1's (arXiv 2506.13585, section 3.2): most gradients of such a model
    are below 1e-14, where the usual eps of 1e-8 would stop all learning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    warmup_updates: int = Field(default=0, ge=0)
    """Updates over which the learning rate rises linearly to its peak."""
    schedule: Schedule = "constant"
    """What the learning rate does after warm-up: `linear` and `cosine` fall to 0 at the run's last update."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moment, each in [0, 1)."""
    eps: float = Field(default=1e-15, gt=0, allow_inf_nan=False)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay, on parameters of two and more dimensions only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are scaled down; `.inf` switches clipping off."""
    updates_per_step: int = Field(default=1, ge=1)
    """Mini batches that a step's groups are split into, one update each, in one pass (16 in the paper)."""
    tokens_per_micro_batch: int = Field(default=8192, ge=1)
    """Tokens of one forward and backward; it bounds memory and changes no result. A longer sequence goes alone."""
    activation_checkpointing: bool = False
    """Compute each sublayer again in its backward, in place of keeping what it computed; it changes no result."""
    routing_replay: bool = False
    """Run each token through the experts that it went to while sampling; gate weights are the router's as it is now."""
    router_aux_loss_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the routers' load-balancing loss (0.001 in MiniMax-M1's configuration); 0 leaves it out."""

    @field_validator("betas")
    @classmethod
    def _betas_are_decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"must each be in [0, 1), got {list(value)}")
        return value


def scheduled_learning_rate(
    peak: float, update: int, *, warmup_updates: int, schedule: Schedule, total_updates: int
) -> float:
    """The learning rate of update number `update`, counted from 0; after `total_updates` it stays as it ended."""
    if update < warmup_updates:
        return peak * (update + 1) / warmup_updates
    if schedule == "constant":
        return peak
    progress = min(1.0, (update - warmup_updates) / max(1, total_updates - warmup_updates))
    return peak * (1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))
