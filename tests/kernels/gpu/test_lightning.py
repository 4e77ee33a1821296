"""The Triton kernels of lightning attention in Triton's interpreter, against their twin."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH, ChunkGrid, chunk_grid
from cispo.kernels.gpu import lightning_backward, lightning_decode, lightning_forward
from cispo.kernels.lightning_attention import Decays, decays, lightning_attention, lightning_prefill
from cispo.kernels.lightning_attention import lightning_decode as twin_decode

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels run on it: see the mark gpu")

SLOPES_H = torch.tensor([0.917, 0.004])
HEADS = len(SLOPES_H)
CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3}
Caches = tuple[Tensor, Tensor, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(value: Tensor, wanted: Tensor) -> float:
    value, wanted = value.detach().double(), wanted.detach().double()
    return float((value - wanted).norm() / wanted.norm())


def empty_caches(slots: int, dim: int, dtype: torch.dtype) -> Caches:
    state = torch.full((slots, HEADS, dim, dim), torch.nan)
    k_recent = torch.full((slots, HEADS, dim, CHUNK_LENGTH), torch.nan, dtype=dtype)
    return state, k_recent, torch.full((slots, HEADS, CHUNK_LENGTH, dim), torch.nan, dtype=dtype)


def twin(qkv_NI: Tensor, grid: ChunkGrid) -> Tensor:
    return lightning_attention(qkv_NI.float(), decays(SLOPES_H), grid)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("dim", "lengths"), [(64, [5, 64, 130, 1]), (128, [70]), (64, [128, 63])])
def test_forward_and_gradient_equal_the_twin(dim: int, lengths: list[int], dtype: torch.dtype) -> None:
    grid = chunk_grid(lengths, CPU)
    wider = random(sum(lengths), 4 * HEADS * dim).to(dtype)
    x_NI = wider[:, : 3 * HEADS * dim].requires_grad_()
    dout_NJ = random(sum(lengths), HEADS * dim, seed=1).to(dtype)
    out_NJ = lightning_backward.attention(x_NI, SLOPES_H, grid)
    (gradient,) = torch.autograd.grad(out_NJ, x_NI, dout_NJ)
    x_twin = x_NI.detach().float().requires_grad_()
    wanted_NJ = twin(x_twin, grid)
    (wanted_gradient,) = torch.autograd.grad(wanted_NJ, x_twin, dout_NJ.float())
    assert out_NJ.dtype == gradient.dtype == dtype
    assert error(out_NJ, wanted_NJ) < TOLERANCES[dtype]
    assert error(gradient, wanted_gradient) < TOLERANCES[dtype]


@pytest.mark.parametrize(("dim", "lengths"), [(64, [5, 64, 130, 1]), (128, [70])])
def test_gradient_of_the_operands_is_that_before_silu(dim: int, lengths: list[int]) -> None:
    grid = chunk_grid(lengths, CPU)
    x_NI = random(sum(lengths), 3 * HEADS * dim).requires_grad_()
    dout_NJ = random(sum(lengths), HEADS * dim, seed=1)
    qkv_NI = torch.nn.functional.silu(x_NI)
    gradient = lightning_backward.backward(qkv_NI.detach(), None, dout_NJ, SLOPES_H, grid)
    (gradient,) = torch.autograd.grad(qkv_NI, x_NI, gradient)
    x_twin = x_NI.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(twin(x_twin, grid), x_twin, dout_NJ)
    assert error(gradient, wanted) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("dim", "cuts"), [(64, [0, 10, 50, 64, 130, 190]), (64, [0, 128, 129]), (128, [0, 70, 126])])
def test_pieces_and_tokens_go_on_from_the_caches(dim: int, cuts: list[int], dtype: torch.dtype) -> None:
    """A sequence in pieces beside one of 65 tokens, then token by token over the next boundary: all as in one shot."""
    tokens, slot_B = cuts[-1] + 4, torch.tensor([2, 0])
    x = [random(tokens, 3 * HEADS * dim, seed=seed).to(dtype) for seed in (0, 1)]
    wanted = [twin(rows, chunk_grid([tokens], CPU)) for rows in x]
    caches = empty_caches(3, dim, dtype)
    for begin, end in pairwise(cuts):
        pieces = [x[0][begin:end]] + ([x[1][:65]] if begin == 0 else [])
        grid = chunk_grid([len(piece) for piece in pieces], CPU, [begin, 0][: len(pieces)])
        rows = lightning_forward.silu_rows(torch.cat(pieces))
        out = lightning_forward.prefill(rows, SLOPES_H, grid, slot_B[: len(pieces)], *caches)
        assert error(out[: end - begin], wanted[0][begin:end]) < TOLERANCES[dtype]
        if begin == 0:
            assert error(out[end:], wanted[1][:65]) < TOLERANCES[dtype]
    order = torch.tensor([0, 2])
    copy = caches[0].to(dtype)
    for step in range(tokens - cuts[-1]):
        positions = [65 + step, cuts[-1] + step]
        rows = torch.stack([x[1][positions[0]], x[0][positions[1]]])
        row_B = torch.tensor(positions) % CHUNK_LENGTH
        out = lightning_decode.decode(rows, SLOPES_H, order, row_B, *caches, copy if dtype is torch.float16 else None)
        assert error(out[0], wanted[1][positions[0]]) < 2 * TOLERANCES[dtype]
        assert error(out[1], wanted[0][positions[1]]) < 2 * TOLERANCES[dtype]


def test_pieces_leave_what_the_twin_leaves() -> None:
    slopes: Decays = decays(SLOPES_H)
    lengths, slot_B = [64, 130, 3], torch.tensor([1, 2, 0])
    x_NI = random(sum(lengths), 3 * HEADS * 64)
    ours, theirs = empty_caches(3, 64, torch.float32), empty_caches(3, 64, torch.float32)
    rows_NI = lightning_forward.silu_rows(x_NI)
    lightning_forward.prefill(rows_NI, SLOPES_H, chunk_grid(lengths, CPU), slot_B, *ours)
    lightning_prefill(x_NI, slopes, chunk_grid(lengths, CPU), slot_B, *theirs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    for slot, rows in ((2, 2), (0, 3)):
        torch.testing.assert_close(ours[1][slot, :, :, :rows], theirs[1][slot, :, :, :rows])
        torch.testing.assert_close(ours[2][slot, :, :rows], theirs[2][slot, :, :rows])
    row_B = torch.tensor([3, 0, 2])
    token = random(3, 3 * HEADS * 64, seed=5)
    places = torch.arange(3)
    decoded = lightning_decode.decode(token, SLOPES_H, places, row_B, *ours)
    wanted = twin_decode(token, slopes, places, row_B, None, *theirs)
    torch.testing.assert_close(decoded, wanted, rtol=1e-4, atol=1e-4)
