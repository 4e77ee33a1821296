"""What a recipe names must be there before any actor starts: policy folder, data, rewards."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from cispo.data import DataSettings, check_data, first_columns
from cispo.errors import CheckpointError, CispoError
from cispo.model.config import ModelConfig
from cispo.model.families import read_hf_config
from cispo.model.weight_files import missing_weights
from cispo.recipe.document import SettingPath
from cispo.recipe.schema import EvaluationSettings, TrainRecipe
from cispo.recipe.sft_schema import SftRecipe
from cispo.resources import BUNDLED, resolve_policy
from cispo.rewards.code_schemas import missing_column
from cispo.rewards.resolve import check_reward, keyword_parameters

SUPPLIED = frozenset(
    {
        "completion_length_tokens", "max_completion_tokens", "is_truncated", "judge", "judge_task", "sandbox", "limits",
    }
)  # fmt: skip
"""What a reward may take that is no column of the data: the reward worker gives it."""

FileMistake = tuple[SettingPath, str]


def train_mistakes(recipe: TrainRecipe) -> list[FileMistake]:
    """What `cispo train` would miss, each with the setting that names it."""
    routing = {"routing_replay": recipe.learner.routing_replay} | _router_loss(recipe)
    found = policy_mistakes(recipe.policy.path, recipe.base_path)
    found = found or _routing_mistakes(recipe, routing) + _expert_mistakes(recipe) + _length_mistakes(recipe)
    rewards, columns = _reward_mistakes(recipe)
    found += _prompt_mistakes(("data",), recipe.data, recipe, columns)
    if recipe.evaluation is not None:
        found += _evaluation_mistakes(recipe.evaluation, recipe, columns)
    return found + rewards


def evaluation_mistakes(recipe: TrainRecipe) -> list[FileMistake]:
    """What `cispo eval` would miss."""
    found = policy_mistakes(recipe.policy.path, recipe.base_path)
    rewards, columns = _reward_mistakes(recipe)
    if recipe.evaluation is None:
        found.append((("evaluation",), "is null; name the prompts to measure on in evaluation.data.path"))
    else:
        found += _evaluation_mistakes(recipe.evaluation, recipe, columns)
    return found + rewards


def sft_mistakes(recipe: SftRecipe) -> list[FileMistake]:
    """What `cispo sft` would miss."""
    needs_weights = recipe.policy.init == "pretrained"
    found = policy_mistakes(recipe.policy.path, recipe.base_path, needs_weights=needs_weights)
    found = found or _routing_mistakes(recipe, _router_loss(recipe))
    found += _data_mistakes(("data",), recipe.data, recipe.base_path, ["completion"])
    if recipe.evaluation is not None:
        found += _data_mistakes(("evaluation", "data"), recipe.evaluation.data, recipe.base_path, ["completion"])
    return found


def policy_mistakes(path: str, base_path: Path, *, needs_weights: bool = True) -> list[FileMistake]:
    """What a policy folder lacks; its weights are looked for, not read."""
    folder = resolve_policy(path, base_path=base_path)
    here: SettingPath = ("policy", "path")
    if not folder.is_dir():
        return [(here, _no_folder(path, folder))]
    found: list[FileMistake] = []
    if not (folder / "config.json").is_file():
        found.append((here, f"{folder} has no config.json; name a policy folder in Hugging Face layout"))
    else:
        found += [(here, text) for text in _messages(partial(_read_config, folder / "config.json"))]
    if not (folder / "tokenizer.json").is_file():
        found.append((here, f"{folder} has no tokenizer.json; copy the policy's tokenizer there"))
    if needs_weights:
        found += [(here, text) for text in _messages(partial(_find_weights, folder))]
    return found


def _find_weights(folder: Path) -> None:
    missing = missing_weights(folder)
    if missing:
        remedy = "copy the weights there, or make them with `cispo sft`"
        raise CheckpointError(f"{folder} has no weights ({', '.join(missing[:3])} missing); {remedy}")


def _no_folder(path: str, folder: Path) -> str:
    if path.startswith(BUNDLED):
        names = ", ".join(f"{BUNDLED}{entry.name}" for entry in sorted(folder.parent.glob("*"))) or "none"
        return f"no policy of that name comes with the package; there is {names}"
    return f"there is no folder {folder}; name a policy folder in Hugging Face layout, or {BUNDLED}tiny"


def _router_loss(recipe: TrainRecipe | SftRecipe) -> dict[str, bool]:
    return {"router_aux_loss_coef": recipe.learner.router_aux_loss_coef > 0}


def _routing_mistakes(recipe: TrainRecipe | SftRecipe, is_on: Mapping[str, bool]) -> list[FileMistake]:
    """Settings of the learner that ask for routers, where a policy folder in which nothing else is amiss has none."""
    folder = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    asking = [name for name, is_asked in is_on.items() if is_asked]
    if not asking or _read_config(folder / "config.json").routed_layers:
        return []
    text = f"is on, but no layer of {folder} chooses among experts; leave it out"
    return [(("learner", name), text) for name in asking]


def _expert_mistakes(recipe: TrainRecipe) -> list[FileMistake]:
    """Experts that cannot be shared among so many ranks, of a policy folder in which nothing else is amiss."""
    together = recipe.resources.expert_parallel
    if together == 1:
        return []
    folder = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    config = _read_config(folder / "config.json")
    text = f"is {together}, but "
    if not config.routed_layers:
        text += f"no layer of {folder} chooses among experts; set it to 1"
    elif config.experts % together:
        text += f"a layer of {folder} has {config.experts} experts; choose a divisor"
    else:
        return []
    return [(("resources", "expert_parallel"), text)]


def _length_mistakes(recipe: TrainRecipe) -> list[FileMistake]:
    """Lengths beyond what the policy was made for, of a folder in which nothing else is amiss."""
    folder, rollout = resolve_policy(recipe.policy.path, base_path=recipe.base_path), recipe.rollout
    limit, longest = _read_config(folder / "config.json").max_positions, rollout.max_completion_tokens
    if rollout.max_prompt_tokens + longest <= limit:
        return []
    lengths = f"is {longest} with max_prompt_tokens {rollout.max_prompt_tokens}"
    text = f"{lengths}, but {folder} was made for {limit} positions; lower one of them"
    return [(("rollout", "max_completion_tokens"), text)]


def _read_config(file: Path) -> ModelConfig:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CispoError(f"{file} is not valid JSON ({error}); restore it from its source") from error
    return read_hf_config(config)


def _data_mistakes(path: SettingPath, data: DataSettings, base_path: Path, columns: Sequence[str]) -> list[FileMistake]:
    texts = _messages(partial(check_data, data, base_path=base_path, required=columns))
    return [((*path, "path"), text) for text in texts]


def _evaluation_mistakes(
    evaluation: EvaluationSettings, recipe: TrainRecipe, columns: Sequence[str]
) -> list[FileMistake]:
    found = []
    for name, heldout in evaluation.sets.items():
        path = ("evaluation", "data") if heldout is evaluation else ("evaluation", "also", name, "data")
        grouping = [heldout.by] if heldout.by is not None else []
        found += _prompt_mistakes(path, heldout.data, recipe, [*columns, *grouping])
    return found


def _prompt_mistakes(
    path: SettingPath, data: DataSettings, recipe: TrainRecipe, columns: Sequence[str]
) -> list[FileMistake]:
    """What prompts that rewards will score lack."""
    return _data_mistakes(path, data, recipe.base_path, columns) or _task_mistakes(path, data, recipe)


def _task_mistakes(path: SettingPath, data: DataSettings, recipe: TrainRecipe) -> list[FileMistake]:
    """The columns that the reward `code` misses in the first row; it takes rows of several sets."""
    if all(reward.name != "code" for reward in recipe.rewards):
        return []
    columns = first_columns(data, base_path=recipe.base_path)
    missing = missing_column(columns) if columns is not None else None
    text = f"{missing}; the columns are {', '.join(columns or ())}"
    return [((*path, "path"), text)] if missing else []


def _reward_mistakes(recipe: TrainRecipe) -> tuple[list[FileMistake], list[str]]:
    """What is wrong with the rewards, and the columns that those in order take from each row."""
    found: list[FileMistake] = []
    columns: dict[str, None] = {}
    for index, reward in enumerate(recipe.rewards):
        try:
            function = check_reward(reward, base_path=recipe.base_path)
        except CispoError as error:
            found += [(("rewards", index, "name"), text) for text in str(error).splitlines()]
        else:
            columns |= dict.fromkeys(_columns(function, given={*reward.args, *SUPPLIED}))
    return found, list(columns)


def _columns(function: Callable[..., object], given: set[str]) -> list[str]:
    parameters = keyword_parameters(function)
    return [found.name for found in parameters if found.default is found.empty and found.name not in given]


def _messages(action: Callable[[], object]) -> list[str]:
    """The lines of the CispoError that an action raises, or nothing."""
    try:
        action()
    except CispoError as error:
        return str(error).splitlines()
    return []
