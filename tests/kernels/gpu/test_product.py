"""Products on CUDA: values at row counts around the tiles, and a row's bits at any of them."""

import pytest
import torch
from torch import Tensor

from cispo.kernels.gpu import product as gpu
from cispo.kernels.product import product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (0, 1, 3, 16, 17, 64, 65, 129, 200)


def operands(rows: int, inner: int, outputs: int, dtype: torch.dtype, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + inner)
    x_NK, weight_MK = (torch.randn(size, inner, generator=generator) for size in (rows, outputs))
    return x_NK.to(device, dtype), weight_MK.to(device, dtype)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", ROWS)
def test_kernel_is_the_product(rows: int, out_dtype: torch.dtype) -> None:
    x_NK, weight_MK = operands(rows, 88, 40, torch.float16)
    out_NM = torch.full((rows, 40), float("nan"), dtype=out_dtype, device=DEVICE)
    gpu.kernel_product(x_NK, weight_MK, out_NM)
    wanted = x_NK.double() @ weight_MK.double().t()
    torch.testing.assert_close(out_NM.double(), wanted, atol=2e-2 if out_dtype is torch.float16 else 1e-4, rtol=2e-3)


def test_rows_may_lie_apart_and_gradients_are_those_of_the_product() -> None:
    x_NK, weight_MK = operands(20, 32, 24, torch.float16)
    wide = torch.cat((x_NK, x_NK), dim=1)[:, 32:].requires_grad_()
    weight_MK.requires_grad_()
    out_NM = gpu.product(wide, weight_MK, torch.float32)
    dout_NM = torch.ones_like(out_NM)
    ours = torch.autograd.grad(out_NM, (wide, weight_MK), dout_NM)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (wide, weight_MK)]
    wanted = torch.autograd.grad(doubles[0] @ doubles[1].t(), doubles, dout_NM.double())
    for one, other in zip(ours, wanted, strict=True):
        assert one.dtype is torch.float16
        torch.testing.assert_close(one.double(), other, atol=2e-2, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("inner", "outputs"), [(512, 512), (6144, 2048), (2048, 6144), (512, 5003), (100, 72)])
def test_a_row_has_the_same_bits_at_any_row_count(inner: int, outputs: int) -> None:
    x_NK, weight_MK = operands(3000, inner, outputs, torch.bfloat16, "cuda")
    whole_NM = product(x_NK, weight_MK)
    error = (whole_NM.double() - x_NK.double() @ weight_MK.double().t()).norm() / whole_NM.double().norm()
    assert error < 3e-3
    for rows in (1, 2, 5, 13, 16, 31, 64, 100, 128, 300, 1000):
        assert torch.equal(product(x_NK[:rows], weight_MK), whole_NM[:rows]), rows
        assert torch.equal(product(x_NK[-rows:].clone(), weight_MK), whole_NM[-rows:]), rows


@pytest.mark.gpu
def test_a_captured_product_has_the_bits_of_one_outside() -> None:
    x_NK, weight_MK = operands(4, 6144, 1000, torch.bfloat16, "cuda")
    with torch.no_grad():
        expected = product(x_NK, weight_MK)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_NM = product(x_NK, weight_MK)
        out_NM.fill_(float("nan"))
        graph.replay()
    assert torch.equal(out_NM, expected)
