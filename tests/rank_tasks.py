"""What the ranks of `test_parallel.py` do, in processes of their own: this file is imported there."""

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from cispo.advantage import AdvantageSettings
from cispo.checkpoint import load_checkpoint, write_checkpoint
from cispo.learner import Learner
from cispo.learner_settings import LearnerSettings
from cispo.model.checkpoint import save_policy
from cispo.model.config import LIGHTNING, SOFTMAX
from cispo.model.decoder import Decoder
from cispo.objective_settings import ObjectiveSettings
from cispo.parallel.parallelise import local
from cispo.parallel.ranks import ALONE, Ranks, RankSettings
from cispo.types import ScoredGroup
from tests.test_learner import CONFIG, TEMPERATURE, sampled_groups, shifted

HYBRID = replace(
    CONFIG,
    mixers=(LIGHTNING, LIGHTNING, SOFTMAX),
    expert_width=32,
    dense_layers=(1,),
    dense_width=48,
    tie_embeddings=False,
)
STEPS, UPDATES_PER_STEP = 5, 2


def hybrid(**changes: Any) -> Decoder:
    decoder = Decoder(replace(HYBRID, **changes))
    decoder.initialise(0)
    return decoder


def learner(
    ranks: Ranks = ALONE, objective: dict[str, Any] | None = None, tied: bool = False, **settings: Any
) -> Learner:
    parsed = TypeAdapter[ObjectiveSettings](ObjectiveSettings).validate_python(objective or {"name": "cispo"})
    given = {"learning_rate": 1e-3, "updates_per_step": UPDATES_PER_STEP, "tokens_per_micro_batch": 100, **settings}
    # With M1's epsilon AdamW moves a weight whose gradient is rounding error as far as any other.
    return Learner(
        hybrid(tie_embeddings=tied),
        objective=parsed,
        advantage=AdvantageSettings(),
        settings=LearnerSettings.model_validate({"eps": 1e-6, **given}),
        temperature=TEMPERATURE,
        max_completion_tokens=80,
        total_updates=100,
        seed=7,
        reference=hybrid(tie_embeddings=tied).requires_grad_(False) if parsed.needs_reference else None,
        ranks=ranks,
    )


@cache
def groups_of(step: int) -> list[ScoredGroup]:
    return shifted(sampled_groups(hybrid(), 4, seed=step), 0.1)


@dataclass(frozen=True)
class Task:
    """Train from step `first` on to before `last`, from the checkpoint that another task left if it is named."""

    name: str
    expert_parallel: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    first: int = 0
    last: int = STEPS
    resumed: str | None = None


@dataclass
class Outcome:
    """What the first rank has after a task: whole weights, the metrics of each rank, the weights that each holds."""

    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    metrics: list[list[dict[str, float]]]
    held: list[int]


def run_task(task: Task, ranks: Ranks, folder: Path) -> Outcome | None:
    """The outcome, on the first rank; a checkpoint of it is in the folder, under the task's name."""
    subject = learner(ranks, **task.settings)
    if task.resumed is not None:
        subject.load_state_dict(load_checkpoint(_checkpoint(folder, task.resumed)).learner_state)
    metrics = [subject.train(groups_of(step), step) for step in range(task.first, task.last)]
    weights, state, whole = subject.policy_tensors(), subject.state_dict(), subject.whole_policy()
    held = sum(local(parameter).numel() for parameter in subject.decoder.parameters())
    of_ranks = ranks.gather_objects((metrics, held))
    assert bool(weights) == bool(state) == (whole is not None) == (ranks.rank == 0)
    if whole is None:
        return None
    write_checkpoint(
        _checkpoint(folder, task.name),
        write_policy=lambda path: save_policy(whole, path),
        learner_state=state,
        loop_state={},
    )
    weights = {name: weight.clone() for name, weight in weights.items()}
    return Outcome(weights, state, [metrics for metrics, _ in of_ranks], [held for _, held in of_ranks])


def _checkpoint(folder: Path, name: str) -> Path:
    return folder / name / "step_000001"


def run_rank(rank: int, world_size: int, folder: Path, tasks: list[Task]) -> None:
    """Join the others for each task, do it, and leave what the first rank has then in a file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for task in tasks:
        settings = RankSettings(rank, world_size, f"file://{folder / task.name}.meeting", task.expert_parallel, 60.0)
        ranks = Ranks.join(settings, torch.device("cpu"))
        outcome = run_task(task, ranks, folder)
        if outcome is not None:
            torch.save(outcome, folder / f"{task.name}.pt")
        ranks.leave()
