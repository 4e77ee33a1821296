"""The command line: what each command hands on, one line a mistake, exit codes, and no heavy imports for help."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cispo
from cispo.cli import main
from cispo.errors import BroadcastError
from cispo.resources import packaged_recipes

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """\
name: toy
steps: 3
policy:
  path: {policy}
data:
  path: prompts.jsonl
rollout:
  prompts_per_step: 16
  max_completion_tokens: 32
rewards:
  - name: format
learner:
  learning_rate: 1e-6
evaluation:
  data: {{path: prompts.jsonl}}
"""


@pytest.fixture
def recipe(tmp_path: Path, small_policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE.format(policy=small_policy_folder))
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "Write f.", "entry_point": "f", "tests": []}\n')
    return path


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any, Any]]:
    """Stands in for `cispo.loop` and records how it is called."""
    calls: list[tuple[str, Any, Any, Any]] = []
    module = ModuleType("cispo.loop")
    module.__dict__["run_training"] = lambda recipe, folder, *, resume: calls.append(("train", recipe, folder, resume))
    module.__dict__["run_evaluation"] = lambda recipe: calls.append(("eval", recipe, None, None))
    monkeypatch.setitem(sys.modules, "cispo.loop", module)
    return calls


def test_train_makes_the_run_folder_and_runs(recipe: Path, loop: list[Any], tmp_path: Path) -> None:
    assert main(["train", str(recipe), "--name", "first", "learner.learning_rate=1e-5"]) == 0
    ((kind, given, folder, resume),) = loop
    assert (kind, resume) == ("train", False)
    assert (given.name, given.learner.learning_rate) == ("first", 1e-5)
    assert folder.path == tmp_path / "runs" / "first"
    assert (folder.path / "recipe.yaml").is_file()


def test_run_dir_is_the_folder_itself(recipe: Path, loop: list[Any], tmp_path: Path) -> None:
    assert main(["train", str(recipe), "--run-dir", "deep/here"]) == 0
    assert loop[0][2].path == tmp_path / "deep" / "here"


def test_taken_name_is_refused_and_resume_goes_on(
    recipe: Path, loop: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe)]) == 0
    assert main(["train", str(recipe)]) == 2
    assert "runs/toy exists already; choose another name with --name, or continue it" in capsys.readouterr().err
    assert main(["train", str(recipe), "--resume", "steps=9"]) == 0
    assert [(call[1].steps, call[3]) for call in loop] == [(3, False), (9, True)]


def test_mistakes_are_one_line_each_and_start_nothing(
    recipe: Path, loop: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", str(recipe), "learner.learning_rat=1", "steps=0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "command line learner.learning_rat: no such setting; did you mean 'learning_rate'?",
        "command line steps: must be >= 1, got 0",
    ]
    assert not loop and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train"], "command line: no recipe is named; `cispo recipes` lists those that come with the package"),
        (["train", "toy.yaml", "steps"], "command line: expected key=value, got 'steps'; for instance"),
        (["train", "toi.yaml"], "toi.yaml: no such recipe file; "),
        (["train", "toy.yaml", "--resume"], "there is no run to resume at "),
    ],
)
def test_mistaken_words(
    recipe: Path, loop: list[Any], capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(line)


def test_unknown_option_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe), "--lr", "3"])
    assert caught.value.code == 2
    assert "unrecognised arguments: --lr" in capsys.readouterr().err


def test_dry_run_prints_and_leaves_nothing(
    recipe: Path, loop: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", str(recipe), "--dry-run", "seed=4"]) == 0
    text = capsys.readouterr().out
    assert "seed: 4" in text and "# command line" in text and "updates a step" in text
    assert not loop and not (tmp_path / "runs").exists()


def test_eval_measures_the_policy_that_is_named(recipe: Path, loop: list[Any], small_policy_folder: Path) -> None:
    link = recipe.parent / "checkpoint"
    link.symlink_to(small_policy_folder)
    assert main(["eval", str(recipe), "--policy", "checkpoint", "evaluation.completions_per_prompt=4"]) == 0
    ((kind, given, _, _),) = loop
    assert kind == "eval"
    assert Path(given.policy.path) == small_policy_folder
    assert given.evaluation.completions_per_prompt == 4


def test_interrupt_says_how_to_resume(
    recipe: Path, loop: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys.modules["cispo.loop"], "run_training", interrupted)
    assert main(["train", "toy.yaml", "--name", "a", "steps=4"]) == 130
    line = "interrupted; continue with: cispo train toy.yaml --name a steps=4 --resume\n"
    assert capsys.readouterr().err == line
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_error_that_crossed_a_process_border_is_one_line(
    recipe: Path, loop: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrapped(BroadcastError):
        cause = BroadcastError("rollout:1 holds version 3")

    def failing(*_: object, **__: object) -> None:
        raise Wrapped("Traceback (most recent call last): ...\nmore")

    monkeypatch.setattr(sys.modules["cispo.loop"], "run_training", failing)
    assert main(["train", "toy.yaml"]) == 2
    assert capsys.readouterr().err == "rollout:1 holds version 3\n"


def test_recipes_are_listed_with_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    for name, path in packaged_recipes().items():
        assert f"{name} " in text
        assert path.read_text().splitlines()[0].removeprefix("# ") in text
    assert main(["recipes", "code"]) == 0
    assert capsys.readouterr().out == packaged_recipes()["code"].read_text()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip() == cispo.__version__


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "--help"], ["version"], ["recipes"]])
def test_help_is_light(words: list[str]) -> None:
    program = textwrap.dedent(f"""
        import sys
        import cispo, cispo.types, cispo.errors
        from cispo.cli import main
        try: main({words!r})
        except SystemExit: pass
        heavy = {{"torch", "ray", "pydantic", "datasets", "wandb", "transformers", "rich"}} & set(sys.modules)
        sys.exit(f"loaded {{heavy}}" if heavy else 0)
    """)
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=ROOT)


def test_dry_run_loads_neither_torch_nor_ray(recipe: Path) -> None:
    program = textwrap.dedent(f"""
        import sys
        from cispo.cli import main
        assert main(["train", {str(recipe)!r}, "--dry-run"]) == 0
        heavy = {{"torch", "ray", "wandb", "transformers"}} & set(sys.modules)
        sys.exit(f"loaded {{heavy}}" if heavy else 0)
    """)
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=ROOT)
