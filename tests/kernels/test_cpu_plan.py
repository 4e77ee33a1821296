"""Recorded programs of CPU kernels: the bits of their code at any number of rows, and what cannot be recorded."""

import pytest
import torch
from torch import Tensor

from cispo.kernels import cpu_plan
from cispo.kernels.cpu_plan import _Buffer, _lay_out, record
from cispo.kernels.norm import rms_norm, sum_and_norm
from cispo.kernels.product import product
from cispo.kernels.rows import add_bias, head_norms, select_rows

ROWS, WIDTH = 24, 48


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Chain:
    """Products and norms on rows picked from a table: two streams, so that buffers are in use at different times."""

    def __init__(self) -> None:
        self.table, self.index = normal(100, WIDTH, seed=0), torch.arange(ROWS) * 3
        self.weights = [normal(WIDTH, WIDTH, seed=1 + i) / 7 for i in range(4)]
        self.norm, self.bias = normal(WIDTH, seed=9), normal(WIDTH, seed=10)

    def __call__(self) -> tuple[Tensor, Tensor]:
        stream = x = select_rows(self.table, self.index)
        for weight in self.weights:
            stream, x = sum_and_norm(stream, add_bias(product(x, weight), self.bias), self.norm, 1e-5)
        return stream, head_norms(x, self.norm[:16], self.bias[:16], 1e-6, 1, 1)


@torch.no_grad()
def test_a_plan_gives_the_bits_of_its_code_at_any_number_of_rows() -> None:
    chain = Chain()
    plan = record(chain)
    assert plan is not None
    for rows in (ROWS, 1, 7, ROWS):
        chain.index.copy_(torch.randperm(100, generator=torch.Generator().manual_seed(rows))[:ROWS])
        for output in plan.outputs:
            output.fill_(float("nan"))
        plan.run(rows)
        for output, expected in zip(plan.outputs, chain(), strict=True):
            assert torch.equal(output[:rows], expected[:rows])
            assert output[rows:].isnan().all()


@torch.no_grad()
def test_changed_weights_are_taken_in() -> None:
    chain = Chain()
    plan = record(chain)
    assert plan is not None
    chain.weights[1].mul_(2.0)
    chain.norm.mul_(0.5)
    plan.refresh()
    plan.run(ROWS)
    assert torch.equal(plan.outputs[1], chain()[1])


@torch.no_grad()
def test_recording_executes_nothing_and_leaves_calls_as_they_were() -> None:
    x, weight, norm = normal(4, WIDTH, seed=1), normal(WIDTH, WIDTH, seed=2), torch.ones(WIDTH)
    before = rms_norm(product(x, weight), norm, 1e-6)
    assert record(lambda: (rms_norm(product(x, weight), norm, 1e-6),)) is not None
    assert torch.equal(rms_norm(product(x, weight), norm, 1e-6), before)


@torch.no_grad()
@pytest.mark.parametrize(
    "operation", [torch.exp, lambda x: x + 1, lambda x: x.clone(), lambda x: x.index_select(0, x.long()[0])]
)
def test_what_pytorch_computes_is_not_recorded(operation: object) -> None:
    x, weight = normal(4, WIDTH, seed=1), normal(WIDTH, WIDTH, seed=2)
    assert callable(operation)
    assert record(lambda: (product(operation(x), weight),)) is None
    assert torch.isfinite(product(x, weight)).all()


@torch.no_grad()
def test_an_error_in_the_code_ends_the_recording() -> None:
    def fails() -> tuple[Tensor, ...]:
        raise KeyError("no such weight")

    with pytest.raises(KeyError, match="no such weight"):
        record(fails)
    assert cpu_plan.cpu_library.recording.recorder is None


@torch.no_grad()
def test_rows_bias_and_head_norms_have_the_bits_of_their_plain_forms() -> None:
    x, norms = normal(5, 5 * 32, seed=3), normal(2, 32, seed=4)
    table, index, bias = normal(9, 2, 8, seed=5), torch.tensor([8, 0, 3, 3]), normal(160, seed=6)
    fused = (select_rows(table, index), add_bias(x, bias), head_norms(x, norms[0], norms[1], 1e-6, 3, 1))
    with torch.enable_grad():
        plain = (select_rows(table, index), add_bias(x, bias), head_norms(x, norms[0], norms[1], 1e-6, 3, 1))
    for one, other in zip(fused, plain, strict=True):
        assert torch.equal(one, other)


def test_buffers_share_a_place_only_when_no_call_needs_both() -> None:
    spans = [(0, 1, 100), (1, 2, 70), (2, 3, 200), (3, 9, 64), (4, 5, 10), (5, 6, 500), (0, 9, 30)]
    buffers = [_Buffer(torch.empty(0), 0, size, first, last) for first, last, size in spans]
    total = _lay_out(buffers)
    assert max(buffer.place + buffer.size for buffer in buffers) == total < sum(size for *_, size in spans)
    for one in buffers:
        assert one.place % 64 == 0
        for other in buffers:
            if one is not other and one.first_call <= other.last_call and other.first_call <= one.last_call:
                assert one.place + one.size <= other.place or other.place + other.size <= one.place
