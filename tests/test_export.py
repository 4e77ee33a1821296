"""`cispo export`: the policy of a checkpoint as transformers and this project load it."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.checkpoint import save_checkpoint
from cispo.cli import main
from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder
from cispo.model.gguf import read_gguf
from cispo.model.tokenizer import Tokenizer
from cispo.smollm2 import write_policy
from tests.model.test_gguf import gguf_bytes
from tests.test_smollm2 import metadata, weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small Llama with checkpoints of three steps, whose weights tell them apart; the second is the best."""
    place = tmp_path_factory.mktemp("run")
    data = metadata()
    tensors = [
        (f"{name}.weight", array.shape, 0, array.tobytes())
        for name, array in weights(len(data["tokenizer.ggml.tokens"])).items()
    ]
    (place / "x.gguf").write_bytes(gguf_bytes(data, tensors))
    write_policy(read_gguf(place / "x.gguf"), place / "policy")
    decoder = load_policy(place / "policy", dtype=torch.float32, device=CPU)
    tokenizer = Tokenizer.load(place / "policy")
    for step in (1, 2, 10):
        with torch.no_grad():
            decoder.head_weight.add_(1.0)
        folder = place / "checkpoints" / f"step_{step:06d}"
        save_checkpoint(folder, decoder=decoder, tokenizer=tokenizer, learner_state={}, loop_state={}, keep=9)
    rows: list[dict[str, Any]] = [{"step": 1, "eval/heldout/pass@1": 0.1, "reward/mean": 9.0}]
    rows += [{"step": 2, "eval/heldout/pass@1": 0.3}, {"step": 5, "eval/heldout/pass@1": 0.5}, {"step": 10}]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "ev')
    (place / "recipe.yaml").write_text("checkpoint: {keep_best: null}\n")
    return place


def exported(run: Path, target: Path, *options: str) -> Decoder:
    assert main(["export", str(run), str(target), *options]) == 0
    return load_policy(target, dtype=torch.float32, device=CPU)


def test_newest_best_and_named_steps(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (options, step) in enumerate([((), 10), (("--best",), 2), (("--step", "1"), 1)]):
        ours = exported(run, tmp_path / str(number), *options)
        kept = load_policy(run / "checkpoints" / f"step_{step:06d}" / "policy", dtype=torch.float32, device=CPU)
        assert torch.equal(ours.head_weight, kept.head_weight)
        assert f"the policy after step {step} of" in capsys.readouterr().out
    (run / "recipe.yaml").write_text("checkpoint: {keep_best: reward/mean}\n")
    exported(run, tmp_path / "by reward", "--best")
    assert "the policy after step 1 of" in capsys.readouterr().out


def test_transformers_loads_it_and_knows_where_completions_end(run: Path, tmp_path: Path) -> None:
    ours = exported(run, tmp_path / "policy")
    transformers = importlib.import_module("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    assert theirs.generation_config.eos_token_id == 2
    ids = torch.tensor([5, 17, 90, 3])
    with torch.no_grad():
        found = ours(ids, torch.arange(4), torch.tensor([0, 4])) @ ours.head_weight.T
        torch.testing.assert_close(found, theirs(ids[None]).logits[0, :, : found.shape[1]], rtol=1e-4, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert tokenizer("12an").input_ids == Tokenizer.load(tmp_path / "policy").encode("12an")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "7"], "has no checkpoint of step 7; there is 1, 2, 10"),
        (["--best"], "was measured by eval/other/pass@1; choose one with --step"),
    ],
)
def test_what_is_not_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (run / "recipe.yaml").write_text("checkpoint: {keep_best: eval/other/pass@1}\n")
    assert main(["export", str(run), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_is_written_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(["export", str(run), str(tmp_path)]) == 2
    assert "exists already; name a folder that does not" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is no run folder with checkpoints" in capsys.readouterr().err
