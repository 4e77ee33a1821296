"""The norms against plain autograd in float64, and the same bits whatever lies beside a row or how many threads run."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.norm import gated_norm, residual_norm, rms_norm
from cispo.kernels.norm_cpu import gated_norm_gradient

EPSILON = 1e-5
ALPHA, BETA = 1.68, 0.75
WIDTHS = (7, 16, 40, 128)

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPSILON)


def residual(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return residual_norm(x, other, ALPHA, BETA, weight, EPSILON)


def gated(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return gated_norm(x, other, weight, EPSILON)


def expected(norm: Norm, x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    h = ALPHA * x + BETA * other if norm is residual else x
    out = weight * h * (h.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return torch.sigmoid(other) * out if norm is gated else out


NORMS = pytest.mark.parametrize("norm", [plain, residual, gated])


def inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the last columns of a matrix four times as wide, weight, and a gradient to the output."""
    generator = torch.Generator().manual_seed(rows + width)
    x, wide = torch.randn(rows, width, generator=generator), torch.randn(rows, 4 * width, generator=generator) * 3
    return x, wide[:, 3 * width :], torch.randn(width, generator=generator), torch.randn(x.shape, generator=generator)


def gradients(norm: Norm, *tensors: Tensor) -> list[Tensor]:
    """The output, then the gradients to x, the other operand and the weight."""
    *operands, dout = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in operands]
    out = norm(*leaves)
    used = [leaf for leaf in leaves if norm is not plain or leaf is not leaves[1]]
    return [out.detach(), *torch.autograd.grad(out, used, dout)]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@NORMS
@pytest.mark.parametrize("width", WIDTHS)
def test_values_and_gradients_equal_autograd_in_double(norm: Norm, width: int) -> None:
    tensors = inputs(150, width)
    doubles = [tensor.double() for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in doubles[:3]]
    used = [leaf for leaf in leaves if norm is not plain or leaf is not leaves[1]]
    out = expected(norm, *leaves)
    wanted = [out.detach(), *torch.autograd.grad(out, used, doubles[3])]
    for actual, reference in zip(gradients(norm, *tensors), wanted, strict=True):
        torch.testing.assert_close(actual.double(), reference, atol=2e-5, rtol=1e-5)


@NORMS
@pytest.mark.parametrize("width", WIDTHS)
def test_kernel_and_twin_agree(monkeypatch: pytest.MonkeyPatch, norm: Norm, width: int) -> None:
    kernel = gradients(norm, *inputs(150, width))
    monkeypatch.setattr(cpu_library, "serves", lambda *tensors: False)
    for ours, twins in zip(kernel, gradients(norm, *inputs(150, width)), strict=True):
        torch.testing.assert_close(ours, twins, atol=2e-5, rtol=1e-5)


@NORMS
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_has_the_same_bits_alone_and_without_gradients(norm: Norm, width: int) -> None:
    x, other, weight, dout = inputs(150, width)
    out, dx, *_ = gradients(norm, x, other, weight, dout)
    for rows in (slice(0, 1), slice(63, 65), slice(149, 150)):
        with torch.inference_mode():
            assert torch.equal(norm(x[rows].clone(), other[rows].clone(), weight), out[rows])
        alone = gradients(norm, x[rows], other[rows], weight, dout[rows])
        assert torch.equal(alone[1], dx[rows])


@NORMS
def test_the_number_of_threads_changes_no_bit(restored_threads: None, norm: Norm) -> None:
    tensors = inputs(1100, 48)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(gradients(norm, *tensors))
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_the_gates_gradient_may_go_to_columns_of_a_wider_matrix() -> None:
    x, gate, weight, dout = inputs(20, 48)
    _, dx, dgate, dweight = gradients(gated, x, gate, weight, dout)
    wide = torch.zeros(20, 100)
    actual = gated_norm_gradient(dout, x, gate, weight, EPSILON, wide[:, 10:58])
    for ours, wanted in zip((*actual, wide[:, 10:58]), (dx, dweight, dgate), strict=True):
        assert torch.equal(ours, wanted)
    assert wide[:, :10].abs().sum() + wide[:, 58:].abs().sum() == 0


def test_operands_may_have_any_strides() -> None:
    x, other, weight, _ = inputs(30, 48)
    for norm in (plain, residual, gated):
        turned = [tensor.t().contiguous().t() for tensor in (x, other)]
        assert torch.equal(norm(*turned, weight), norm(x, other, weight))


def test_bfloat16_is_the_librarys() -> None:
    x, other, weight, _ = (tensor.bfloat16() for tensor in inputs(30, 48))
    out = residual(x, other, weight)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, F.rms_norm(ALPHA * x + BETA * other, (48,), weight, EPSILON))
    assert gated(x, other, weight).dtype is torch.bfloat16


def test_no_rows_are_no_error() -> None:
    out, dx, _, dweight = gradients(
        residual, torch.zeros(0, 16), torch.zeros(0, 16), torch.ones(16), torch.zeros(0, 16)
    )
    assert out.shape == dx.shape == (0, 16)
    assert dweight.abs().sum() == 0
