"""Every setting of `cispo train` and `cispo eval`, with its unit, range and default; loads neither torch nor ray.

Sections that belong to one room are declared beside it and only put together here.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cispo.advantage import AdvantageSettings
from cispo.data import DataSettings
from cispo.learner_settings import LearnerSettings
from cispo.metric_table import find_metric
from cispo.objective_settings import CispoSettings, ObjectiveSettings
from cispo.recipe.rollout_schema import RolloutSettings
from cispo.recipe.section import Section
from cispo.rewards.settings import RewardSettings
from cispo.sandboxes.settings import SandboxSettings

FIRST_SET = "heldout"
"""The name in metrics of the set that the section `evaluation` itself names: eval/heldout/..."""
SET_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")

RunName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class PolicySettings(Section):
    """The policy that a run starts from."""

    path: str = Field(min_length=1)
    """Policy folder in Hugging Face layout, or `bundled:tiny` for the one that comes with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the compute weights; master weights, reductions and logits are float32 in either case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a device, else the CPU."""


class HeldoutSettings(Section):
    """A set of prompts that is measured, and how its completions are sampled."""

    data: DataSettings
    """Prompts that are measured on; keep them apart from those trained on."""
    completions_per_prompt: int = Field(default=1, ge=1)
    """Completions sampled for each prompt."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divides the logits while sampling."""
    by: str | None = Field(default=None, min_length=1)
    """A column of the data, such as `part`; everything is also measured over the prompts of each of its values."""
    pass_at: tuple[int, ...] = ()
    """Further k that pass@k is estimated for, up to completions_per_prompt; 1 and that number are given always."""

    @model_validator(mode="after")
    def _completions_suffice(self) -> "HeldoutSettings":
        for k in self.pass_at:
            if not 1 <= k <= self.completions_per_prompt:
                raise ValueError(
                    f"pass_at has {k} with completions_per_prompt {self.completions_per_prompt}: pass@k is estimated "
                    "from at least k completions of a prompt; lower the former or raise the latter"
                )
        return self


class EvaluationSettings(HeldoutSettings):
    """How the policy is measured: the share of completions that get the full reward, with a 95% interval.

    The set of this section is `heldout` in metrics; the best checkpoint is the one that is best in it, unless told
    otherwise.
    """

    every_steps: int = Field(default=0, ge=0)
    """Steps between two evaluations; 0 evaluates before the first step and after the last one only."""
    also: dict[str, HeldoutSettings] = Field(default={})
    """Further sets that are measured beside it, each by the name that its metrics have: eval/NAME/pass@1."""

    @field_validator("also")
    @classmethod
    def _names_are_of_metrics(cls, also: dict[str, HeldoutSettings]) -> dict[str, HeldoutSettings]:
        for name in also:
            if not SET_NAME.fullmatch(name) or name == FIRST_SET:
                raise ValueError(
                    f"the name {name!r} cannot stand in a metric; take letters, digits, dash and underscore, "
                    f"and not {FIRST_SET}, which is the first set's"
                )
        return also

    @property
    def sets(self) -> dict[str, HeldoutSettings]:
        """All that is measured, by name, the first set first."""
        return {FIRST_SET: self, **self.also}


class CheckpointSettings(Section):
    """When the run is saved so that it can be resumed."""

    every_steps: int = Field(default=1, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept; 2 leaves one to go back to if the newest is damaged."""
    keep_best: str | None = None
    """A metric, such as `eval/heldout/pass@1`; the checkpoint where it was highest is saved and kept as well."""

    @field_validator("keep_best")
    @classmethod
    def _is_a_metric(cls, value: str | None) -> str | None:
        if value is not None and find_metric(value) is None:
            raise ValueError(f"there is no metric {value!r}; docs/metrics.md has them all, such as eval/heldout/pass@1")
        return value


class LoggingSettings(Section):
    """What a person sees of a run; `metrics.jsonl` in the run folder is written in any case."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases: `offline` needs no account and writes into the run folder."""
    wandb_project: str = Field(default="cispo", min_length=1)
    """Project that the run appears under."""
    console: Literal["auto", "live", "lines"] = "auto"
    """`live` is a panel for a terminal, `lines` prints one line a step, `auto` looks where the output goes."""


class RaySettings(Section):
    """The Ray cluster that the actors run on."""

    address: str | None = None
    """Address of a running cluster (`auto` finds one on this machine); null starts a local one and stops it again."""
    dashboard: bool = True
    """Serve the dashboard of a local cluster on this machine."""
    start_timeout_s: float = Field(default=180.0, gt=0)
    """Seconds to wait for Ray and all actors to be ready."""
    call_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds to wait for one call of an actor, such as a training step or a broadcast."""


class ResourcesSettings(Section):
    """Which processes share what."""

    placement: Literal["auto", "colocated", "split"] = "auto"
    """`colocated` has engine and learner in one process over one copy of the weights, which `auto` takes on one GPU."""
    learner_ranks: int = Field(default=1, ge=1)
    """Processes that the learner and its weights are spread over; on GPUs each has one of its own."""
    expert_parallel: int = Field(default=1, ge=1)
    """Learner ranks that share the experts of a layer; it must divide learner_ranks and the number of experts."""
    broadcast: Literal["auto", "links", "object_store"] = "auto"
    """`links` send weights from learner to workers directly, which `auto` takes where they have GPUs apart."""


class TrainRecipe(Section):
    """A whole reinforcement-learning run."""

    name: RunName
    """Name of the run and of its folder under `runs/`: letters, digits, dot, dash and underscore."""
    seed: Seed = 0
    """Seed of everything that is random in a run."""
    steps: int = Field(ge=1)
    """Training steps: sample, score, train, broadcast."""
    policy: PolicySettings
    data: DataSettings
    """Prompts that are trained on."""
    rollout: RolloutSettings
    rewards: tuple[RewardSettings, ...] = Field(min_length=1)
    """Rewards whose weighted sum is the score of a completion."""
    sandbox: SandboxSettings = SandboxSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    objective: ObjectiveSettings = CispoSettings()
    learner: LearnerSettings
    evaluation: EvaluationSettings | None = None
    """Null measures nothing."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    logging: LoggingSettings = LoggingSettings()
    resources: ResourcesSettings = ResourcesSettings()
    ray: RaySettings = RaySettings()
    base_path: Path = Path(".")
    """Folder that relative paths in the recipe start from, before the working one; the recipe's own if not set."""

    @model_validator(mode="after")
    def _updates_have_prompts(self) -> "TrainRecipe":
        if self.learner.updates_per_step > self.rollout.prompts_per_step:
            raise ValueError(
                f"learner.updates_per_step is {self.learner.updates_per_step} with rollout.prompts_per_step "
                f"{self.rollout.prompts_per_step}: a step's groups are split among its updates and each needs one; "
                "lower the former or raise the latter"
            )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> "TrainRecipe":
        best = self.checkpoint.keep_best
        if best is None or not best.startswith("eval/"):
            return self
        if self.evaluation is None:
            raise ValueError(
                f"checkpoint.keep_best is {best} but evaluation is null: nothing measures it; name evaluation.data"
            )
        # A part of a set, by `evaluation.by`, has a name after a dot.
        name = best.split("/")[1].partition(".")[0]
        if name not in self.evaluation.sets:
            raise ValueError(
                f"checkpoint.keep_best is {best} but no set that is measured has that name; there is "
                f"{', '.join(self.evaluation.sets)}"
            )
        return self

    @model_validator(mode="after")
    def _colocated_is_one_process(self) -> "TrainRecipe":
        resources = self.resources
        settings = {"rollout.workers": self.rollout.workers, "resources.learner_ranks": resources.learner_ranks}
        for name, processes in settings.items():
            if resources.placement == "colocated" and processes > 1:
                raise ValueError(
                    f"resources.placement is colocated with {name} {processes}: engine and learner share one process; "
                    f"set {name} to 1, or placement to split"
                )
        if resources.placement == "colocated" and resources.broadcast != "auto":
            raise ValueError(
                f"resources.placement is colocated with resources.broadcast {resources.broadcast}: engine and learner "
                "share one copy of the weights, so nothing is broadcast; set broadcast to auto, or placement to split"
            )
        return self

    @model_validator(mode="after")
    def _ranks_make_groups(self) -> "TrainRecipe":
        resources = self.resources
        if resources.learner_ranks % resources.expert_parallel:
            raise ValueError(
                f"resources.expert_parallel is {resources.expert_parallel} with resources.learner_ranks "
                f"{resources.learner_ranks}: so many ranks share the experts of a layer; it must divide the latter"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit_a_worker(self) -> "TrainRecipe":
        limit = self.rollout.max_concurrent_completions
        sizes = {"rollout.group_size": self.rollout.group_size}
        if self.evaluation is not None:
            sizes["evaluation.completions_per_prompt"] = self.evaluation.completions_per_prompt
            for name, further in self.evaluation.also.items():
                sizes[f"evaluation.also.{name}.completions_per_prompt"] = further.completions_per_prompt
        for name, size in sizes.items():
            if size > limit:
                raise ValueError(
                    f"{name} is {size} with rollout.max_concurrent_completions {limit}: the completions of a prompt "
                    "are sampled together; lower the former or raise the latter"
                )
        return self
