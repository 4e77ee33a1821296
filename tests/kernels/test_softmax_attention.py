"""Softmax attention against the library's in float64; one arithmetic in training, prefill and decode."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.chunks import CHUNK_LENGTH, ChunkGrid, chunk_grid
from cispo.kernels.softmax_attention import softmax_attention, softmax_decode, softmax_prefill
from cispo.kernels.softmax_cpu import Pages
from cispo.model.mixers import rotary_table

LENGTHS = [[5, 64, 130, 1, 70], [128], [63, 65], [200, 3]]
SIZES = [(4, 2, 32, 32), (4, 4, 16, 8), (3, 1, 48, 10), (2, 2, 128, 64), (5, 1, 16, 0), (4, 2, 8, 6)]
"""Query heads, key heads, head dim, rotated dims; the last is for the twin, whose head dims may be anything."""

Size = tuple[int, int, int, int]
OnTwin = Callable[[], None]


@pytest.fixture
def use_twin(monkeypatch: pytest.MonkeyPatch) -> OnTwin:
    """Call it to have the plain-PyTorch twin do the rest of the test."""
    return lambda: monkeypatch.setattr(cpu_library, "serves", lambda *tensors: False)


def grid_of(lengths: list[int]) -> ChunkGrid:
    return chunk_grid(lengths, torch.device("cpu"))


def rotary_of(lengths: list[int], rotary_dim: int) -> Tensor:
    return rotary_table(torch.cat([torch.arange(length) for length in lengths]), rotary_dim, 100.0)


def projections(tokens: int, size: Size, seed: int = 0) -> Tensor:
    """Large enough for peaked rows as well as flat ones."""
    heads, key_heads, dim, _ = size
    drawn = torch.randn(tokens, (heads + 2 * key_heads) * dim, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.linspace(0.5, 2.5, tokens).unsqueeze(1)


def exact(qkv_NX: Tensor, lengths: list[int], size: Size) -> Tensor:
    """Rotation as a product of complex numbers, and the library's attention, sequence by sequence."""
    heads, key_heads, dim, rotary_dim = size
    out = []
    for rows in qkv_NX.split(lengths):
        x = rows.view(len(rows), -1, dim)
        half = rotary_dim // 2
        frequency = 100.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
        angle = (torch.arange(len(rows), dtype=torch.float64)[:, None] * frequency).float().double()[:, None]
        turned = torch.complex(x[..., :half], x[..., half:rotary_dim]) * torch.polar(torch.ones_like(angle), angle)
        rotated = torch.cat((turned.real, turned.imag, x[..., rotary_dim:]), dim=2)
        q, k = rotated[:, : heads + key_heads].transpose(0, 1).split([heads, key_heads])
        v = x[:, heads + key_heads :].transpose(0, 1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out.append(attended.transpose(0, 1).flatten(1))
    return torch.cat(out)


def attention(qkv: Tensor, lengths: list[int], size: Size, pages: Pages | None = None) -> Tensor:
    rotary = rotary_of(lengths, size[3])
    if pages is not None:
        return softmax_prefill(qkv, rotary, size[0], size[1], grid_of(lengths), pages)
    return softmax_attention(qkv, rotary, size[0], size[1], grid_of(lengths))


def gradient_and_out(qkv: Tensor, lengths: list[int], size: Size) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = attention(leaf, lengths, size)
    (gradient,) = torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[1])).sum(), leaf)
    return gradient, out.detach()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, error


def check_against_exact(lengths: list[int], size: Size) -> None:
    heads, key_heads, dim, _ = size
    qkv = projections(sum(lengths), size).requires_grad_()
    doubled = qkv.detach().double().requires_grad_()
    weight = torch.randn(sum(lengths), heads * dim, generator=torch.Generator().manual_seed(9))
    out, expected = attention(qkv, lengths, size), exact(doubled, lengths, size)
    assert_close(out, expected)
    (gradient,) = torch.autograd.grad((out * weight).sum(), qkv)
    (reference,) = torch.autograd.grad((expected * weight.double()).sum(), doubled)
    widths = [heads * dim, key_heads * dim, key_heads * dim]
    for part, wanted in zip(gradient.split(widths, 1), reference.split(widths, 1), strict=True):
        assert_close(part, wanted)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_it_equals_the_library(lengths: list[int], size: Size) -> None:
    check_against_exact(lengths, size)


@pytest.mark.parametrize("size", [(4, 2, 32, 32), (3, 1, 48, 10)])
def test_the_twin_equals_the_library(size: Size, use_twin: OnTwin) -> None:
    use_twin()
    check_against_exact(LENGTHS[0], size)


def test_heads_wider_than_the_kernels_take() -> None:
    check_against_exact([66], (2, 1, 144, 32))


def test_scores_of_any_size_give_finite_rows_and_gradients() -> None:
    size = (2, 1, 32, 16)
    qkv = projections(100, size) * 100
    gradient, out = gradient_and_out(qkv, [100], size)
    assert gradient.isfinite().all()
    assert_close(out, exact(qkv.double(), [100], size), 1e-3)


@pytest.mark.parametrize("size", SIZES[:4])
def test_packed_and_alone_are_bitwise_equal(size: Size) -> None:
    lengths = [5, 64, 130, 1, 70, 63]
    qkv = projections(sum(lengths), size)
    packed = [x.split(lengths) for x in gradient_and_out(qkv, lengths, size)]
    for sequence, *wanted in zip(qkv.split(lengths), *packed, strict=True):
        assert all(map(torch.equal, gradient_and_out(sequence, [len(sequence)], size), wanted))


def test_later_tokens_change_no_bit_of_earlier_ones() -> None:
    size = SIZES[0]
    qkv = projections(150, size)
    whole = attention(qkv, [150], size)
    for length in (1, 15, 16, 17, 40, 63, 64, 65, 149):
        assert torch.equal(attention(qkv[:length], [length], size), whole[:length])


def test_neither_threads_nor_gradients_nor_strides_change_a_bit() -> None:
    lengths, size = [5, 64, 130, 1, 70, 63], SIZES[0]
    qkv = projections(sum(lengths), size)
    wanted = gradient_and_out(qkv, lengths, size)
    assert torch.equal(attention(qkv, lengths, size), wanted[1])
    assert all(map(torch.equal, gradient_and_out(qkv.t().contiguous().t(), lengths, size), wanted))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, gradient_and_out(qkv, lengths, size), wanted))
    finally:
        torch.set_num_threads(before)


def new_pages(sequences: int, tokens: int, size: Size, fill: float = 7.0) -> Pages:
    """Pages that hold something already, handed out in no order; page 0 is for idle rows."""
    _, key_heads, dim, _ = size
    each = -(-tokens // CHUNK_LENGTH)
    count = 1 + sequences * each
    table = 1 + torch.randperm(count - 1, generator=torch.Generator().manual_seed(2)).view(sequences, each)
    k, v = (torch.full((count, key_heads, *page), fill) for page in ((dim, CHUNK_LENGTH), (CHUNK_LENGTH, dim)))
    return Pages(k, v, table)


def decoded(sequences: list[Tensor], prompts: list[int], size: Size, pages: Pages, idle: int = 0) -> list[Tensor]:
    """Every sequence's outputs: of its prompt by a prefill, of the rest token by token, all sequences in each step."""
    heads, key_heads, _, rotary_dim = size
    starts = torch.cat([sequence[:prompt] for sequence, prompt in zip(sequences, prompts, strict=True)])
    out = [list(rows.unbind()) for rows in attention(starts, prompts, size, pages).split(prompts)]
    active, batch = len(sequences), len(sequences) + idle
    table = torch.cat((pages.table_BJ, torch.zeros(idle, pages.table_BJ.shape[1], dtype=torch.int64)))
    while any(len(rows) < len(sequence) for rows, sequence in zip(out, sequences, strict=True)):
        tokens, position_B = torch.ones(batch, sequences[0].shape[1]), torch.zeros(batch, dtype=torch.int64)
        for b, (rows, sequence) in enumerate(zip(out, sequences, strict=True)):
            # One that has ended says its last token again.
            position_B[b] = min(len(rows), len(sequence) - 1)
            tokens[b] = sequence[position_B[b]]
        reached = pages._replace(table_BJ=table[:, : int(position_B.max()) // CHUNK_LENGTH + 1])
        rotary = rotary_table(position_B, rotary_dim, 100.0)
        step = softmax_decode(tokens, rotary, heads, key_heads, reached, position_B, active)
        assert step.isfinite().all()
        for b, (rows, sequence) in enumerate(zip(out, sequences, strict=True)):
            if len(rows) < len(sequence):
                rows.append(step[b])
    return [torch.stack(rows) for rows in out]


def check_decode(size: Size, fill: float = 7.0, idle: int = 3) -> None:
    lengths, prompts = [140, 70, 130, 66, 200], [1, 63, 64, 65, 128]
    sequences = list(projections(sum(lengths), size, seed=3).split(lengths))
    wanted = attention(torch.cat(sequences), lengths, size).split(lengths)
    pages = new_pages(len(lengths), max(lengths), size, fill)
    for rows, expected in zip(decoded(sequences, prompts, size, pages, idle), wanted, strict=True):
        assert torch.equal(rows, expected)


@pytest.mark.parametrize("size", SIZES)
def test_prefill_and_decode_are_bitwise_equal_to_training(size: Size) -> None:
    check_decode(size)


def test_the_twin_too_decodes_as_it_trains(use_twin: OnTwin) -> None:
    use_twin()
    check_decode(SIZES[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_decode_has_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_decode((8, 2, 64, 64))
    finally:
        torch.set_num_threads(before)


def test_rows_of_a_page_that_are_not_written_are_not_read() -> None:
    check_decode(SIZES[0], fill=float("nan"))


def test_prefill_leaves_the_twins_pages(use_twin: OnTwin) -> None:
    lengths, size = [5, 64, 130], SIZES[0]
    qkv = projections(sum(lengths), size)
    pages, twins = new_pages(3, 130, size), new_pages(3, 130, size)
    out = attention(qkv, lengths, size, pages)
    use_twin()
    assert_close(out, attention(qkv, lengths, size, twins).double())
    for b, length in enumerate(lengths):
        for position in range(length):
            page, row = pages.table_BJ[b, position // CHUNK_LENGTH], position % CHUNK_LENGTH
            torch.testing.assert_close(pages.k_PKDC[page, :, :, row], twins.k_PKDC[page, :, :, row])
            torch.testing.assert_close(pages.v_PKCD[page, :, row], twins.v_PKCD[page, :, row])


@pytest.mark.parametrize("is_twin", [False, True])
@pytest.mark.parametrize("pieces", [[1] * 5, [7, 57, 1], [64, 64], [70, 1, 130], [3, 300]])
def test_pieces_are_bitwise_equal_to_one_shot(pieces: list[int], is_twin: bool, use_twin: OnTwin) -> None:
    """Each piece goes on from the pages that the ones before it left, beside a sequence that is at another place."""
    if is_twin:
        use_twin()
    size: Size = (4, 2, 32, 16)
    lengths = [sum(pieces), sum(pieces) + 37]
    sequences = [projections(length, size, seed) for seed, length in enumerate(lengths)]
    wanted = attention(torch.cat(sequences), lengths, size).split(lengths)
    pages = new_pages(2, max(lengths), size)
    rotary = rotary_of([max(lengths)], size[3])
    out: list[list[Tensor]] = [[], []]
    done = [0, 0]
    for index, piece in enumerate(pieces):
        taken = [piece, piece + (37 if index == 0 else 0)]
        grid = chunk_grid(taken, torch.device("cpu"), done)
        spans = [slice(start, start + length) for start, length in zip(done, taken, strict=True)]
        qkv = torch.cat([sequence[span] for sequence, span in zip(sequences, spans, strict=True)])
        angles = torch.cat([rotary[span] for span in spans])
        rows = softmax_prefill(qkv, angles, size[0], size[1], grid, pages).split(taken)
        done = [start + length for start, length in zip(done, taken, strict=True)]
        for place, new in enumerate(rows):
            out[place].append(new)
    assert all(torch.equal(torch.cat(rows), expected) for rows, expected in zip(out, wanted, strict=True))
