"""The Triton kernels of softmax attention against their plain-PyTorch twin, and their phases against each other."""

import pytest
import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.chunks import CHUNK_LENGTH, ChunkGrid, chunk_grid
from cispo.kernels.softmax_attention import softmax_attention, softmax_decode, softmax_prefill
from cispo.kernels.softmax_cpu import Pages
from cispo.model.mixers import rotary_table

LENGTHS = [5, 64, 150, 1, 70]
SIZES = [(4, 2, 64, 32), (2, 2, 128, 128), (3, 1, 64, 0)]
"""Query heads, key heads, head dim, rotated dims."""

Size = tuple[int, int, int, int]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(lengths: list[int], size: Size, dtype: torch.dtype, device: torch.device = DEVICE) -> tuple[Tensor, Tensor]:
    heads, key_heads, dim, rotary_dim = size
    drawn = torch.randn(sum(lengths), (heads + 2 * key_heads) * dim, generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return drawn.to(device, dtype), rotary_table(positions, rotary_dim, 100.0).to(device)


def grid_of(lengths: list[int], starts: list[int] | None = None, device: torch.device = DEVICE) -> ChunkGrid:
    return chunk_grid(lengths, device, starts)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def out_and_gradient(qkv: Tensor, rotary: Tensor, size: Size, lengths: list[int]) -> tuple[Tensor, Tensor]:
    from cispo.kernels.gpu import softmax

    leaf = qkv.detach().clone().requires_grad_()
    out = softmax.attention(leaf, rotary, size[0], size[1], grid_of(lengths, device=qkv.device))
    weight = torch.linspace(-1, 1, out.shape[1], device=qkv.device, dtype=qkv.dtype)
    (gradient,) = torch.autograd.grad(out, leaf, weight.expand_as(out))
    return out.detach(), gradient


def twins(qkv: Tensor, rotary: Tensor, size: Size, lengths: list[int]) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().double().float().requires_grad_()
    out = softmax_attention(leaf, rotary, size[0], size[1], grid_of(lengths, device=qkv.device))
    weight = torch.linspace(-1, 1, out.shape[1], device=qkv.device).expand_as(out)
    (gradient,) = torch.autograd.grad(out, leaf, weight)
    return out.detach(), gradient


def new_pages(lengths: list[int], size: Size, dtype: torch.dtype, device: torch.device) -> Pages:
    """Pages of NaN in no order; page 0 belongs to idle rows and holds numbers."""
    _, key_heads, dim, _ = size
    each = -(-max(lengths) // CHUNK_LENGTH)
    table = 1 + torch.randperm(len(lengths) * each, generator=torch.Generator().manual_seed(2)).view(-1, each)
    shapes = (1 + table.numel(), key_heads, dim, CHUNK_LENGTH), (1 + table.numel(), key_heads, CHUNK_LENGTH, dim)
    k, v = (torch.full(shape, float("nan"), dtype=dtype, device=device) for shape in shapes)
    k[0], v[0] = 0.0, 0.0
    return Pages(k, v, table.to(device))


def check_phases(size: Size, dtype: torch.dtype, device: torch.device, lengths: list[int], prompts: list[int]) -> None:
    """Prompts in two pieces, the rest token by token beside idle rows: all equal the packed forward bit for bit."""
    from cispo.kernels.gpu import softmax

    heads, key_heads = size[:2]
    qkv, rotary = inputs(lengths, size, dtype, device)
    whole = softmax.attention(qkv, rotary, heads, key_heads, grid_of(lengths, device=device)).split(lengths)
    pages = new_pages(lengths, size, dtype, device)
    sequences, angles = qkv.split(lengths), rotary.split(lengths)
    halves = [length // 3 for length in prompts]
    for begins, ends in (([0] * len(lengths), halves), (halves, prompts)):
        spans = list(zip(begins, ends, strict=True))
        taken = [b for b, (begin, end) in enumerate(spans) if end > begin]
        rows, turns = (torch.cat([x[b][slice(*spans[b])] for b in taken]) for x in (sequences, angles))
        pieces, starts = [spans[b][1] - spans[b][0] for b in taken], [spans[b][0] for b in taken]
        their_pages = pages._replace(table_BJ=pages.table_BJ[taken])
        out = softmax.prefill(rows, turns, heads, key_heads, grid_of(pieces, starts, device), their_pages)
        for b, piece in zip(taken, out.split(pieces), strict=True):
            assert torch.equal(piece, whole[b][slice(*spans[b])])
    idle = torch.zeros(2, pages.table_BJ.shape[1], dtype=torch.int64, device=device)
    every = pages._replace(table_BJ=torch.cat((pages.table_BJ, idle)))
    for step in range(max(length - prompt for length, prompt in zip(lengths, prompts, strict=True))):
        at = [min(prompt + step, length - 1) for length, prompt in zip(lengths, prompts, strict=True)]
        position_B = torch.tensor([*at, 0, 0], device=device)
        row_B = torch.tensor([0, *torch.tensor(lengths).cumsum(0)[:-1]], device=device) + position_B[:-2]
        row_B = torch.cat((row_B, row_B[:2]))
        out = softmax.decode(qkv[row_B], rotary[row_B], heads, key_heads, every, position_B)
        assert out.isfinite().all()
        for b, position in enumerate(at):
            assert torch.equal(out[b], whole[b][position])


@pytest.fixture
def use_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "serves", lambda *tensors: False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen only where there is no GPU")
@pytest.mark.usefixtures("use_twin")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward_equal_the_twin(size: Size, dtype: torch.dtype, limit: float) -> None:
    qkv, rotary = inputs(LENGTHS, size, dtype)
    ours, wanted = out_and_gradient(qkv, rotary, size, LENGTHS), twins(qkv, rotary, size, LENGTHS)
    assert relative_error(ours[0], wanted[0]) < limit
    heads, key_heads, dim, _ = size
    widths = [heads * dim, key_heads * dim, key_heads * dim]
    for part, expected in zip(ours[1].split(widths, 1), wanted[1].split(widths, 1), strict=True):
        assert relative_error(part, expected) < limit


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen only where there is no GPU")
@pytest.mark.parametrize("size", SIZES[:2])
def test_pieces_and_decode_equal_training_in_the_interpreter(size: Size) -> None:
    check_phases(size, torch.float32, DEVICE, [70, 3, 200], [62, 1, 194])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(16, 4, 64, 32), (8, 8, 128, 128), (8, 1, 64, 64)])
def test_pieces_and_decode_have_the_bits_of_training(size: Size) -> None:
    check_phases(size, torch.bfloat16, torch.device("cuda"), [700, 1, 64, 333, 2049], [640, 1, 1, 300, 1999])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(16, 4, 64, 32), (8, 8, 128, 128)])
def test_gradients_on_a_gpu_are_right_and_do_not_depend_on_neighbours(size: Size) -> None:
    lengths = [70, 1, 1000, 64, 333, 2049]
    qkv, rotary = inputs(lengths, size, torch.bfloat16, torch.device("cuda"))
    ours, wanted = out_and_gradient(qkv, rotary, size, lengths), twins(qkv, rotary, size, lengths)
    assert relative_error(ours[0], wanted[0]) < 4e-3
    assert relative_error(ours[1], wanted[1]) < 8e-3
    packed = [x.split(lengths) for x in ours]
    sequences = zip(qkv.split(lengths), rotary.split(lengths), *packed, strict=True)
    for rows, angles, *expected in sequences:
        assert all(map(torch.equal, out_and_gradient(rows, angles, size, [len(rows)]), expected))


@pytest.mark.gpu
def test_a_graph_of_a_decode_step_goes_on_as_positions_do() -> None:
    size, device, prompt, length = (16, 4, 64, 32), torch.device("cuda"), 60, 200
    heads, key_heads = size[:2]
    qkv, rotary = inputs([length], size, torch.bfloat16, device)
    whole = softmax_attention(qkv, rotary, heads, key_heads, grid_of([length]))
    pages = new_pages([length], size, torch.bfloat16, device)
    softmax_prefill(qkv[:prompt], rotary[:prompt], heads, key_heads, grid_of([prompt]), pages)
    row, angle = qkv[prompt : prompt + 1].clone(), rotary[prompt : prompt + 1].clone()
    position_B = torch.tensor([prompt], device=device)
    softmax_decode(row, angle, heads, key_heads, pages, position_B, 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = softmax_decode(row, angle, heads, key_heads, pages, position_B, 1)
    for at in range(prompt, length):
        row.copy_(qkv[at : at + 1])
        angle.copy_(rotary[at : at + 1])
        position_B.fill_(at)
        graph.replay()
        assert torch.equal(out[0], whole[at])
