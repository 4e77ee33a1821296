"""What `--dry-run` prints: every setting with the place it comes from, and what the run will do and need."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from cispo.model.weight_files import stored_tensors, weight_files
from cispo.recipe.document import SectionNode, SettingPath
from cispo.recipe.load import LoadedRecipe
from cispo.recipe.schema import TrainRecipe
from cispo.recipe.sft_schema import SftRecipe
from cispo.recipe.validate import is_written, origin_of
from cispo.resources import resolve_policy
from cispo.run_folder import plain_settings

COLUMN = 56
BYTES = {"float32": 4, "bfloat16": 2}
MASTER_BYTES = 16
"""Bytes of the learner for one parameter: float32 master weight, gradient and AdamW's two moments."""


def annotated_yaml(loaded: LoadedRecipe[TrainRecipe] | LoadedRecipe[SftRecipe]) -> str:
    """The resolved recipe as YAML, each value with its origin: `default`, `file:line` or `command line`."""
    return "\n".join(_section_lines(loaded.recipe, loaded.written, (), 0))


def train_plan(recipe: TrainRecipe) -> str:
    """What a step does, which actors there are and the memory of weights and optimiser."""
    rollout, learner = recipe.rollout, recipe.learner
    completions = rollout.prompts_per_step * rollout.group_size
    rows = [
        ("steps", f"{recipe.steps}"),
        ("a step samples", f"{completions:,} completions ({rollout.prompts_per_step} prompts x {rollout.group_size})"),
        ("tokens a step", f"at most {completions * rollout.max_completion_tokens:,} in completions"),
        ("updates a step", f"{learner.updates_per_step}, so {learner.updates_per_step * recipe.steps:,} in the run"),
        ("evaluations", _evaluations(recipe)),
        ("actors", f"{rollout.workers} rollout, {recipe.sandbox.workers} reward, 1 learner"),
        *_memory_rows(recipe),
    ]
    return _table(rows)


def sft_plan(recipe: SftRecipe) -> str:
    """What supervised training does and the memory of weights and optimiser."""
    rows = [
        ("steps", f"{recipe.steps:,} updates of at most {recipe.tokens_per_batch:,} tokens"),
        ("tokens in all", f"at most {recipe.steps * recipe.tokens_per_batch:,}"),
        ("writes", str(recipe.output)),
    ]
    folder = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    if recipe.policy.init == "pretrained":
        parameters = count_parameters(folder)
        rows += [("policy", f"{parameters:,} parameters"), ("memory", _learner_memory(parameters, recipe.policy.dtype))]
    return _table(rows)


def count_parameters(folder: Path) -> int:
    """Parameters of a policy folder, from the headers of its safetensors files; no weights are read."""
    return sum(prod(tensor.shape) for file in weight_files(folder) for tensor in stored_tensors(file))


def _memory_rows(recipe: TrainRecipe) -> list[tuple[str, str]]:
    parameters = count_parameters(resolve_policy(recipe.policy.path, base_path=recipe.base_path))
    copy = parameters * BYTES[recipe.policy.dtype]
    rows = [
        ("policy", f"{parameters:,} parameters in {recipe.policy.dtype}"),
        ("memory, learner", _learner_memory(parameters, recipe.policy.dtype)),
        ("memory, rollout", f"{_size(copy)} of weights in each of {recipe.rollout.workers}, and the caches on top"),
    ]
    if recipe.objective.needs_reference:
        rows.append(("memory, reference", f"{_size(copy)} of weights"))
    return rows


def _learner_memory(parameters: int, dtype: str) -> str:
    compute = parameters * BYTES[dtype] if dtype != "float32" else 0
    held = _size(parameters * MASTER_BYTES + compute)
    return f"{held} of weights, gradients and optimiser; activations of one micro batch on top"


def _evaluations(recipe: TrainRecipe) -> str:
    if recipe.evaluation is None:
        return "none"
    every = recipe.evaluation.every_steps
    between = f", and every {every} steps" if every else ""
    return f"{' and '.join(recipe.evaluation.sets)}: before the first step and after the last one{between}"


def _size(count: int) -> str:
    mib = count / 2**20
    return f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:,.1f} MiB"


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _section_lines(section: BaseModel, written: SectionNode, path: SettingPath, depth: int) -> Iterator[str]:
    for name in type(section).model_fields:
        yield from _value_lines(name, getattr(section, name), written, (*path, name), depth)


def _value_lines(name: str, value: Any, written: SectionNode, path: SettingPath, depth: int) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(value, BaseModel):
        yield f"{indent}{name}:"
        yield from _section_lines(value, written, path, depth + 1)
    elif isinstance(value, dict) and any(isinstance(entry, BaseModel) for entry in value.values()):
        yield f"{indent}{name}:"
        for key, entry in value.items():
            yield from _value_lines(key, entry, written, (*path, key), depth + 1)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], BaseModel):
        yield f"{indent}{name}:"
        for index, item in enumerate(value):
            first, *rest = _section_lines(item, written, (*path, index), depth + 2)
            yield f"{indent}  - {first.lstrip()}"
            yield from rest
    else:
        origin = origin_of(written, path) if is_written(written, path) else "default"
        yield f"{indent}{name}: {_flow(value)}".ljust(COLUMN) + f"  # {origin}"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(plain_settings(value), default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("...\n").strip()
