"""Every setting of `cispo sft`: supervised training on prompts with their completions."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cispo.data import DataSettings
from cispo.learner_settings import Schedule
from cispo.recipe.schema import LoggingSettings, RunName, Seed
from cispo.recipe.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class SftPolicySettings(Section):
    """The policy that supervised training starts from."""

    path: str = Field(min_length=1)
    """Policy folder with `config.json` and `tokenizer.json`, or `bundled:tiny`."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` takes the folder's architecture and tokenizer and draws new weights from the seed."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the compute weights; master weights, reductions and logits are float32 in either case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a device, else the CPU."""


class SftLearnerSettings(Section):
    """Optimiser (AdamW on float32 master weights) and its learning rate."""

    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    warmup_updates: int = Field(default=0, ge=0)
    """Updates (one a step) over which the learning rate rises linearly to its peak."""
    schedule: Schedule = "cosine"
    """What the learning rate does after warm-up: `linear` and `cosine` fall to 0 at the last step."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of AdamW's first and second moment, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay, on parameters of two and more dimensions only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Global gradient norm above which gradients are scaled down; `.inf` switches clipping off."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Tokens of one forward and backward; it bounds memory and changes no result."""
    router_aux_loss_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the routers' load-balancing loss (0.001 in MiniMax-M1's configuration); 0 leaves it out."""


class SftEvaluationSettings(Section):
    """Loss on rows that are not trained on."""

    data: DataSettings
    """Rows with the columns `prompt` and `completion`."""
    every_steps: int = Field(default=100, ge=1)
    """Steps between two evaluations; the last step is always evaluated."""


class SftCheckpointSettings(Section):
    """When training is saved so that it can be resumed."""

    every_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints."""


class SftRecipe(Section):
    """A whole supervised run; its result is a policy folder."""

    name: RunName
    """Name of the run and of its folder under `runs/`: letters, digits, dot, dash and underscore."""
    seed: Seed = 0
    """Seed of the order of rows and of random weights."""
    steps: int = Field(ge=1)
    """Updates of the weights."""
    tokens_per_batch: int = Field(ge=1)
    """Tokens of one update, prompts and completions together; rows are packed up to it."""
    policy: SftPolicySettings
    data: DataSettings
    """Rows with the columns `prompt` and `completion`; the loss is on the completion only."""
    learner: SftLearnerSettings
    evaluation: SftEvaluationSettings | None = None
    """Null measures nothing."""
    checkpoint: SftCheckpointSettings = SftCheckpointSettings()
    logging: LoggingSettings = LoggingSettings()
    output: Path
    """Policy folder to write at the end; it must not exist, or must be the one a resumed run was writing."""
    base_path: Path = Path(".")
    """Folder that relative paths in the recipe start from, before the working one; the recipe's own if not set."""
