"""Drawing tokens on CUDA: in the interpreter here, on the GPU where there is one."""

import pytest
import torch

from cispo.kernels.gpu.choose import choose
from cispo.rollout.sampling import _plain


@pytest.mark.parametrize("vocabulary", [5, 4096, 9001])
def test_the_same_tokens_as_plain_pytorch(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits_BV = 3 * torch.randn(40, vocabulary, generator=generator)
    logits_BV[:, 1] = float("-inf")
    uniform_B = torch.rand(40, generator=generator, dtype=torch.float64)
    uniform_B[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    temperature_B = torch.linspace(0.5, 2.0, 40)
    temperature_B[::7] = 0.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids_B = choose(*(x.to(device) for x in (logits_BV, uniform_B, temperature_B))).cpu()
    expected_B, _ = _plain(logits_BV, uniform_B, temperature_B, None)
    assert (ids_B != 1).all()
    # Another order of sums may choose the neighbour where a number lies within rounding of a border.
    assert int((ids_B != expected_B).sum()) <= 1
    assert torch.equal(ids_B[::7], expected_B[::7])


def test_rows_with_nan_give_an_id_of_the_vocabulary() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nan_BV = torch.full((2, 9), float("nan"), device=device)
    ids_B = choose(nan_BV, torch.tensor([0.0, 0.5], dtype=torch.float64, device=device), nan_BV.new_tensor([1.0, 0.0]))
    assert ((ids_B >= 0) & (ids_B < 9)).all()
