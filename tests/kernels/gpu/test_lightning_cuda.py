"""Lightning attention on a GPU: against the recurrence's closed form in float64, and one arithmetic in all phases."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH, chunk_grid
from cispo.kernels.lightning_attention import Decays, decays, lightning_attention, lightning_decode, lightning_prefill

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SLOPES = [0.917, 0.25, 0.06, 0.004, 1e-3, 1e-5]
HEADS = len(SLOPES)
LIMIT = 3.0e-3
Caches = tuple[Tensor, Tensor, Tensor]


def slopes() -> Decays:
    return decays(torch.tensor(SLOPES, device=CUDA))


def projections(tokens: int, dim: int, seed: int = 0) -> Tensor:
    """Columns of a wider buffer, as the model has them."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    wider = torch.randn(tokens, 4 * HEADS * dim, device=CUDA, generator=generator).bfloat16()
    return wider[:, : 3 * HEADS * dim]


def reference(x_NI: Tensor, lengths: list[int]) -> Tensor:
    """Decayed scores times values, sequence by sequence, in float64, of operands rounded as for the kernels."""
    slopes_H11 = torch.tensor(SLOPES, device=CUDA, dtype=torch.float64)[:, None, None]
    outs = []
    exact_NI = F.silu(x_NI)
    rounding_NI = (F.silu(x_NI.bfloat16()).double() - exact_NI).detach()
    for rows in (exact_NI + rounding_NI).split(lengths):
        q, k, v = rows.view(len(rows), HEADS, 3, -1).permute(2, 1, 0, 3)
        position_T = torch.arange(len(rows), device=CUDA)
        distance_TT = position_T[:, None] - position_T
        decay_HTT = torch.exp(-slopes_H11 * distance_TT.clamp(min=0)) * (distance_TT >= 0)
        outs.append((((q @ k.mT) * decay_HTT) @ v).transpose(0, 1).flatten(1))
    return torch.cat(outs)


def error(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lengths", [[300, 1, 64, 129, 63, 1000], [2048], [1]], ids=str)
def test_equals_float64(dim: int, lengths: list[int]) -> None:
    x_NI = projections(sum(lengths), dim).requires_grad_()
    dout_NJ = torch.randn(sum(lengths), HEADS * dim, device=CUDA).bfloat16()
    out_NJ = lightning_attention(x_NI, slopes(), chunk_grid(lengths, CUDA))
    (gradient_NI,) = torch.autograd.grad(out_NJ, x_NI, dout_NJ)
    x_double = x_NI.detach().double().requires_grad_()
    wanted_NJ = reference(x_double, lengths)
    (wanted_NI,) = torch.autograd.grad(wanted_NJ, x_double, dout_NJ.double())
    assert out_NJ.dtype is gradient_NI.dtype is torch.bfloat16
    # One row has one score, and its rounding of up to 2^-8 meets no other's.
    limit = LIMIT if sum(lengths) > 1 else 2**-7
    for ours, theirs in zip(out_NJ.detach().split(dim, 1), wanted_NJ.detach().split(dim, 1), strict=True):
        assert error(ours, theirs) < limit
    for part in range(3):
        ours, theirs = (grad.view(-1, HEADS, 3, dim)[:, :, part] for grad in (gradient_NI, wanted_NI))
        assert error(ours, theirs) < limit


def empty_caches(dim: int) -> Caches:
    """Three slots of what means nothing."""
    state = torch.full((3, HEADS, dim, dim), torch.nan, device=CUDA)
    k_recent = torch.full((3, HEADS, dim, CHUNK_LENGTH), torch.nan, device=CUDA, dtype=torch.bfloat16)
    return state, k_recent, torch.full_like(k_recent, torch.nan).view(3, HEADS, CHUNK_LENGTH, dim)


@pytest.mark.parametrize("has_copy", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("cuts", [[0, 10, 50, 64, 130, 200], [0, 128, 129, 192], [0, 70, 140, 256], [0, 321]], ids=str)
def test_pieces_tokens_and_one_shot_have_the_same_bits(dim: int, cuts: list[int], has_copy: bool) -> None:
    tokens = 400
    x_BTI = projections(2 * tokens, dim).unflatten(0, (2, tokens))
    one_shot = lightning_attention(x_BTI.flatten(0, 1), slopes(), chunk_grid([tokens] * 2, CUDA)).view(2, tokens, -1)
    caches = empty_caches(dim)
    copy = caches[0].bfloat16() if has_copy else None
    slot_B = torch.tensor([2, 0], device=CUDA)
    for begin, end in pairwise(cuts):
        grid = chunk_grid([end - begin] * 2, CUDA, [begin] * 2)
        pieces = x_BTI[:, begin:end].flatten(0, 1)
        out = lightning_prefill(pieces, slopes(), grid, slot_B, *caches, copy).view(2, end - begin, -1)
        assert torch.equal(out, one_shot[:, begin:end])
    for position in range(cuts[-1], tokens):
        row_B = torch.full_like(slot_B, position % CHUNK_LENGTH)
        out = lightning_decode(x_BTI[:, position], slopes(), slot_B, row_B, None, *caches, copy)
        assert torch.equal(out, one_shot[:, position])


def test_a_row_has_the_same_bits_whatever_lies_beside_it() -> None:
    x_NI = projections(1000, 128)
    alone = lightning_attention(x_NI[300:529], slopes(), chunk_grid([229], CUDA))
    packed = lightning_attention(x_NI, slopes(), chunk_grid([300, 229, 471], CUDA))
    assert torch.equal(alone, packed[300:529])


def test_decode_is_captured_in_a_graph() -> None:
    """Replays of one graph over rows that change go through a chunk's boundary, with the bits of plain calls."""
    x_BI, row_B = projections(2, 64), torch.zeros(2, device=CUDA, dtype=torch.int64)
    every_B, constants = torch.arange(2, device=CUDA), slopes()
    caches = tuple(torch.zeros_like(cache[:2]) for cache in empty_caches(64))
    graphed = tuple(cache.clone() for cache in caches)
    lightning_decode(x_BI, constants, every_B, row_B, None, *(cache.clone() for cache in caches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lightning_decode(x_BI, constants, every_B, row_B, None, *graphed)
    for position in range(70):
        x_BI.copy_(projections(2, 64, seed=position))
        row_B.fill_(position % CHUNK_LENGTH)
        graph.replay()
        assert torch.equal(out, lightning_decode(x_BI, constants, every_B, row_B, None, *caches))
