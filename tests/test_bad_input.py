"""What a user can get wrong: one line that says where and what to do, before any actor starts if it can be known then,
and no run lost when it cannot."""

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cispo.cli import main
from cispo.errors import RunFolderError
from cispo.evaluation import HeldoutSet, evaluate
from cispo.kernels.cpu_library import prepare
from cispo.recipe.rollout_schema import RolloutSettings
from cispo.recipe.schema import EvaluationSettings
from cispo.rollout.request import GroupRequest
from cispo.run_folder import RunFolder
from cispo.sampler import Collected
from cispo.types import Prompt, Rollout, Score, ScoredGroup, ScoreStatus, StopReason

RECIPE = """\
name: bad
steps: 3
policy: {path: policy, device: cpu}
data: {path: prompts.jsonl, columns: {prompt: question}}
rollout: {prompts_per_step: 4, group_size: 6, max_prompt_tokens: 32, max_completion_tokens: 4}
rewards: [{name: "rewards.py:reward"}]
sandbox: {workers: 1}
learner: {learning_rate: 1.0e-4, updates_per_step: 2}
evaluation: null
ray: {dashboard: false}
logging: {console: lines}
"""

REWARDS = """\
import sys
from pathlib import Path
from cispo.types import Score

CALLS = []

def reward(prompt, completion, *, key, **row):
    '''In the first step a failure of each kind beside rewards, then nothing but failures until somebody mends it.'''
    CALLS.append(prompt)
    if len(CALLS) > 24 and not Path(__file__).with_name("mended").exists():
        raise ConnectionError("the grader is down\\nsince noon")
    kind = len(CALLS) % 8
    if kind == 0:
        raise KeyError("no such answer")
    if kind == 1:
        sys.exit(3)
    return {2: float("nan"), 3: "good", 4: None, 5: Score(float("inf"))}.get(kind, float(len(CALLS) % 3))

async def slow(prompt, completion):
    return 0.5

def grader(prompt, completion, *, judge):
    return 1.0
"""

Break = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path, small_policy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user whose recipe is in order."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_policy_folder, tmp_path / "policy")
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    rows = [json.dumps({"question": f"Ask {i}", "key": i}) + "\n" for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refused(_: object) -> Iterator[None]:
        raise AssertionError("an actor would have started")
        yield

    import cispo.loop

    monkeypatch.setattr(cispo.loop, "ray_session", refused)


def write(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def configure(**keys: Any) -> Break:
    def change(folder: Path) -> None:
        file = folder / "policy" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | keys), encoding="utf-8")

    return change


def truncate(folder: Path) -> None:
    file = folder / "policy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def grow_vocabulary(folder: Path) -> None:
    """A tokenizer with more tokens than the policy has embeddings."""
    file = folder / "policy" / "model.safetensors"
    weights = {
        name: weight[:128].contiguous() if name in ("lm_head.weight", "model.embed_tokens.weight") else weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file)
    configure(vocab_size=128)(folder)


def template(text: str) -> Break:
    def change(folder: Path) -> None:
        file = folder / "policy" / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {"chat_template": text}
        file.write_text(json.dumps(config), encoding="utf-8")

    return change


CASES: dict[str, tuple[Break, list[str], str]] = {
    "unknown key": (lambda _: None, ["learner.lr=1"], "command line learner.lr: no such setting; did you mean"),
    "wrong type": (lambda _: None, ["steps=many"], "command line steps: expected a whole number, got 'many'"),
    "missing file": (lambda _: None, ["data.path=no.jsonl"], "command line data.path: there is no file "),
    "missing column": (lambda _: None, ["data.columns.key=answer"], "no column 'answer' for 'key'; the columns are"),
    "row without the column": (
        write("prompts.jsonl", '{"question": "Ask", "key": 1}\n{"key": 5}\n'),
        [],
        "prompts.jsonl:2: no column 'question' for 'prompt'; the columns are key; map it with data.columns.prompt",
    ),
    "too few prompts": (lambda _: None, ["data.limit=3"], "data.path has 3 prompts, rollout.prompts_per_step is 4"),
    "no room for answers": (
        lambda _: None,
        ["rollout.thinking.tokens=2", "rollout.thinking.interruption=</think>"],
        "rollout.thinking.tokens is 2, and the interruption has 8 tokens: nothing of rollout.max_completion_tokens 4",
    ),
    "long prompt": (lambda _: None, ["rollout.max_prompt_tokens=5"], "tokens, rollout.max_prompt_tokens is 5; raise"),
    "reward not there": (write("rewards.py", "x = 1\n"), [], "r.yaml:6 rewards.0.name: reward 'rewards.py:reward': "),
    "reward that cannot be imported": (write("rewards.py", "import nowhere\n"), [], "(rewards.py:1)"),
    "no weights": (
        lambda folder: (folder / "policy" / "model.safetensors").unlink(),
        [],
        "has no weights (model.safetensors missing); copy the weights there, or make them with `cispo sft`",
    ),
    "truncated weights": (truncate, [], "policy/model.safetensors is damaged ("),
    "weights of another config": (configure(intermediate_size=32), [], "policy does not fit its config.json: "),
    "index that is none": (write("policy/model.safetensors.index.json", "{}"), [], "is no index of weights (KeyError"),
    "config that is a list": (write("policy/config.json", "[]"), [], "config.json holds list, not an object of keys"),
    "config of text": (configure(hidden_size="wide"), [], "config.json holds a value of the wrong kind ("),
    "config of no model": (configure(num_experts_per_tok=9), [], "num_experts_per_tok is 9 of 4 experts"),
    "negative size": (configure(num_key_value_heads=0), [], "num_key_value_heads is 0, must be at least 1"),
    "tokenizer that is none": (write("policy/tokenizer.json", '{"broken'), [], "tokenizer.json is no tokenizer ("),
    "tokenizer settings": (write("policy/tokenizer_config.json", "{,"), [], "tokenizer_config.json is not valid JSON"),
    "tokenizer list": (write("policy/tokenizer_config.json", "[]"), [], "tokenizer_config.json holds a list, no"),
    "tokenizer of another policy": (grow_vocabulary, [], " has 260 tokens, but vocab_size in its config.json is 128"),
    "template that is none": (template("{% if %}"), [], "tokenizer_config.json is no Jinja template ("),
    "template that fails": (template("{{ messages.x.y }}"), [], "tokenizer_config.json fails on a user message ("),
    "no device": (lambda _: None, ["policy.device=cuda"], "policy.device is cuda, but torch sees no CUDA device"),
    "no sandbox": (lambda _: None, ["rewards.0.name=rewards.py:grader"], "bubblewrap is not installed (no `bwrap` on"),
}


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("name", CASES)
def test_one_line_before_any_actor_starts(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, overrides, expected = CASES[name]
    change(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    prepare()  # no compiler is on the PATH that follows
    monkeypatch.setenv("PATH", str(folder))
    assert main(["train", "r.yaml", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not (folder / "runs" / "bad").exists(), "a run that never began holds its name"


@pytest.mark.usefixtures("no_ray")
def test_a_run_folder_that_cannot_be_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "r.yaml", "--run-dir", "r.yaml/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cannot create the run folder {folder}/r.yaml/run (")


def test_a_ray_that_does_not_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert main(["train", "r.yaml", f"ray.address={address}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nothing answers at ray.address '{address}' (")


def records(folder: Path, step: int) -> list[dict[str, Any]]:
    text = (folder / "runs" / "bad" / "rollouts" / f"step_{step:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_failing_rewards_are_left_out_and_a_step_of_nothing_else_stops_the_run_which_goes_on_when_mended(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "r.yaml", "checkpoint.every_steps=3"]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("step 2: the reward failed for all 24 completions, the first: reward 'reward' (")
    assert "raised ConnectionError: the grader is down since noon (rewards.py:" in line
    assert line.endswith("mend the reward, then continue with --resume")

    (warning,) = [text for text in out.splitlines() if text.startswith("warning: ")]
    assert "warning: step 1: the reward failed for 18 of 24 completions, which are left out; the first: " in warning
    assert warning in (folder / "runs" / "bad" / "log.txt").read_text(encoding="utf-8")
    first = records(folder, 1)
    failed = [record for record in first if record["status"] == "error"]
    assert len(failed) == 18 and all(record["reward"] == 0.0 for record in failed)
    for reason in ("KeyError: 'no such answer'", "SystemExit", "nan", "'good' of type str", "None", "inf"):
        assert sum(reason in record["message"] for record in failed) == 3, reason
    metrics = json.loads((folder / "runs" / "bad" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (metrics["step"], metrics["reward/frac_error"]) == (1, 0.75)

    # Kept as it stood before step 2, although no checkpoint was due then.
    assert [path.name for path in sorted((folder / "runs" / "bad" / "checkpoints").iterdir())] == [
        "step_000000",
        "step_000001",
    ]
    before = [record["completion"] for record in records(folder, 2)]
    assert main(["view", "runs/bad"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "error: reward 'reward'" in shown and "the grader is down" in shown

    (folder / "mended").touch()
    assert main(["train", "r.yaml", "checkpoint.every_steps=3", "--resume", "logging.wandb=disabled"]) == 0
    assert [record["completion"] for record in records(folder, 2)] == before
    lines = (folder / "runs" / "bad" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("metrics.jsonl", '{"step": 0}\ngarbage\n', "metrics.jsonl:2 is no line of metrics; delete it"),
        ("metrics.jsonl", "7\n", "metrics.jsonl:1 is no line of metrics; delete it"),
        ("recipe.yaml", "steps: [", "recipe.yaml is damaged; restore it, or start another run with --name"),
        ("recipe.yaml", "7", "recipe.yaml holds no settings; restore it, or start another run with --name"),
    ],
)
def test_a_run_folder_that_somebody_damaged(tmp_path: Path, file: str, text: str, expected: str) -> None:
    recipe = EvaluationSettings.model_validate({"data": {"path": "unused"}})
    RunFolder.create(tmp_path / "run", recipe).close()
    (tmp_path / "run" / file).write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError, match=f"{tmp_path}/run/{file}.*") as refused:
        RunFolder.open_for_resume(tmp_path / "run", recipe).truncate_after(0)
    assert str(refused.value) == f"{tmp_path}/run/{expected}"


def test_a_completion_that_is_no_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pairs.jsonl").write_text('{"id": "a", "prompt": "Ask", "completion": 3}\n', encoding="utf-8")
    recipe: dict[str, Any] = {
        "name": "s",
        "steps": 1,
        "tokens_per_batch": 64,
        "policy": {"path": "policy"},
        "data": {"path": "pairs.jsonl"},
    }
    recipe |= {"learner": {"learning_rate": 1e-3}, "output": "out"}
    (folder / "s.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    assert main(["sft", "s.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pairs.jsonl: the completion of row a is no text but int; map a text column")


def test_logits_that_are_no_numbers_end_the_run_with_the_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "policy" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"].fill_(torch.nan)
    save_file(weights, file)
    assert main(["train", "r.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 1: 4 prompts have no completions, the first ")
    assert ": the policy's logits are not finite numbers; its weights are damaged; none has any: " in line


def test_an_evaluation_tells_what_the_reward_said() -> None:
    class FailingCrew:
        def sample_and_score(self, requests: list[GroupRequest], progress: object) -> Collected:
            failed = Score(0.0, ScoreStatus.ERROR, message="reward 'r': raised OSError: gone")
            rollout = Rollout("b", 0, np.array([1], np.int32), (), StopReason.EOS, "text")
            groups = [ScoredGroup(request.prompt, (), ()) for request in requests[:-1]] + [
                ScoredGroup(requests[-1].prompt, (rollout,), (failed,))
            ]
            return Collected(groups, {}, {})

    crew: Any = FailingCrew()
    settings = EvaluationSettings.model_validate({"data": {"path": "unused"}})
    heldout = HeldoutSet("heldout", settings, (Prompt("a", "?"), Prompt("b", "?")))
    rollout = RolloutSettings(prompts_per_step=1, max_completion_tokens=1)
    found = evaluate(crew, heldout, rollout, lambda done, total: None)
    text = "pass@1 unknown: the reward failed on all 1 completions of 2 prompts; the first: "
    assert str(found) == f"{text}reward 'r': raised OSError: gone"


def test_eval_without_a_single_score_is_a_mistake(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    import cispo.loop
    from cispo.evaluation import Evaluation
    from cispo.statistics import PromptOutcome

    class IdleCrew:
        def __init__(self, *_: object, **__: object) -> None: ...
        def close(self) -> None: ...

    unscored = PromptOutcome((), (), (), (), errors=2)
    nothing = Evaluation((unscored,), first_error="reward 'reward': raised OSError: gone")
    monkeypatch.setattr(cispo.loop, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(cispo.loop, "Crew", IdleCrew)
    monkeypatch.setattr(cispo.loop, "evaluate", lambda *_: nothing)
    overrides = ["evaluation={data: {path: prompts.jsonl, columns: {prompt: question}}}"]
    assert main(["eval", "r.yaml", *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [str(nothing)]
