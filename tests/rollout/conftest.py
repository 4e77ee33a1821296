"""The small random policy, loaded once for all tests of the engine."""

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
