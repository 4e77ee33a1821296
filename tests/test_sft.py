import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.data import DataSettings
from cispo.errors import CispoError, DataError, RunFolderError
from cispo.metric_table import check_names
from cispo.model.checkpoint import load_policy
from cispo.model.tokenizer import Tokenizer
from cispo.recipe.sft_schema import SftRecipe
from cispo.sft import SftTrainer, run_sft
from cispo.sft_data import Example, batches, load_examples, micro_batches


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    rows = [
        {"id": str(i), "prompt": f"add {a} and {b}", "completion": f"x + {a + b}", "kind": "sum"}
        for i, (a, b) in enumerate(rng.integers(0, 50, (count, 2)).tolist())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_recipe(small_policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "rows.jsonl", 40)

    def make(**changes: object) -> SftRecipe:
        values: dict[str, object] = {
            "name": "run",
            "steps": 12,
            "tokens_per_batch": 200,
            "policy": {"path": str(small_policy_folder)},
            "data": {"path": str(data)},
            "learner": {"learning_rate": 3e-3, "warmup_updates": 2, "weight_decay": 0.1},
            "output": "out",
        }
        return SftRecipe.model_validate({**values, **changes})

    return make


def metrics_of(run: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith(("time_s/", "perf/"))} for line in lines
    ]


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return dict(load_policy(Path(folder), dtype=torch.float32, device="cpu").named_parameters())


def assert_same_policy(left: str, right: str) -> None:
    other = weights_of(right)
    assert [name for name, tensor in weights_of(left).items() if not torch.equal(tensor, other[name])] == []


def test_the_loss_is_on_the_completion_and_its_eos(small_policy_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(small_policy_folder)
    data = DataSettings(path=str(write_rows(tmp_path / "rows.jsonl", 3)))
    examples = load_examples(data, tokenizer, base_path=tmp_path)
    micro = micro_batches(examples, 1000)[0]
    targets = micro.targets_M.tolist()
    texts = [json.loads(line)["completion"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert targets == [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_id)]
    before = micro.ids_N[micro.rows_M[0]]
    assert int(before) == tokenizer.render_prompt("add 1 and 2")[-1], "the first target follows the generation prompt"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=20), st.integers(1, 100))
def test_micro_batches_predict_each_completion_token_from_its_own_past(
    sizes: list[tuple[int, int]], budget: int
) -> None:
    tokens = iter(range(10_000))
    examples = [
        Example(np.array(list(islice(tokens, prompt + completion)), dtype=np.int32), prompt)
        for prompt, completion in sizes
    ]
    want = {int(token): example for example in examples for token in example.token_ids_T[example.prompt_tokens :]}
    for micro in micro_batches(examples, budget):
        starts = micro.cu_seqlens.tolist()
        assert len(micro.ids_N) <= budget or len(starts) == 2
        assert starts[-1] == len(micro.ids_N) == len(micro.positions_N)
        for row, target in zip(micro.rows_M.tolist(), micro.targets_M.tolist(), strict=True):
            example = want.pop(target)
            start = max(begin for begin in starts[:-1] if begin <= row)
            past = micro.ids_N[start : row + 1].tolist()
            assert past == example.token_ids_T[: len(past)].tolist()
            assert int(example.token_ids_T[len(past)]) == target
            assert int(micro.positions_N[row]) == row - start
    assert not want


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 60), st.integers(0, 9))
def test_batches_pass_over_all_examples_and_follow_from_their_number(
    lengths: list[int], budget: int, first: int
) -> None:
    made = list(islice(batches(lengths, budget, seed=5), 40))
    for batch in made:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    order = [index for batch in made for index in batch]
    for start in range(0, len(order) - len(lengths) + 1, len(lengths)):
        assert sorted(order[start : start + len(lengths)]) == list(range(len(lengths)))
    assert list(islice(batches(lengths, budget, seed=5, first=first), 10)) == made[first : first + 10]


def test_training_lowers_the_loss_and_writes_a_policy(make_recipe: Any, small_policy_folder: Path) -> None:
    recipe = make_recipe(steps=40, evaluation={"data": {"path": "rows.jsonl"}, "every_steps": 15})
    assert run_sft(recipe) == Path("out").resolve()
    lines = metrics_of("run")
    assert [line["step"] for line in lines] == [15, 20, 30, 40]
    assert lines[-1]["sft/loss"] < 0.5 * lines[0]["sft/loss"]
    assert lines[-1]["sft/heldout_loss"] < lines[0]["sft/heldout_loss"]
    assert "sft/heldout_loss" not in lines[1]
    check_names(name for line in lines for name in line if name != "step")
    assert Tokenizer.load("out").eos_id == Tokenizer.load(small_policy_folder).eos_id
    assert not torch.equal(weights_of("out")["embedding"], weights_of(small_policy_folder)["embedding"])
    assert [path.name for path in Path().iterdir() if path.name.startswith(".out")] == []


def test_held_out_loss_is_the_mean_over_completion_tokens(make_recipe: Any, small_policy_folder: Path) -> None:
    recipe = make_recipe(
        evaluation={"data": {"path": "rows.jsonl"}},
        learner={"learning_rate": 1e-3, "tokens_per_micro_batch": 100},
    )
    tokenizer = Tokenizer.load(small_policy_folder)
    trainer = SftTrainer(recipe, small_policy_folder, tokenizer)
    total, count = 0.0, 0
    for example in load_examples(recipe.data, tokenizer, base_path=Path()):
        ids = torch.from_numpy(example.token_ids_T).long()
        with torch.no_grad():
            hidden = trainer.decoder(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32))
            logprob = trainer.decoder.logits(hidden[:-1]).log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        total -= float(logprob[example.prompt_tokens - 1 :].sum())
        count += example.loss_tokens
    assert trainer._held_out_loss() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("policy", [{"dtype": "float32", "init": "random"}, {"dtype": "bfloat16"}], ids=str)
def test_a_run_that_broke_and_was_resumed_equals_one_left_alone(
    make_recipe: Any, small_policy_folder: Path, monkeypatch: pytest.MonkeyPatch, policy: dict[str, str]
) -> None:
    changes: dict[str, object] = {
        "policy": {"path": str(small_policy_folder), **policy},
        "checkpoint": {"every_steps": 5},
    }
    run_sft(make_recipe(**changes))
    step = SftTrainer._step
    taken: list[int] = []

    def break_once(trainer: SftTrainer, members: Sequence[int]) -> None:
        taken.append(1)
        if len(taken) == 8:
            raise KeyboardInterrupt
        step(trainer, members)

    monkeypatch.setattr(SftTrainer, "_step", break_once)
    broken = make_recipe(**changes, name="broken", output="out2")
    with pytest.raises(KeyboardInterrupt):
        run_sft(broken)
    run_sft(broken, resume=True)
    assert len(taken) == 8 + 7, "only the steps after the checkpoint of step 5 are taken again"
    assert metrics_of("broken") == metrics_of("run")
    assert_same_policy("out", "out2")


def test_micro_batches_change_no_result(make_recipe: Any) -> None:
    run_sft(make_recipe())
    learner = {"learning_rate": 3e-3, "warmup_updates": 2, "weight_decay": 0.1, "tokens_per_micro_batch": 40}
    run_sft(make_recipe(name="split", output="out2", learner=learner))
    for whole, split in zip(metrics_of("run"), metrics_of("split"), strict=True):
        assert split["sft/loss"] == pytest.approx(whole["sft/loss"], rel=1e-3)


def test_a_row_without_a_completion_is_named(make_recipe: Any) -> None:
    Path("bad.jsonl").write_text(
        '{"id": "a", "prompt": "p", "completion": "c"}\n{"id": "b", "prompt": "p", "text": "c"}\n'
    )
    with pytest.raises(DataError, match="completion"):
        run_sft(make_recipe(data={"path": "bad.jsonl"}))


def test_an_output_that_exists_is_never_overwritten(make_recipe: Any) -> None:
    Path("out").mkdir()
    with pytest.raises(RunFolderError, match="output=PATH"):
        run_sft(make_recipe())


def test_a_run_that_is_over_is_not_run_again(make_recipe: Any) -> None:
    run_sft(make_recipe(steps=2))
    with pytest.raises(RunFolderError, match="exists already"):
        run_sft(make_recipe(steps=2, output="elsewhere"))


def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(make_recipe: Any) -> None:
    with pytest.raises(CispoError, match=r"step 12: .* not finite"):
        run_sft(make_recipe(learner={"learning_rate": 1e38, "max_grad_norm": math.inf, "schedule": "constant"}))
    assert not list(Path("runs/run/checkpoints").iterdir())
    assert not Path("out").exists()


def test_the_routers_loss_does_not_depend_on_the_split_and_evens_out_the_loads(make_recipe: Any) -> None:
    aux: list[float] = []
    for name, budget in (("whole", 10_000), ("split", 60)):
        rates = {"learning_rate": 3e-3, "eps": 1e-3, "router_aux_loss_coef": 0.5, "tokens_per_micro_batch": budget}
        run_sft(make_recipe(name=name, output=f"out_{name}", steps=4, learner=rates))
        (line,) = metrics_of(name)
        check_names(set(line) - {"step"})
        assert line["router/max_load"] > 1.0
        aux.append(line["loss/router_aux"])
    assert aux[1] == pytest.approx(aux[0], rel=1e-5)
    for name, tensor in weights_of("out_whole").items():
        torch.testing.assert_close(weights_of("out_split")[name], tensor, rtol=1e-3, atol=1e-5)
    rates = {"learning_rate": 3e-3, "router_aux_loss_coef": 5.0}
    run_sft(make_recipe(name="longer", output="out_longer", steps=40, learner=rates))
    lines = metrics_of("longer")
    assert 2.0 - 1e-3 < lines[-1]["loss/router_aux"] < lines[0]["loss/router_aux"] < aux[0]
