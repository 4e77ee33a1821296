"""A prompt packed once with its branches: the bits of whole sequences, their gradients added up, on the CPU kernels."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.chunks import ChunkGrid, chunk_grid
from cispo.kernels.lightning_attention import decays, gated_lightning_attention, lightning_attention
from cispo.kernels.softmax_attention import softmax_attention
from cispo.model.mixers import rotary_table

HEADS, KEY_HEADS, DIM, ROTARY = 4, 2, 32, 16
SLOPES = decays(torch.tensor([0.917, 0.25, 0.06, 0.004]))
NORM = torch.linspace(0.5, 1.5, HEADS * DIM)
CPU = torch.device("cpu")

Family = tuple[int, list[int]]
"""Tokens of a prompt and of each of its branches."""

FAMILIES: list[list[Family]] = [
    [(16, [127, 127, 3, 60])],
    [(1, [1, 64, 63]), (5, [])],
    [(64, [1, 10]), (63, [1, 2, 70]), (65, [200, 63])],
    [(128, [64, 5]), (150, [42, 43, 106]), (20, [44, 45])],
    [(7, []), (130, [130]), (70, [])],
]

Attention = Callable[[Tensor, Tensor, ChunkGrid], Tensor]


def lightning(x: Tensor, positions: Tensor, grid: ChunkGrid) -> Tensor:
    return lightning_attention(x, SLOPES, grid)


def gated(x: Tensor, positions: Tensor, grid: ChunkGrid) -> Tensor:
    return gated_lightning_attention(x, NORM.to(x.dtype), 1e-6, SLOPES, grid)


def softmax(x: Tensor, positions: Tensor, grid: ChunkGrid) -> Tensor:
    rotary = rotary_table(positions, ROTARY, 100.0).to(x.dtype)
    return softmax_attention(x, rotary, HEADS, KEY_HEADS, grid)


KINDS: list[tuple[Attention, int]] = [
    (lightning, 3 * HEADS * DIM),
    (gated, 4 * HEADS * DIM),
    (softmax, (HEADS + 2 * KEY_HEADS) * DIM),
]
kinds = pytest.mark.parametrize(("attention", "columns"), KINDS, ids=["lightning", "gated", "softmax"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shared_grid(families: Sequence[Family]) -> ChunkGrid:
    lengths, first = [], []
    for prompt, branches in families:
        first.append(len(lengths))
        lengths += [prompt, *branches]
    return chunk_grid(lengths, CPU, families=first)


def positions_of(grid: ChunkGrid) -> Tensor:
    return torch.cat([torch.arange(s, s + n) for s, n in zip(grid.starts, grid.lengths, strict=True)])


def whole_rows(families: Sequence[Family]) -> tuple[Tensor, list[int]]:
    """Packed rows of every whole sequence, one after the other, and their lengths."""
    rows, lengths, at = [], [], 0
    for prompt, branches in families:
        own = at + prompt
        for branch in branches or [0]:
            rows.append(torch.cat((torch.arange(at, at + prompt), torch.arange(own, own + branch))))
            lengths.append(prompt + branch)
            own += branch
        at = own
    return torch.cat(rows), lengths


def first_copies(rows: Tensor, tokens: int) -> Tensor:
    """For each packed row, the first place among the whole sequences that it is at."""
    first = torch.full((tokens,), len(rows))
    return first.scatter_reduce(0, rows, torch.arange(len(rows)), "amin")


def shared(attention: Attention, x: Tensor, families: Sequence[Family], dout: Tensor) -> tuple[Tensor, Tensor]:
    grid, leaf = shared_grid(families), x.detach().requires_grad_()
    out = attention(leaf, positions_of(grid), grid)
    (gradient,) = torch.autograd.grad((out * dout).sum(), leaf)
    return out.detach(), gradient


def apart(attention: Attention, x: Tensor, families: Sequence[Family], dout: Tensor) -> tuple[Tensor, Tensor]:
    """Whole sequences, of which only the first of a family has the prompt's outputs."""
    rows, lengths = whole_rows(families)
    first = first_copies(rows, len(x))
    leaf = x.detach().requires_grad_()
    grid = chunk_grid(lengths, CPU)
    out = attention(leaf.index_select(0, rows), positions_of(grid), grid).index_select(0, first)
    (gradient,) = torch.autograd.grad((out * dout).sum(), leaf)
    return out.detach(), gradient


@kinds
@pytest.mark.parametrize("families", FAMILIES, ids=str)
def test_branches_have_the_bits_and_gradients_of_whole_sequences(
    families: list[Family], attention: Attention, columns: int
) -> None:
    tokens = sum(shared_grid(families).lengths)
    x, dout = random(tokens, columns), random(tokens, HEADS * DIM, seed=1)
    out, gradient = shared(attention, x, families, dout)
    wanted, reference = apart(attention, x, families, dout)
    assert torch.equal(out, wanted)
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)
    _, exact = apart(attention, x.double(), families, dout.double())
    error, of_whole = ((part.double() - exact).norm() / exact.norm() for part in (gradient, reference))
    assert error < max(2e-6, 2 * of_whole), (error, of_whole)
    with torch.no_grad():
        grid = shared_grid(families)
        assert torch.equal(attention(x, positions_of(grid), grid), wanted), "gradients change no bit"


@kinds
def test_neither_threads_nor_repeats_nor_neighbours_change_a_bit(attention: Attention, columns: int) -> None:
    families = [family for some in FAMILIES for family in some]
    tokens = sum(shared_grid(families).lengths)
    x, dout = random(tokens, columns), random(tokens, HEADS * DIM, seed=1)
    wanted = shared(attention, x, families, dout)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, shared(attention, x, families, dout), wanted))
    finally:
        torch.set_num_threads(before)
    sizes = [prompt + sum(branches) for prompt, branches in families]
    parts = zip(families, x.split(sizes), dout.split(sizes), *(part.split(sizes) for part in wanted), strict=True)
    for family, own_x, own_dout, *own_wanted in parts:
        assert all(map(torch.equal, shared(attention, own_x, [family], own_dout), own_wanted))


@kinds
def test_the_twin_refuses_branches(attention: Attention, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "serves", lambda *tensors: False)
    grid = shared_grid([(3, [2, 2])])
    with pytest.raises(ValueError, match="branches of a shared prompt are served by the CPU kernels alone"):
        attention(random(7, columns), positions_of(grid), grid)


def test_families_that_fit_no_pieces_are_refused() -> None:
    for families in ([1], [0, 0], [0, 3], []):
        with pytest.raises(ValueError, match="families begin at increasing pieces"):
            chunk_grid([3, 2, 2], CPU, families=families)
    with pytest.raises(ValueError, match="not given with starts"):
        chunk_grid([3, 2, 2], CPU, [0, 3, 3], families=[0])
    assert chunk_grid([3, 2, 2, 9], CPU, families=[0, 3]).starts == (0, 3, 3, 0)
