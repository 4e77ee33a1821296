"""The chunk grid refuses what has no place on it."""

import pytest
import torch

from cispo.kernels.chunks import chunk_grid


def test_a_sequence_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        chunk_grid([3, 0], torch.device("cpu"))
