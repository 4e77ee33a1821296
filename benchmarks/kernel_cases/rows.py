"""Norms, forward and backward. Their floor is the bytes that must move, at a large copy's pace."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cispo.kernels import norm
from kernel_cases import COPY_SHARE, Case, Machine, capture_stream, graphed

ROWS = 16_384
CHECKED_ROWS = 1024
WIDTHS = (2048, 6144)
EPSILON = 1e-5
ALPHA, BETA = 1.68, 0.75

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]

OURS: dict[str, Norm] = {
    "rms": lambda x, other, weight: norm.rms_norm(x, weight, EPSILON),
    "residual": lambda x, other, weight: norm.residual_norm(x, other, ALPHA, BETA, weight, EPSILON),
    "gated": lambda x, other, weight: norm.gated_norm(x, other, weight, EPSILON),
}


def _plain(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, EPSILON)


TORCH: dict[str, Norm] = {
    "rms": _plain,
    "residual": lambda x, other, weight: _plain(ALPHA * x + BETA * other, other, weight),
    "gated": lambda x, other, weight: torch.sigmoid(other) * _plain(x, other, weight),
}
MATRICES = {"rms": (2, 3), "residual": (3, 5), "gated": (3, 5)}
"""Matrices [N, D] that each reads or writes: forward, backward."""


def _inputs(rows: int, width: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(width)
    shapes = ((rows, width), (rows, width), (width,), (rows, width))
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator) for shape in shapes]


def _with_gradients(kind: str, compute: Norm, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = compute(*leaves)
    used = leaves if kind != "rms" else leaves[::2]
    return [out.detach(), *torch.autograd.grad(out, used, tensors[3])]


def _error(kind: str, width: int) -> float:
    tensors = _inputs(CHECKED_ROWS, width)
    wanted = _with_gradients(kind, TORCH[kind], [tensor.double() for tensor in tensors])
    pairs = zip(_with_gradients(kind, OURS[kind], tensors), wanted, strict=True)
    return max(float((ours.double() - reference).norm() / reference.norm()) for ours, reference in pairs)


def _forward(kind: str, width: int) -> Mapping[str, Callable[[], object]]:
    x, other, weight, _ = _inputs(ROWS, width)

    def work(compute: Norm) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.no_grad():
                return compute(x, other, weight)

        return run

    return {"cispo": work(OURS[kind]), "torch rms_norm": work(TORCH[kind])}


def _backward(kind: str, width: int) -> Mapping[str, Callable[[], object]]:
    tensors = _inputs(ROWS, width)

    def work(compute: Norm) -> Callable[[], object]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        used = leaves if kind != "rms" else leaves[::2]
        with torch.cuda.stream(capture_stream()):
            out = compute(*leaves)
        return graphed(lambda: torch.autograd.grad(out, used, tensors[3], retain_graph=True))

    return {"cispo": work(OURS[kind]), "torch rms_norm": work(TORCH[kind])}


def _case(kind: str, width: int, *, is_backward: bool) -> Case:
    moved_bytes = MATRICES[kind][is_backward] * ROWS * width * torch.bfloat16.itemsize

    def floor_s(machine: Machine) -> float:
        return moved_bytes / machine.copy_bytes_per_s

    prepare = _backward if is_backward else _forward
    return Case(
        name=f"{kind} norm {'backward' if is_backward else 'forward'} {ROWS} x {width}",
        floor_s=floor_s,
        reach_ms=None,
        prepare=lambda: prepare(kind, width),
        error=lambda: _error(kind, width),
        extra={"to reach": f"{1 / COPY_SHARE:.2f} x floor"},
    )


CASES = [
    _case(kind, width, is_backward=is_backward) for width in WIDTHS for kind in OURS for is_backward in (False, True)
]
