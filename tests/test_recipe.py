"""Recipes: values by declared type, overrides, and every mistake at once with its place and remedy."""

import ast
import inspect
import itertools
import pickle
import textwrap
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cispo.errors import RecipeError
from cispo.objective_settings import GrpoSettings
from cispo.recipe.convert import convert
from cispo.recipe.declared import settings_classes
from cispo.recipe.document import COMMAND_LINE, Mistake, Origin, ScalarNode, read_document
from cispo.recipe.load import read_recipe
from cispo.recipe.schema import TrainRecipe
from cispo.recipe.sft_schema import SftRecipe
from cispo.resources import packaged_recipes

GOOD = """\
name: toy
steps: 3
policy:
  path: somewhere
data:
  path: prompts.jsonl
rollout:
  prompts_per_step: 16
  max_completion_tokens: 32
rewards:
  - name: code
    weight: 2
  - name: format
learner:
  learning_rate: 1e-6
  updates_per_step: 4
objective:
  name: cispo
  ratio_max: 5.0
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Write":
    monkeypatch.chdir(tmp_path)
    return Write(tmp_path)


class Write:
    """Recipes in a temporary working directory; lines of GOOD are replaced by what a test is about."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *replacements: tuple[str, str], text: str = GOOD) -> Path:
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        (self.folder / "r.yaml").write_text(text, encoding="utf-8")
        return Path("r.yaml")


def load(path: Path, *overrides: str) -> TrainRecipe:
    return read_recipe(path, overrides, TrainRecipe).recipe


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(path, *overrides)
    return str(caught.value).splitlines()


def test_values_come_in_the_declared_types(write: Write) -> None:
    recipe = load(write(("name: toy", "name: 007"), ("ratio_max: 5.0", "ratio_max: .inf")))
    assert recipe.name == "007"
    assert recipe.learner.learning_rate == 1e-6
    assert recipe.objective.ratio_max == float("inf")
    assert [reward.weight for reward in recipe.rewards] == [2.0, 1.0]
    assert recipe.rollout.group_size == 8


def test_every_mistake_is_reported_at_once_in_the_order_of_the_file(write: Write) -> None:
    path = write(
        ("steps: 3", "steps: many"),
        ("  prompts_per_step: 16", "  promts_per_step: 16"),
        ("learning_rate: 1e-6", "learning_rate: -1"),
        ("  name: cispo", "  name: cispoo"),
    )
    assert mistakes(path, "seed=x", "logging.wandb=offlin") == [
        "r.yaml:2 steps: expected a whole number, got 'many'",
        "r.yaml:7 rollout.prompts_per_step: is not set and has no default: Prompts of one generation batch",
        "r.yaml:8 rollout.promts_per_step: no such setting; did you mean 'prompts_per_step'?",
        "r.yaml:15 learner.learning_rate: must be > 0, got -1",
        "r.yaml:18 objective.name: must be one of cispo, grpo, dapo, dr_grpo, reinforce, got 'cispoo'; "
        "did you mean 'cispo'?",
        "command line seed: expected a whole number, got 'x'",
        "command line logging.wandb: must be one of disabled, offline, online, got 'offlin'; did you mean 'offline'?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("name: toy\n", "", "r.yaml:1 name: is not set and has no default: Name of the run"),
        ("name: toy", "name: a/b", "r.yaml:1 name: must match "),
        ("steps: 3", "steps: 3.5", "r.yaml:2 steps: expected a whole number, got '3.5'"),
        ("steps: 3", "steps: 0", "r.yaml:2 steps: must be >= 1, got 0"),
        ("steps: 3", "steps:", "r.yaml:2 steps: expected a whole number, got nothing"),
        ("steps: 3", "steps: [3]", "r.yaml:2 steps: expected a whole number, got a list"),
        ("steps: 3", "steps: 3\nsteps: 4", "r.yaml:3 steps: is set twice, first at r.yaml:2; remove one"),
        ("steps: 3", "steps: 3\nray: {dashboard: on}", "r.yaml:3 ray.dashboard: expected true or false, got 'on'"),
        ("steps: 3", "steps: 3\nray: {dashboard: no}", "r.yaml:3 ray.dashboard: expected true or false, got 'no'"),
        ("1e-6", "nan", "r.yaml:15 learner.learning_rate: expected a number, got 'nan'"),
        ("1e-6", ".inf", "r.yaml:15 learner.learning_rate: "),
        ("1e-6", "fast", "r.yaml:15 learner.learning_rate: expected a number, got 'fast'"),
        ("policy:\n  path: somewhere", "policy: somewhere", "r.yaml:3 policy: expected a section of settings, got"),
        ("policy:\n  path: somewhere", "policy:", "r.yaml:3 policy.path: is not set and has no default"),
        (
            "  - name: format",
            "  - name: format\n    wieght: 1",
            "r.yaml:14 rewards.1.wieght: no such setting; did you me",
        ),
        ("    weight: 2", "    weight: a", "r.yaml:12 rewards.0.weight: expected a number, got 'a'"),
        ("ratio_max: 5.0", "ratio_max: 0.2", "r.yaml:19 objective.ratio_max: must be at least 1, got 0.2: it is the"),
        ("ratio_max: 5.0", "ratio_min: 0.5", "r.yaml:19 objective.ratio_min: is 0.5 without mask_ratio_low"),
        ("ratio_max: 5.0", "clip_low: 0.5", "r.yaml:19 objective.clip_low: no such setting"),
        ("updates_per_step: 4", "updates_per_step: 17", "r.yaml:16 learner.updates_per_step: is 17 with rollout."),
        ("prompts_per_step: 16", "prompts_per_step: 16\n  top_p: 0.9", "r.yaml:9 rollout.top_p: must be 1 in training"),
        ("prompts_per_step: 16", "prompts_per_step: 16\n  top_k: 5", "r.yaml:9 rollout.top_k: must be 0 in training"),
        ("prompts_per_step: 16", "prompts_per_step: 16\n  min_p: .1", "r.yaml:9 rollout.min_p: must be 0 in training"),
        ("prompts_per_step: 16", "prompts_per_step: 16\n  group_size: 1", "r.yaml:9 rollout.group_size: must be at le"),
        ("prompts_per_step: 16", "prompts_per_step: 16\n  stop_strings: ['']", "r.yaml:9 rollout.stop_strings.0: "),
        (
            "prompts_per_step: 16",
            "prompts_per_step: 16\n  thinking: {tokens: 32}",
            "r.yaml:9 rollout.thinking.tokens: is 32 with max_completion_tokens 32: nothing would be left",
        ),
        (
            "prompts_per_step: 16",
            "prompts_per_step: 16\n  thinking: {tokens: 8, end: '</t>'}",
            "r.yaml:9 rollout.thinking.interruption: must hold '</t>', which ends thinking",
        ),
        (
            "prompts_per_step: 16",
            "prompts_per_step: 16\n  repetition: {probability: 1}",
            "r.yaml:9 rollout.repetition.probability: ",
        ),
        (
            "prompts_per_step: 16",
            "prompts_per_step: 16\n  group_size: 9\n  max_concurrent_completions: 8",
            "r.yaml:9 rollout.group_size: is 9 with rollout.max_concurrent_completions 8: the completions of a prompt",
        ),
    ],
)
def test_mistake_names_place_and_remedy(write: Write, old: str, new: str, line: str) -> None:
    (found,) = mistakes(write((old, new)))
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "r.yaml:1 "),
        ("- a\n- b\n", "r.yaml:1: holds no settings; write one `key: value` a line"),
        ("a: [1, 2\nb: 3\n", "r.yaml:2: is not valid YAML: "),
        ("a: 1\n\tb: 2\n", "r.yaml:2: is not valid YAML: "),
        ("a: &x\n  b: *x\n", "r.yaml:2 a.b: is an alias of a value that holds it; write the value out"),
        ("? [a, b]\n: 1\n", "r.yaml:1: a setting's name must be a single word"),
    ],
)
def test_text_that_is_no_recipe(write: Write, text: str, line: str) -> None:
    assert mistakes(write(text=text))[0].startswith(line)


def test_file_that_is_no_text(write: Write) -> None:
    write.folder.joinpath("r.yaml").write_bytes(b"\xff\xfe\x00name")
    (line,) = mistakes(Path("r.yaml"))
    assert line.startswith("r.yaml: cannot be read as UTF-8 text")


def test_overrides_reach_sections_lists_and_unset_parts(write: Write) -> None:
    overrides = [
        "learner.learning_rate=1e-5",
        "rewards.0.weight=3",
        "rewards.1={name: length, weight: 0.5}",
        "evaluation.data.path=held.jsonl",
        "learner.betas=[0.8, 0.9]",
        "objective.name=grpo",
        "objective.ratio_max=1",
        "data.columns={prompt: question}",
    ]
    recipe = load(write(("  ratio_max: 5.0\n", "")), *[item for item in overrides if "ratio_max" not in item])
    assert recipe.learner.learning_rate == 1e-5
    assert recipe.learner.betas == (0.8, 0.9)
    assert [(reward.name, reward.weight) for reward in recipe.rewards] == [("code", 3.0), ("length", 0.5)]
    assert recipe.evaluation is not None and recipe.evaluation.data.path == "held.jsonl"
    assert isinstance(recipe.objective, GrpoSettings)
    assert dict(recipe.data.columns) == {"prompt": "question"}
    (line,) = mistakes(write(), *overrides)
    assert line.startswith("command line objective.ratio_max: no such setting; there is ")


def test_override_takes_text_as_it_stands(write: Write) -> None:
    recipe = load(write(), "data.path=[odd] name=x.jsonl", "evaluation=null", "name=on")
    assert recipe.data.path == "[odd] name=x.jsonl"
    assert recipe.evaluation is None
    assert recipe.name == "on"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("learner", "command line: expected key=value, got 'learner'; for instance learner.learning_rate=1e-5"),
        ("=3", "command line: expected key=value, got '=3'"),
        ("learner..x=3", "command line: expected key=value, got 'learner..x=3'"),
        ("learner.lr=1", "command line learner.lr: no such setting; did you mean 'learning_rate'?"),
        ("learner.zz=1", "command line learner.zz: no such setting; there is activation_checkpointing, "),
        ("learner.learning_rat=1", "command line learner.learning_rat: no such setting; did you mean 'learning_rate'?"),
        ("learner.learning_rate=-1", "command line learner.learning_rate: must be > 0, got -1"),
        ("learner.learning_rate.x=1", "command line learner.learning_rate.x: learner.learning_rate is a single value"),
        ("rewards.2.weight=1", "command line rewards.2.weight: '2' is no item of rewards, which has items 0 to 1"),
        ("rewards.x.weight=1", "command line rewards.x.weight: 'x' is no item of rewards, which has items 0 to 1"),
        ("learner.betas=[0.8", "command line learner.betas: expected a list, such as [a, b], got '[0.8'"),
        ("rewards=[]", "command line rewards: needs at least 1 item(s), got 0"),
        ("evaluation.every_steps=1", "command line evaluation.data: is not set and has no default"),
    ],
)
def test_mistaken_override_names_the_command_line(write: Write, override: str, line: str) -> None:
    (found,) = mistakes(write(), override)
    assert found.startswith(line)


def test_last_of_two_overrides_counts(write: Write) -> None:
    assert load(write(), "steps=5", "steps=6").steps == 6


def test_arguments_without_declared_type_are_read_as_they_look(write: Write) -> None:
    recipe = load(
        write(("    weight: 2", "    args: {rate: 1e-3, count: 4, deep: [true, null, 'no'], word: on, quoted: '7'}"))
    )
    assert recipe.rewards[0].args == {
        "rate": 1e-3,
        "count": 4,
        "deep": [True, None, "no"],
        "word": "on",
        "quoted": "7",
    }


def test_base_path_is_the_folder_of_the_recipe_unless_it_is_given(write: Write) -> None:
    path = write()
    (write.folder / "deep").mkdir()
    path.rename(write.folder / "deep" / "r.yaml")
    assert load(Path("deep/r.yaml")).base_path == write.folder / "deep"
    assert load(Path("deep/r.yaml"), "base_path=/elsewhere").base_path == Path("/elsewhere")


def test_recipe_is_immutable_and_crosses_processes(write: Write) -> None:
    recipe = load(write())
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.steps = 5  # type: ignore[misc]  # that this is refused is the point


@pytest.mark.parametrize("settings", [TrainRecipe, SftRecipe])
def test_every_setting_says_what_it_is(settings: type[TrainRecipe] | type[SftRecipe]) -> None:
    waiting: list[type[BaseModel]] = [settings]
    silent = []
    for section in waiting:
        described = documented_fields(section)
        for name, field in section.model_fields.items():
            below = settings_classes(field.annotation)
            waiting += [found for found in below if found not in waiting]
            if not below and name not in described and not is_tag(field):
                silent.append(f"{section.__name__}.{name}")
    assert not silent


def is_tag(field: FieldInfo) -> bool:
    """`name: cispo` says which settings class it stands in."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def documented_fields(section: type[BaseModel]) -> set[str]:
    """Fields with a docstring below them, in a class or the classes it extends."""
    found: set[str] = set()
    for kind in section.__mro__[:-1]:
        if issubclass(kind, BaseModel) and kind is not BaseModel:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
            assert isinstance(tree, ast.ClassDef)
            for before, after in itertools.pairwise(tree.body):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and is_text:
                    found.add(before.target.id)
    return found


def test_packaged_recipes_are_valid() -> None:
    for name, path in packaged_recipes().items():
        settings = SftRecipe if "sft" in name else TrainRecipe
        recipe = read_recipe(path, (), settings).recipe
        assert recipe.name == name
        assert path.read_text(encoding="utf-8").startswith("# "), "the first line says what the recipe is for"


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-300, max_value=1e300))
def test_every_spelling_of_a_number_is_that_number(value: float) -> None:
    for text in (repr(value), f"{value:e}", f"{value:E}"):
        found: list[Mistake] = []
        node = ScalarNode(text, True, Origin("r.yaml", 1))
        assert convert(node, float, ("x",), found) == float(text)
        assert not found


@given(st.text(max_size=12), st.sampled_from([int, float, bool, float | None, tuple[float, float], list[int]]))
def test_no_text_breaks_the_reader(text: str, kind: object) -> None:
    for source in ("r.yaml", COMMAND_LINE):
        found: list[Mistake] = []
        convert(ScalarNode(text, True, Origin(source)), kind, ("x",), found)
        assert len(found) <= 2


@given(st.text(st.sampled_from("ab1:-[]{},&*#!?|>'\"~ \n\t%@") | st.characters(), max_size=40))
def test_no_file_breaks_the_reader(text: str) -> None:
    document = read_document(text, "r.yaml")
    lines = text.count("\n") + text.count("\r") + text.count("\x85") + text.count("\u2028") + text.count("\u2029") + 1
    assert all(1 <= mistake.origin.line <= lines + 1 for mistake in document.mistakes)
