"""What a recipe names is looked for before any actor starts, and what `--dry-run` prints."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cispo.errors import RecipeError
from cispo.memory import count_parameters
from cispo.recipe import load_sft_recipe, load_train_recipe
from cispo.recipe.load import load_evaluation, load_train
from cispo.recipe.schema import TrainRecipe
from cispo.recipe.show import annotated_yaml, train_plan
from cispo.resources import find_recipe, packaged_recipes, resolve_path, resolve_policy
from cispo.run_folder import resolved_yaml

TRAIN = """\
name: toy
steps: 3
policy:
  path: policy
data:
  path: prompts.jsonl
rollout:
  prompts_per_step: 16
  max_completion_tokens: 32
rewards:
  - name: format
learner:
  learning_rate: 1e-6
"""

SFT = """\
name: toy
steps: 3
tokens_per_batch: 64
policy: {path: policy, init: random}
data: {path: rows.jsonl}
learner: {learning_rate: 1e-3}
output: out
"""


@pytest.fixture
def place(tmp_path: Path, small_policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with recipes, policy and data, which is not the working directory."""
    home = tmp_path / "home"
    shutil.copytree(small_policy_folder, home / "policy")
    (home / "train.yaml").write_text(TRAIN)
    (home / "sft.yaml").write_text(SFT)
    row = {"id": "a", "prompt": "Write f.", "completion": "def f(): pass", "entry_point": "f", "tests": []}
    for name in ("prompts.jsonl", "rows.jsonl"):
        (home / name).write_text(json.dumps(row) + "\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home


def mistakes(recipe: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_train_recipe(recipe, overrides)
    return str(caught.value).splitlines()


def test_files_are_found_beside_the_recipe_from_any_working_directory(place: Path) -> None:
    assert load_train_recipe(place / "train.yaml").base_path == place
    assert load_sft_recipe(place / "sft.yaml").policy.init == "random"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "has no config.json; name a policy folder in Hugging Face layout"),
        ("tokenizer.json", "has no tokenizer.json; copy the policy's tokenizer there"),
        ("model.safetensors", "has no weights (model.safetensors missing); copy the weights there, or make them with"),
    ],
)
def test_policy_folder_without_a_file(place: Path, file: str, text: str) -> None:
    (place / "policy" / file).unlink()
    (line,) = mistakes(place / "train.yaml")
    assert line.startswith(f"{place}/train.yaml:4 policy.path: {place}/policy {text}")


def test_shard_that_the_index_names_is_missing(place: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (place / "policy" / "model.safetensors.index.json").write_text(json.dumps(index))
    (place / "policy" / "model.safetensors").rename(place / "policy" / "model-1.safetensors")
    (line,) = mistakes(place / "train.yaml")
    assert "has no weights (model-2.safetensors missing)" in line


def test_policy_of_another_family(place: Path) -> None:
    (place / "policy" / "config.json").write_text('{"model_type": "gpt2"}')
    (line,) = mistakes(place / "train.yaml")
    assert "model_type 'gpt2' is not supported" in line


def test_replay_needs_a_policy_with_routers(place: Path) -> None:
    assert load_train_recipe(place / "train.yaml", ["learner.routing_replay=true"]).learner.routing_replay
    config = json.loads((place / "policy" / "config.json").read_text())
    dense = config | {"model_type": "qwen3", "attention_bias": False}
    (place / "policy" / "config.json").write_text(json.dumps(dense))
    (line,) = mistakes(place / "train.yaml", "learner.routing_replay=true")
    assert line.startswith("command line learner.routing_replay: is on, but no layer of")
    (line,) = mistakes(place / "train.yaml", "learner.router_aux_loss_coef=0.001")
    assert line.startswith("command line learner.router_aux_loss_coef: is on, but no layer of")
    with pytest.raises(RecipeError, match=r"^command line learner\.router_aux_loss_coef: is on, but no layer of"):
        load_sft_recipe(place / "sft.yaml", ["learner.router_aux_loss_coef=0.001"])


def test_policy_folder_that_is_not_there(place: Path) -> None:
    (line,) = mistakes(place / "train.yaml", "policy.path=polcy")
    assert line == (
        f"command line policy.path: there is no folder {place}/polcy; "
        "name a policy folder in Hugging Face layout, or bundled:tiny"
    )
    (line,) = mistakes(place / "train.yaml", "policy.path=bundled:huge")
    assert line.startswith("command line policy.path: no policy of that name comes with the package; there is ")


def test_all_files_are_checked_at_once(place: Path) -> None:
    lines = mistakes(place / "train.yaml", "policy.path=polcy", "data.path=prompt.jsonl", "rewards.0.name=no.such:f")
    assert [line.split(":")[0] for line in lines] == [
        "command line policy.path",
        "command line data.path",
        "command line rewards.0.name",
    ]


def test_data_without_the_column(place: Path) -> None:
    (line,) = mistakes(place / "train.yaml", "data.columns={prompt: question}")
    assert "question" in line and line.startswith(f"{place}/train.yaml:6 data.path: ")


def test_data_without_what_a_reward_takes(place: Path) -> None:
    (line,) = mistakes(place / "train.yaml", "data.columns={code: entry_point}")
    assert line.startswith(f"{place}/train.yaml:6 data.path: ") and "no column 'entry_point'" in line
    (place / "mine.py").write_text("def f(prompt, completion, *, answer, hint=1): return 0.0")
    (line,) = mistakes(place / "train.yaml", "rewards=[{name: mine.py:f}]")
    assert "no column 'answer'" in line
    load_train_recipe(place / "train.yaml", ["rewards=[{name: mine.py:f, args: {answer: 3}}]"])


def test_supervised_rows_need_a_completion(place: Path) -> None:
    (place / "rows.jsonl").write_text('{"id": "a", "prompt": "p"}\n')
    with pytest.raises(RecipeError, match="completion"):
        load_sft_recipe(place / "sft.yaml")


def test_pretrained_policy_of_supervised_training_needs_weights(place: Path) -> None:
    (place / "policy" / "model.safetensors").unlink()
    load_sft_recipe(place / "sft.yaml")
    with pytest.raises(RecipeError, match="has no weights"):
        load_sft_recipe(place / "sft.yaml", ["policy.init=pretrained"])


def test_evaluation_needs_its_section_but_no_training_data(place: Path) -> None:
    (place / "prompts.jsonl").rename(place / "held.jsonl")
    with pytest.raises(RecipeError, match=r"evaluation: is null; name the prompts"):
        load_evaluation(place / "train.yaml")
    loaded = load_evaluation(place / "train.yaml", ["evaluation.data.path=held.jsonl"])
    assert loaded.recipe.evaluation is not None


def test_paths_are_tried_beside_the_recipe_then_in_the_working_directory(place: Path) -> None:
    here = Path.cwd()
    (here / "only_here.jsonl").touch()
    (here / "prompts.jsonl").touch()
    assert resolve_path("prompts.jsonl", base_path=place) == place / "prompts.jsonl"
    assert resolve_path("only_here.jsonl", base_path=place) == here / "only_here.jsonl"
    assert resolve_path("nowhere.jsonl", base_path=place) == place / "nowhere.jsonl"
    assert resolve_path("/abs/x", base_path=place) == Path("/abs/x")
    assert resolve_policy("bundled:tiny", base_path=place).parts[-3:] == ("model", "assets", "tiny")


def test_recipe_is_found_by_path_first_then_by_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = packaged_recipes()["code"]
    assert find_recipe("code") == find_recipe("code.yaml") == find_recipe("recipes/code.yaml") == packaged
    assert find_recipe(str(place / "train.yaml")) == place / "train.yaml"
    Path("code.yaml").write_text(TRAIN)
    assert find_recipe("code.yaml") == Path("code.yaml")
    for wrong, remedy in (("cod", "did you mean 'code'?"), ("zzz.yaml", "`cispo recipes` lists"), (".", "is a folder")):
        with pytest.raises(RecipeError, match=remedy.replace("?", r"\?")):
            find_recipe(wrong)


def test_dry_run_shows_the_origin_of_each_value(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    loaded = load_train("train.yaml", ["learner.betas=[0.8, 0.9]", "rollout.group_size=4"])
    text = annotated_yaml(loaded)
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["steps"].split() == ["steps:", "3", "#", "train.yaml:2"]
    assert lines["group_size"].endswith("# command line")
    assert lines["betas"].split("#") == [lines["betas"].split("#")[0], " command line"]
    assert lines["max_concurrent_completions"].endswith("# default")
    assert lines["- name"].split() == ["-", "name:", "format", "#", "train.yaml:11"]
    assert TrainRecipe.model_validate(yaml.safe_load(text)) == loaded.recipe


def test_resolved_recipe_is_a_recipe_that_runs_the_same(place: Path, tmp_path: Path) -> None:
    recipe = load_train_recipe(place / "train.yaml", ["learner.max_grad_norm=.inf", "steps=7"])
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe))
    assert load_train_recipe(tmp_path / "recipe.yaml") == recipe


def test_plan_counts_what_a_step_does(place: Path) -> None:
    recipe = load_train_recipe(place / "train.yaml", ["learner.updates_per_step=4"])
    parameters = count_parameters(place / "policy")
    plan = train_plan(recipe)
    assert "128 completions (16 prompts x 8)" in plan
    assert "at most 4,096 in completions" in plan
    assert "4, so 12 in the run" in plan
    assert f"{parameters:,} parameters in float32" in plan
    assert f"{parameters * 16 / 2**20:,.1f} MiB of weights, gradients and optimiser" in plan


def test_parameters_are_counted_from_the_header_as_the_model_has_them(small_policy_folder: Path) -> None:
    import torch

    from cispo.model.checkpoint import load_policy

    decoder = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    assert count_parameters(small_policy_folder) == sum(parameter.numel() for parameter in decoder.parameters())
