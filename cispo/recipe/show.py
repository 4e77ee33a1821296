"""What `--dry-run` prints: every setting with the place it comes from, and what the run will do and need."""

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from cispo.memory import count_parameters, learner_bytes, run_memory, size_text, this_machine
from cispo.placement import Placement
from cispo.recipe.document import SectionNode, SettingPath
from cispo.recipe.load import LoadedRecipe
from cispo.recipe.rollout_schema import RolloutSettings
from cispo.recipe.schema import TrainRecipe
from cispo.recipe.sft_schema import SftRecipe
from cispo.recipe.validate import is_written, origin_of
from cispo.resources import resolve_policy
from cispo.run_folder import plain_settings

COLUMN = 56


def annotated_yaml(loaded: LoadedRecipe[TrainRecipe] | LoadedRecipe[SftRecipe]) -> str:
    """The resolved recipe as YAML, each value with its origin: `default`, `file:line` or `command line`."""
    return "\n".join(_section_lines(loaded.recipe, loaded.written, (), 0))


def train_plan(recipe: TrainRecipe) -> str:
    """What a step does, which actors there are and the memory that they need at least."""
    rollout, learner = recipe.rollout, recipe.learner
    completions = rollout.prompts_per_step * rollout.group_size
    rows = [
        ("steps", f"{recipe.steps}"),
        ("a step samples", f"{completions:,} completions ({rollout.prompts_per_step} prompts x {rollout.group_size})"),
        ("tokens a step", f"at most {completions * rollout.max_completion_tokens:,} in completions{_windows(rollout)}"),
        ("updates a step", f"{learner.updates_per_step}, so {learner.updates_per_step * recipe.steps:,} in the run"),
        ("evaluations", _evaluations(recipe)),
        ("actors", f"{rollout.workers} rollout, {recipe.sandbox.workers} reward, {_learner(recipe)}"),
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
        held = learner_bytes(parameters, recipe.policy.dtype)
        rows += [("policy", f"{parameters:,} parameters"), ("memory", _learner_memory(held))]
    return _table(rows)


def _memory_rows(recipe: TrainRecipe) -> list[tuple[str, str]]:
    memory, rollout = run_memory(recipe, this_machine()), recipe.rollout
    is_shared = memory.placement.colocated
    weights = "the learner's weights" if is_shared else f"{size_text(memory.engine_weights)} of weights"
    tokens = rollout.max_prompt_tokens + rollout.max_completion_tokens
    sequences = f"{rollout.max_concurrent_completions:,} sequences of {tokens:,} tokens"
    each = f", in each of {rollout.workers}" if rollout.workers > 1 else ""
    rows = [
        ("broadcast", _broadcast(memory.placement)),
        ("policy", f"{memory.parameters:,} parameters in {recipe.policy.dtype}"),
        ("memory, learner", _learner_memory(memory.learner, recipe.resources.learner_ranks)),
        ("memory, rollout", f"{weights}, {size_text(memory.engine_caches)} of caches for {sequences}{each}"),
    ]
    if memory.reference:
        rows.append(("memory, reference", f"{size_text(memory.reference)} of weights"))
    return rows


def _learner(recipe: TrainRecipe) -> str:
    """The learner and its ranks, where there are several."""
    ranks, together = recipe.resources.learner_ranks, recipe.resources.expert_parallel
    if ranks == 1:
        return "1 learner"
    experts = f", each layer's experts shared by {together}" if together > 1 else ""
    return f"1 learner of {ranks} ranks over which its weights are sharded{experts}"


def _broadcast(placement: Placement) -> str:
    if placement.colocated:
        return "none: engine and learner share one copy of the weights"
    if placement.links:
        return f"through a link to each rollout worker ({'NCCL' if placement.rollout_places else 'gloo'})"
    return "through Ray's object store"


def _learner_memory(held: int, ranks: int = 1) -> str:
    each = f", {size_text(-(-held // ranks))} in each rank" if ranks > 1 else ""
    return f"{size_text(held)} of weights, gradients and optimiser{each}; activations of one micro batch on top"


def _windows(rollout: RolloutSettings) -> str:
    if rollout.length_windows is None:
        return ""
    *earlier, last = (*rollout.length_windows.tokens, rollout.max_completion_tokens)
    return f"; of each at most {', '.join(f'{tokens:,}' for tokens in earlier)} and then {last:,}"


def _evaluations(recipe: TrainRecipe) -> str:
    if recipe.evaluation is None:
        return "none"
    every = recipe.evaluation.every_steps
    between = f", and every {every} steps" if every else ""
    return f"{' and '.join(recipe.evaluation.sets)}: before the first step and after the last one{between}"


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
