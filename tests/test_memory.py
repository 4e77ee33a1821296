"""The memory that a run needs is counted as the actors take it, and refused where it is more than there is."""

from pathlib import Path

import pytest
import torch

from cispo.cli import main
from cispo.errors import RecipeError
from cispo.memory import Machine, run_memory, this_machine
from cispo.model.checkpoint import load_policy
from cispo.recipe.load import load_train_recipe

GIB = 2**30
RECIPE = """\
name: toy
steps: 1
policy: {{path: {policy}}}
data: {{path: prompts.jsonl}}
rollout: {{prompts_per_step: 1, max_prompt_tokens: 100, max_completion_tokens: 60, max_concurrent_completions: 9}}
rewards: [{{name: length, args: {{cache_tokens: 10}}}}]
learner: {{learning_rate: 1.0e-3}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, small_policy_folder: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "1 + 1"}\n')
    (tmp_path / "train.yaml").write_text(RECIPE.format(policy=small_policy_folder))
    return tmp_path / "train.yaml"


@pytest.mark.parametrize(("dtype", "element_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_weights_and_caches_are_those_of_engine_and_learner(
    recipe_file: Path, small_policy_folder: Path, dtype: str, element_bytes: int
) -> None:
    decoder = load_policy(small_policy_folder, dtype=getattr(torch, dtype), device="cpu")
    memory = run_memory(load_train_recipe(recipe_file, [f"policy.dtype={dtype}"]), Machine(GIB, ()))
    assert memory.engine_caches == decoder.new_cache(capacity=9, max_tokens=160).bytes
    assert memory.engine_weights == sum(parameter.nbytes for parameter in decoder.parameters())
    assert memory.learner == memory.parameters * (16 + (element_bytes if dtype == "bfloat16" else 0))
    assert memory.reference == 0


def test_a_reference_policy_is_counted(recipe_file: Path) -> None:
    with_kl = load_train_recipe(recipe_file, ["objective.name=grpo", "objective.kl_coefficient=0.1"])
    memory = run_memory(with_kl, Machine(GIB, ()))
    assert memory.reference == memory.engine_weights > 0


@pytest.mark.parametrize(
    ("workers", "gpus", "least_bytes", "where"),
    [
        (1, 0, lambda m: m.learner + m.engine_weights + m.engine_caches, "this machine's memory"),
        (2, 0, lambda m: m.learner + 2 * (m.engine_weights + m.engine_caches), "this machine's memory"),
        (1, 1, lambda m: m.learner + m.engine_caches, "the GPU"),
        (2, 1, lambda m: m.learner + 2 * (m.engine_weights + m.engine_caches), "the GPU"),
        (1, 2, lambda m: m.learner, "the learner's GPU"),
        (3, 2, lambda m: 3 * (m.engine_weights + m.engine_caches), "a GPU of rollout workers"),
    ],
)
def test_a_device_that_is_a_byte_too_small_is_refused(
    recipe_file: Path, workers: int, gpus: int, least_bytes: object, where: str
) -> None:
    # Learner and engines differ enough that the named device is the one that is too small.
    completions = 400 if where == "a GPU of rollout workers" else 9
    overrides = [f"rollout.workers={workers}", f"rollout.max_concurrent_completions={completions}"]
    recipe = load_train_recipe(recipe_file, overrides)
    assert callable(least_bytes)
    least = least_bytes(run_memory(recipe, Machine(0, (0,) * gpus)))

    def machine(size: int) -> Machine:
        return Machine(size, ()) if gpus == 0 else Machine(0, (size, *(size + 1 for _ in range(gpus - 1))))

    run_memory(recipe, machine(least)).refuse_what_cannot_fit()
    with pytest.raises(RecipeError, match=rf"of {where}, which has .*rollout\.max_concurrent_completions"):
        run_memory(recipe, machine(least - 1)).refuse_what_cannot_fit()


def test_the_command_refuses_before_a_run_folder_is_made(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(recipe_file), "rollout.max_concurrent_completions=100000000", "policy.device=cpu"]
    assert main([*words, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert "100,000,000 sequences of 160 tokens" in printed.out
    assert "the run needs" in printed.err and len(printed.err.splitlines()) == 1
    assert main([*words, "--run-dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_the_gpus_are_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '81559\\n81559\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine().gpu_bytes == (81559 * 2**20,) * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert len(this_machine().gpu_bytes) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine().gpu_bytes == ()
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert this_machine().gpu_bytes == ()
    assert this_machine().host_bytes > GIB
