"""The small random policy, loaded once for all tests of the engine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cispo.model.checkpoint import load_policy
from cispo.model.tokenizer import Tokenizer
from tests.rollout.trials import Policy


@pytest.fixture(scope="session")
def policy(small_policy_folder: Path) -> Policy:
    """Float32, on CPU; read-only by convention."""
    decoder = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    return Policy(decoder, Tokenizer.load(small_policy_folder))


@pytest.fixture
def fresh_policy(small_policy_folder: Path) -> Callable[[], Policy]:
    """Copies of that policy whose weights may be changed."""

    def load() -> Policy:
        decoder = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
        return Policy(decoder, Tokenizer.load(small_policy_folder))

    return load


@pytest.fixture(scope="session")
def syllable_policy(small_policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The same with a tokenizer that also has tokens of several characters."""
    folder = tmp_path_factory.mktemp("syllables")
    shutil.copytree(small_policy_folder, folder, dirs_exist_ok=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [["a", "b"], ["b", "a"], ["ab", "ab"], ["b", "ab"]]
    for number, (first, second) in enumerate(merges):
        tokenizer["model"]["vocab"][first + second] = 256 + number
    tokenizer["model"]["merges"] = merges
    for special in tokenizer["added_tokens"]:
        special["id"] += len(merges)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return Policy(load_policy(folder, dtype=torch.float32, device="cpu"), Tokenizer.load(folder))
