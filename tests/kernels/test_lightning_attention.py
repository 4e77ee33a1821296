"""Lightning attention against the token recurrence in float64; one arithmetic in training, prefill and decode."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.chunks import CHUNK_LENGTH, ChunkGrid, chunk_grid
from cispo.kernels.lightning_attention import (
    Decays,
    decays,
    gated_lightning_attention,
    lightning_attention,
    lightning_decode,
    lightning_prefill,
)
from cispo.kernels.norm import gated_norm

LENGTHS = [[5, 64, 130, 1, 70], [128], [63, 65], [200, 3]]
SLOPES_H = torch.tensor([0.917, 0.25, 0.06, 0.004])
HEADS = len(SLOPES_H)

OnTwin = Callable[[], None]


@pytest.fixture
def use_twin(monkeypatch: pytest.MonkeyPatch) -> OnTwin:
    """Call it to have the plain-PyTorch twin do the rest of the test."""
    return lambda: monkeypatch.setattr(cpu_library, "serves", lambda *tensors: False)


def grid_of(lengths: list[int]) -> ChunkGrid:
    return chunk_grid(lengths, torch.device("cpu"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projections(tokens: int, dim: int, seed: int = 0) -> Tensor:
    """q, k and v as the model has them: columns of a wider buffer."""
    return random(tokens, 4 * HEADS * dim, seed=seed)[:, : 3 * HEADS * dim]


def recurrence(qkv_NI: Tensor, slopes_H: Tensor, lengths: list[int]) -> Tensor:
    """S_t = exp(-s) S_{t-1} + k_t^T v_t, o_t = q_t S_t, token by token."""
    heads = len(slopes_H)
    q_NHD, k_NHD, v_NHD = torch.nn.functional.silu(qkv_NI).view(len(qkv_NI), heads, -1).chunk(3, dim=2)
    decay_H11 = torch.exp(-slopes_H.to(qkv_NI.dtype)).view(-1, 1, 1)
    out, token = [], 0
    for length in lengths:
        state_HDD = torch.zeros(heads, q_NHD.shape[2], q_NHD.shape[2], dtype=qkv_NI.dtype)
        for _ in range(length):
            state_HDD = decay_H11 * state_HDD + k_NHD[token].unsqueeze(2) * v_NHD[token].unsqueeze(1)
            out.append((q_NHD[token].unsqueeze(1) @ state_HDD).flatten())
            token += 1
    return torch.stack(out)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, error


def check_against_recurrence(lengths: list[int], dim: int) -> None:
    qkv = projections(sum(lengths), dim).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    weight = random(sum(lengths), HEADS * dim, seed=9)
    out, expected = lightning_attention(qkv, decays(SLOPES_H), grid_of(lengths)), recurrence(exact, SLOPES_H, lengths)
    assert_close(out, expected)
    (gradient,) = torch.autograd.grad((out * weight).sum(), qkv)
    (reference,) = torch.autograd.grad((expected * weight.double()).sum(), exact)
    parts = (x.view(len(x), HEADS, 3, dim).unbind(2) for x in (gradient, reference))
    for part, wanted in zip(*parts, strict=True):
        assert_close(part, wanted)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dim", [8, 16, 32])
def test_it_equals_the_recurrence(lengths: list[int], dim: int) -> None:
    check_against_recurrence(lengths, dim)


@pytest.mark.parametrize("dim", [48, 64, 128])
def test_wide_heads_equal_the_recurrence(dim: int) -> None:
    check_against_recurrence([70, 3, 129], dim)


@pytest.mark.parametrize("lengths", LENGTHS[:2])
def test_the_twin_equals_the_recurrence(lengths: list[int], use_twin: OnTwin) -> None:
    use_twin()
    check_against_recurrence(lengths, 32)


def test_heads_wider_than_the_kernels_take() -> None:
    check_against_recurrence([66], 144)


def test_steep_slopes_do_not_overflow() -> None:
    qkv = random(300, 3 * 16)
    out = lightning_attention(qkv, decays(torch.tensor([50.0])), grid_of([300]))
    q, k, v = torch.nn.functional.silu(qkv).chunk(3, dim=1)
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v, atol=1e-5, rtol=1e-5)


def gradient_and_out(qkv: Tensor, slopes: Decays, lengths: list[int]) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = lightning_attention(leaf, slopes, grid_of(lengths))
    (gradient,) = torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[1])).sum(), leaf)
    return gradient, out.detach()


@pytest.mark.parametrize("dim", [16, 32, 80])
def test_packed_and_alone_are_bitwise_equal(dim: int) -> None:
    lengths, slopes = [5, 64, 130, 1, 70, 63], decays(SLOPES_H)
    qkv = projections(sum(lengths), dim)
    packed = [x.split(lengths) for x in gradient_and_out(qkv, slopes, lengths)]
    for sequence, *wanted in zip(qkv.split(lengths), *packed, strict=True):
        alone = gradient_and_out(sequence, slopes, [len(sequence)])
        assert all(map(torch.equal, alone, wanted))


def test_later_tokens_change_no_bit_of_earlier_ones() -> None:
    qkv, slopes = projections(150, 32), decays(SLOPES_H)
    whole = lightning_attention(qkv, slopes, grid_of([150]))
    for length in (1, 7, 8, 9, 16, 40, 63, 64, 65, 149):
        assert torch.equal(lightning_attention(qkv[:length], slopes, grid_of([length])), whole[:length])


def test_neither_threads_nor_gradients_nor_strides_change_a_bit() -> None:
    lengths, slopes = [5, 64, 130, 1, 70, 63], decays(SLOPES_H)
    qkv = projections(sum(lengths), 32)
    wanted = gradient_and_out(qkv, slopes, lengths)
    assert torch.equal(lightning_attention(qkv, slopes, grid_of(lengths)), wanted[1])
    assert all(map(torch.equal, gradient_and_out(qkv.contiguous(), slopes, lengths), wanted))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, gradient_and_out(qkv, slopes, lengths), wanted))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("is_twin", [False, True])
def test_gated_attention_equals_its_parts(is_twin: bool, use_twin: OnTwin) -> None:
    if is_twin:
        use_twin()
    lengths, inner, slopes = [70, 3, 128], HEADS * 32, decays(SLOPES_H)
    leaves = [random(sum(lengths), 4 * inner), 1 + 0.1 * random(inner, seed=1)]
    weight = random(sum(lengths), inner, seed=2)
    results = []
    for is_whole in (True, False):
        qkv_gate, norm = (leaf.detach().requires_grad_() for leaf in leaves)
        if is_whole:
            out = gated_lightning_attention(qkv_gate, norm, 1e-6, slopes, grid_of(lengths))
        else:
            qkv, gate = qkv_gate.split([3 * inner, inner], dim=1)
            out = gated_norm(lightning_attention(qkv, slopes, grid_of(lengths)), gate, norm, 1e-6)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (qkv_gate, norm))])
    assert all(map(torch.equal, *results))
    with torch.no_grad():
        assert torch.equal(gated_lightning_attention(*leaves, 1e-6, slopes, grid_of(lengths)), results[0][0])


def new_caches(slots: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (dim, dim), (dim, CHUNK_LENGTH), (CHUNK_LENGTH, dim)
    state, k_recent, v_recent = (torch.full((slots, HEADS, *shape), 7.0) for shape in shapes)
    return state, k_recent, v_recent


def decoded(
    sequences: list[Tensor], prompts: list[int], slots: list[int], caches: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """Every sequence's outputs: of its prompt by a prefill, of the rest token by token, all slots in each step."""
    slopes = decays(SLOPES_H)
    heads = [sequence[:prompt] for sequence, prompt in zip(sequences, prompts, strict=True)]
    prefilled = lightning_prefill(torch.cat(heads), slopes, grid_of(prompts), torch.tensor(slots), *caches)
    out = [list(rows.unbind()) for rows in prefilled.split(prompts)]
    batch = len(caches[0])
    position_S = torch.zeros(batch, dtype=torch.int64)
    position_S[slots] = torch.tensor(prompts)
    while any(len(rows) < len(sequence) for rows, sequence in zip(out, sequences, strict=True)):
        tokens = torch.ones(batch, sequences[0].shape[1])
        for rows, sequence, slot in zip(out, sequences, slots, strict=True):
            tokens[slot] = sequence[len(rows)] if len(rows) < len(sequence) else 1.0
        row_S = position_S % CHUNK_LENGTH
        full = torch.nonzero(row_S == CHUNK_LENGTH - 1).squeeze(1)
        step = lightning_decode(tokens, slopes, torch.arange(batch), row_S, full if len(full) else None, *caches)
        position_S += 1
        for rows, sequence, slot in zip(out, sequences, slots, strict=True):
            if len(rows) < len(sequence):
                rows.append(step[slot])
    return [torch.stack(rows) for rows in out]


@pytest.mark.parametrize(
    ("dim", "is_twin"), [(32, False), (16, False), (48, False), (128, False), (24, False), (32, True)]
)
def test_prefill_and_decode_are_bitwise_equal_to_training(dim: int, is_twin: bool, use_twin: OnTwin) -> None:
    if is_twin:
        use_twin()
    lengths, prompts, slots = [140, 70, 130, 66, 200], [1, 63, 64, 65, 128], [3, 0, 7, 1, 4]
    sequences = list(projections(sum(lengths), dim, seed=3).split(lengths))
    wanted = lightning_attention(torch.cat(sequences), decays(SLOPES_H), grid_of(lengths)).split(lengths)
    for rows, expected in zip(decoded(sequences, prompts, slots, new_caches(8, dim)), wanted, strict=True):
        assert torch.equal(rows, expected)


def test_prefill_leaves_the_twins_caches(use_twin: OnTwin) -> None:
    lengths, dim, slopes = [5, 64, 130], 32, decays(SLOPES_H)
    qkv, slots = projections(sum(lengths), dim), torch.tensor([2, 0, 1])
    caches, twins = new_caches(3, dim), new_caches(3, dim)
    out = lightning_prefill(qkv, slopes, grid_of(lengths), slots, *caches)
    use_twin()
    assert_close(out, lightning_prefill(qkv, slopes, grid_of(lengths), slots, *twins).double())
    torch.testing.assert_close(caches[0], twins[0])
    for slot, length in zip(slots.tolist(), lengths, strict=True):
        used = length % CHUNK_LENGTH
        torch.testing.assert_close(caches[1][slot, :, :, :used], twins[1][slot, :, :, :used])
        torch.testing.assert_close(caches[2][slot, :, :used], twins[2][slot, :, :used])


def test_rows_of_a_chunk_that_are_not_written_are_not_read() -> None:
    caches = new_caches(1, 32)
    for cache in caches[1:]:
        cache.fill_(float("nan"))
    sequence = projections(70, 32)
    wanted = lightning_attention(sequence, decays(SLOPES_H), grid_of([70]))
    (rows,) = decoded([sequence], [3], [0], caches)
    assert torch.equal(rows, wanted)


def test_the_twin_takes_bfloat16() -> None:
    qkv = projections(70, 32).bfloat16()
    out = lightning_attention(qkv, decays(SLOPES_H), grid_of([70]))
    assert out.dtype == torch.float32
    assert_close(out, recurrence(qkv.double(), SLOPES_H, [70]), tolerance=2e-2)


@pytest.mark.parametrize("is_twin", [False, True])
@pytest.mark.parametrize("pieces", [[1] * 5, [7, 57, 1], [64, 64], [70, 1, 130], [3, 300]])
def test_pieces_are_bitwise_equal_to_one_shot(pieces: list[int], is_twin: bool, use_twin: OnTwin) -> None:
    """Each piece goes on from the caches that the ones before it left, beside a sequence that is at another place."""
    if is_twin:
        use_twin()
    slopes, slots = decays(SLOPES_H), torch.tensor([2, 0])
    lengths = [sum(pieces), sum(pieces) + 37]
    sequences = [projections(length, 32, seed) for seed, length in enumerate(lengths)]
    wanted = lightning_attention(torch.cat(sequences), slopes, grid_of(lengths)).split(lengths)
    caches = new_caches(3, 32)
    out: list[list[Tensor]] = [[], []]
    done = [0, 0]
    for index, piece in enumerate(pieces):
        taken = [piece, piece + (37 if index == 0 else 0)]
        spans = [slice(start, start + length) for start, length in zip(done, taken, strict=True)]
        qkv = torch.cat([sequence[span] for sequence, span in zip(sequences, spans, strict=True)])
        grid = chunk_grid(taken, torch.device("cpu"), done)
        rows = lightning_prefill(qkv, slopes, grid, slots, *caches).split(taken)
        done = [start + length for start, length in zip(done, taken, strict=True)]
        for place, new in enumerate(rows):
            out[place].append(new)
    assert all(torch.equal(torch.cat(rows), expected) for rows, expected in zip(out, wanted, strict=True))


def test_a_rounded_copy_of_the_state_is_refused_where_no_kernel_reads_it() -> None:
    qkv_NI, slot_B, caches = random(3, 3 * HEADS * 64), torch.tensor([0]), [torch.zeros(1)] * 3
    with pytest.raises(ValueError, match="leave copy_SHDD out"):
        lightning_prefill(qkv_NI, decays(SLOPES_H), grid_of([3]), slot_B, *caches, torch.zeros(1))
    with pytest.raises(ValueError, match="leave copy_SHDD out"):
        lightning_decode(qkv_NI, decays(SLOPES_H), slot_B, slot_B, None, *caches, torch.zeros(1))
