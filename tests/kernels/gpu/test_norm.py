"""The norms on CUDA against autograd in float64, and a row's bits whatever lies beside it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cispo.kernels.gpu import norm as gpu
from cispo.kernels.norm import gated_norm, residual_norm, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 1e-5
ALPHA, BETA = 1.68, 0.75
KINDS = ("rms", "residual", "gated")

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]

KERNELS: dict[str, Norm] = {
    "rms": lambda x, other, weight: gpu.residual_norm(x, None, 1.0, 0.0, weight, EPSILON),
    "residual": lambda x, other, weight: gpu.residual_norm(x, other, ALPHA, BETA, weight, EPSILON),
    "gated": lambda x, other, weight: gpu.gated_norm(x, other, weight, EPSILON),
}
PUBLIC: dict[str, Norm] = {
    "rms": lambda x, other, weight: rms_norm(x, weight, EPSILON),
    "residual": lambda x, other, weight: residual_norm(x, other, ALPHA, BETA, weight, EPSILON),
    "gated": lambda x, other, weight: gated_norm(x, other, weight, EPSILON),
}


def expected(kind: str, x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    h = ALPHA * x + BETA * other if kind == "residual" else x
    out = weight * h * (h.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return torch.sigmoid(other) * out if kind == "gated" else out


def inputs(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """x, the last columns of a wider matrix, weight, and a gradient to the output."""
    generator = torch.Generator().manual_seed(rows + width)
    x, wide = torch.randn(rows, width, generator=generator), torch.randn(rows, 4 * width, generator=generator) * 3
    weight, dout = torch.randn(width, generator=generator), torch.randn(x.shape, generator=generator)
    x, wide, weight, dout = (tensor.to(DEVICE, dtype) for tensor in (x, wide, weight, dout))
    return [x, wide[:, 3 * width :], weight, dout]


def with_gradients(kind: str, norm: Norm, tensors: list[Tensor]) -> list[Tensor]:
    """The output, then the gradients to x, weight and, where it is used, the other operand."""
    x, other, weight, dout = tensors
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, other)][: 2 if kind == "rms" else 3]
    out = norm(leaves[0], leaves[-1], leaves[1])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def wanted(kind: str, tensors: list[Tensor]) -> list[Tensor]:
    return with_gradients(kind, lambda *doubles: expected(kind, *doubles), [tensor.double() for tensor in tensors])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (37, 100), (5, 1100), (3, 2500)])
def test_kernel_and_gradients_equal_autograd(kind: str, rows: int, width: int) -> None:
    tensors = inputs(rows, width, torch.float32)
    for ours, reference in zip(with_gradients(kind, KERNELS[kind], tensors), wanted(kind, tensors), strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_several_tiles_add_up_the_weights_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BACKWARD_PROGRAMS", 3)
    tensors = inputs(300, 40, torch.float32)
    for ours, reference in zip(with_gradients(kind, KERNELS[kind], tensors), wanted(kind, tensors), strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=3e-5, rtol=1e-5)


def test_no_rows_are_no_error() -> None:
    out, dx, dweight, _ = with_gradients("gated", KERNELS["gated"], inputs(0, 48, torch.float32))
    assert out.shape == dx.shape == (0, 48)
    assert dweight.abs().sum() == 0


def test_a_cpu_tensor_is_not_served() -> None:
    assert not gpu.serves(torch.zeros(2, 16, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [128, 1000, 2048, 6144, 8192, 8200])
def test_bfloat16_is_rounded_once_and_a_row_keeps_its_bits(kind: str, width: int) -> None:
    tensors = inputs(300, width, torch.bfloat16)
    results = with_gradients(kind, PUBLIC[kind], tensors)
    for ours, reference in zip(results, wanted(kind, tensors), strict=True):
        assert ours.dtype is torch.bfloat16
        assert (ours.double() - reference).norm() / reference.norm() < (3e-3 if width <= gpu.MAX_WIDTH else 6e-3)
    x, other, weight, dout = tensors
    for rows in (slice(0, 1), slice(63, 66), slice(299, 300)):
        alone = with_gradients(kind, PUBLIC[kind], [x[rows].clone(), other[rows].clone(), weight, dout[rows]])
        assert torch.equal(alone[0], results[0][rows])
        assert torch.equal(alone[1], results[1][rows])
    again = with_gradients(kind, PUBLIC[kind], tensors)
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))
