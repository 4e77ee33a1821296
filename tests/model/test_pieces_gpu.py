"""On a GPU in float32: pieces, decode and forks against one forward, at most 5e-5 apart."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cispo.model.checkpoint import load_policy

TOLERANCE = 5e-5


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("piece", [1, 7, 64, 300])
def test_pieces_forks_and_decode_are_close_to_one_shot(small_policy_folder: Path, piece: int) -> None:
    decoder = load_policy(small_policy_folder, dtype=torch.float32, device="cuda")
    length, decoded = (400 if piece > 1 else 130), 70
    generator = torch.Generator().manual_seed(piece)
    ids = torch.randint(0, decoder.trained_ids, (length + decoded,), generator=generator).cuda()
    positions = torch.arange(length + decoded, device="cuda")
    wanted = decoder.logits(decoder(ids, positions, torch.tensor([0, length + decoded]).int()))
    cache, rows = decoder.new_cache(capacity=4, max_tokens=length + decoded), []
    for start in range(0, length, piece):
        span = slice(start, min(start + piece, length))
        taken = span.stop - span.start
        rows.append(decoder(ids[span], positions[span], torch.tensor([0, taken]).int(), cache.extend([0], [taken])))
    torch.testing.assert_close(decoder.logits(torch.cat(rows)), wanted[:length], atol=TOLERANCE, rtol=0)
    cache.fork(0, range(1, 4))
    for position in range(length, length + decoded):
        hidden = decoder.decode(ids[position].expand(4), cache.begin_step(np.arange(4)), cache)
        logits = decoder.logits(hidden)
        torch.testing.assert_close(logits, wanted[position].expand(4, -1), atol=TOLERANCE, rtol=0)
