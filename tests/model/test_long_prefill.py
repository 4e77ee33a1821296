"""A prompt of 65,536 tokens in pieces, on CPU: the bits of one forward, and a cache that grows by pages alone."""

from pathlib import Path

import pytest
import torch

from cispo.model.cache import PAGE_LENGTH
from cispo.model.checkpoint import load_policy

TOKENS, PIECE = 1 << 16, 4096


@pytest.mark.slow
@torch.inference_mode()
def test_a_long_prompt_in_pieces_has_the_bits_of_one_forward(small_policy_folder: Path) -> None:
    decoder = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    ids = torch.randint(0, decoder.trained_ids, (TOKENS,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(TOKENS)
    whole = decoder(ids, positions, torch.tensor([0, TOKENS]).int())
    cache = decoder.new_cache(capacity=1, max_tokens=TOKENS)
    for start in range(0, TOKENS, PIECE):
        piece = slice(start, start + PIECE)
        rows = decoder(ids[piece], positions[piece], torch.tensor([0, PIECE]).int(), cache.extend([0], [PIECE]))
        assert torch.equal(rows, whole[piece])
        assert cache.pages_in_use == cache.length(0) // PAGE_LENGTH
