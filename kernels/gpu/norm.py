"""The norms on CUDA: RMSNorm of rows, of alpha x + beta mixed, and behind a sigmoid gate; each way one pass.

Everything between loads and stores is float32, and rounded once, at the store. Backward passes read the inputs again:
nothing is saved but them. A weight's gradient is a sum over blocks of rows, each summed by one program in order, and
then over the blocks: no atomics.

N rows, D width, P programs of a backward pass.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build

BACKWARD_PROGRAMS = 264
MAX_WIDTH = 8192


@triton.jit
def _normed_rows(x_ND, mixed_ND, at, inside, alpha, beta, epsilon, width, IS_RESIDUAL: tl.constexpr):
    """h = x or alpha x + beta mixed of a tile of rows, and 1 / rms(h)."""
    h = tl.load(x_ND + at, mask=inside, other=0.0).to(tl.float32)
    if IS_RESIDUAL:
        h = h * alpha + tl.load(mixed_ND + at, mask=inside, other=0.0).to(tl.float32) * beta
    return h, tl.rsqrt(tl.sum(h * h, 1) / width + epsilon)


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x_ND, other_ND, weight_D, out_ND, alpha, beta, epsilon, rows, width, gate_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, IS_RESIDUAL: tl.constexpr, IS_GATED: tl.constexpr,
):  # fmt: skip
    """ROWS rows. other: the mixed rows, or the gate, whose rows lie gate_stride apart."""
    at_d = tl.arange(0, BLOCK)
    at_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = at_n[:, None] * width + at_d[None, :]
    inside = (at_n[:, None] < rows) & (at_d[None, :] < width)
    h, scale = _normed_rows(x_ND, other_ND, at, inside, alpha, beta, epsilon, width, IS_RESIDUAL)
    out = h * scale[:, None] * tl.load(weight_D + at_d, mask=at_d < width, other=0.0).to(tl.float32)[None, :]
    if IS_GATED:
        gate = tl.load(other_ND + at_n[:, None] * gate_stride + at_d[None, :], mask=inside, other=0.0).to(tl.float32)
        out = out / (1.0 + tl.exp(-gate))
    tl.store(out_ND + at, out.to(out_ND.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _norm_gradient_kernel(
    dout_ND, x_ND, other_ND, weight_D, dx_ND, dother_ND, dweight_PD, alpha, beta, epsilon, rows, width, gate_stride,
    dgate_stride, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr, IS_RESIDUAL: tl.constexpr, IS_GATED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`tiles` times ROWS rows, in order, and their share of the weight's gradient; STAGES tiles are on their way.

    With u = dunit h summed over D, dh = scale (dunit - h scale^2 u / D): both sums of a row are one wait.
    """
    at_d = tl.arange(0, BLOCK)
    weight = tl.load(weight_D + at_d, mask=at_d < width, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles * ROWS
    for tile in tl.range(0, tiles, num_stages=STAGES):
        at_n = first + tile * ROWS + tl.arange(0, ROWS)
        at = at_n[:, None] * width + at_d[None, :]
        inside = (at_n[:, None] < rows) & (at_d[None, :] < width)
        h = tl.load(x_ND + at, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ND + at, mask=inside, other=0.0).to(tl.float32)
        if IS_RESIDUAL:
            h = h * alpha + tl.load(other_ND + at, mask=inside, other=0.0).to(tl.float32) * beta
        if IS_GATED:
            at_gate = at_n[:, None] * gate_stride + at_d[None, :]
            gate = 1.0 / (1.0 + tl.exp(-tl.load(other_ND + at_gate, mask=inside, other=0.0).to(tl.float32)))
            dout *= gate
        dunit = dout * weight
        scale = tl.rsqrt(tl.sum(h * h, 1) / width + epsilon)
        along = tl.sum(dunit * h, 1) / width * scale * scale
        unit = h * scale[:, None]
        dweight += dout * unit
        dh = (dunit - h * along[:, None]) * scale[:, None]
        tl.store(dx_ND + at, (dh * alpha).to(dx_ND.dtype.element_ty), mask=inside)
        if IS_RESIDUAL:
            tl.store(dother_ND + at, (dh * beta).to(dother_ND.dtype.element_ty), mask=inside)
        if IS_GATED:
            at_dgate = at_n[:, None] * dgate_stride + at_d[None, :]
            dgate = dunit * unit * (1.0 - gate)
            tl.store(dother_ND + at_dgate, dgate.to(dother_ND.dtype.element_ty), mask=inside)
    share = dweight_PD + tl.program_id(0) * width + at_d
    tl.store(share, tl.sum(dweight, 0), mask=at_d < width)


@triton.jit(do_not_specialize=["programs"])
def _sum_kernel(share_PD, total_D, programs, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns summed over the programs' shares, in one order."""
    at_d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at_p = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, programs, ROWS):
        inside = (at_p[:, None] < programs - first) & (at_d[None, :] < width)
        total += tl.load(share_PD + (first + at_p)[:, None] * width + at_d[None, :], mask=inside, other=0.0)
    tl.store(total_D + at_d, tl.sum(total, 0).to(total_D.dtype.element_ty), mask=at_d < width)


_KINDS = {"rms": (False, False), "residual": (True, False), "gated": (False, True)}


_FORWARD_TILES = {128: (16, 4), 1024: (2, 4), 2048: (1, 4), 4096: (1, 8), 8192: (1, 16)}
_BACKWARD_TILES = {128: (16, 4), 1024: (2, 4), 2048: (2, 4), 4096: (1, 4), 8192: (1, 8)}
"""Rows of a tile and warps, by the least of these widths that holds a row."""


def _builds(
    kernel: Any, name: str, pointers: tuple[str, ...], tiles: Mapping[int, tuple[int, int]], **extra: int
) -> dict[tuple[str, int], Build]:
    scalars = {name: "fp32" if name in ("alpha", "beta", "epsilon") else "i32" for name in _SCALARS}
    types = {pointer: "*fp32" if pointer == "dweight_PD" else "*bf16" for pointer in pointers} | scalars
    types = {argument: types[argument] for argument in kernel.arg_names if argument in types}
    return {
        (kind, block): Build(
            name=f"{kind}_{name}_{block}",
            kernel=kernel,
            types=types,
            constants={
                "ROWS": rows, "BLOCK": block, "IS_RESIDUAL": is_residual, "IS_GATED": is_gated,
                **extra,
            },
            num_warps=warps,
            num_stages=1,
            has_products=False,
            aligned=("width", "gate_stride", "dgate_stride"),
        )
        for kind, (is_residual, is_gated) in _KINDS.items()
        for block, (rows, warps) in tiles.items()
    }  # fmt: skip


_SCALARS = ("alpha", "beta", "epsilon", "rows", "width", "gate_stride", "dgate_stride", "tiles")
_FORWARD = _builds(_norm_kernel, "norm", ("x_ND", "other_ND", "weight_D", "out_ND"), _FORWARD_TILES)
_BACKWARD = _builds(
    _norm_gradient_kernel,
    "norm_gradient",
    ("dout_ND", "x_ND", "other_ND", "weight_D", "dx_ND", "dother_ND", "dweight_PD"),
    _BACKWARD_TILES,
    STAGES=3,
)
_SUM = Build(
    name="norm_weight_gradient",
    kernel=_sum_kernel,
    types={"share_PD": "*fp32", "total_D": "*bf16", "programs": "i32", "width": "i32"},
    constants={"ROWS": 64, "BLOCK": 32},
    num_warps=8,
    num_stages=1,
    has_products=False,
    aligned=("width",),
)
BUILDS = [*_FORWARD.values(), *_BACKWARD.values(), _SUM]


def serves(*tensors: Tensor) -> bool:
    """Whether these kernels take the operands: bfloat16 on CUDA, rows of at most MAX_WIDTH."""
    return all(x.is_cuda and x.dtype is torch.bfloat16 for x in tensors) and tensors[0].shape[-1] <= MAX_WIDTH


def _contiguous(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous()


def _block(width: int) -> int:
    return next(block for block in _FORWARD_TILES if block >= width)


def _run(
    kind: str, x_ND: Tensor, other_ND: Tensor, weight_D: Tensor, alpha: float, beta: float, epsilon: float
) -> Tensor:
    rows, width = x_ND.shape
    out_ND = torch.empty_like(x_ND)
    if rows:
        build = _FORWARD[kind, _block(width)]
        _norm_kernel[(triton.cdiv(rows, build.constants["ROWS"]),)](
            x_ND, other_ND, weight_D, out_ND, alpha, beta, epsilon, rows, width, other_ND.stride(0),
            **build.constants, num_warps=build.num_warps, num_stages=build.num_stages,
        )  # fmt: skip
    return out_ND


def _run_gradient(
    kind: str,
    dout_ND: Tensor,
    x_ND: Tensor,
    other_ND: Tensor,
    weight_D: Tensor,
    dother_ND: Tensor,
    alpha: float,
    beta: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Gradients to x and weight; the one to `other` goes to dother_ND."""
    rows, width = x_ND.shape
    dx_ND = torch.empty_like(x_ND)
    if not rows:
        return dx_ND, torch.zeros_like(weight_D)
    build = _BACKWARD[kind, _block(width)]
    tiles = triton.cdiv(rows, build.constants["ROWS"])
    tiles_each = triton.cdiv(tiles, BACKWARD_PROGRAMS)
    programs = triton.cdiv(tiles, tiles_each)
    dweight_PD = x_ND.new_empty(programs, width, dtype=torch.float32)
    _norm_gradient_kernel[(programs,)](
        dout_ND, x_ND, other_ND, weight_D, dx_ND, dother_ND, dweight_PD, alpha, beta, epsilon, rows, width,
        other_ND.stride(0), dother_ND.stride(0), tiles_each, **build.constants, num_warps=build.num_warps,
        num_stages=build.num_stages,
    )  # fmt: skip
    dweight_D = torch.empty_like(weight_D)
    _sum_kernel[(triton.cdiv(width, _SUM.constants["BLOCK"]),)](
        dweight_PD, dweight_D, programs, width, **_SUM.constants, num_warps=_SUM.num_warps, num_stages=_SUM.num_stages
    )
    return dx_ND, dweight_D


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, mixed_ND: Tensor | None, alpha: float, beta: float, weight_D: Tensor, epsilon: float
    ) -> Tensor:
        ctx.save_for_backward(x_ND, mixed_ND, weight_D)
        ctx.constants = (alpha, beta, epsilon)
        return _normed(x_ND, mixed_ND, alpha, beta, weight_D, epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, mixed_ND, weight_D = ctx.saved_tensors
        dout_ND = _contiguous(gradients[0])
        if mixed_ND is None:
            dx_ND, dweight_D = _run_gradient("rms", dout_ND, x_ND, x_ND, weight_D, x_ND, *ctx.constants)
            return dx_ND, None, None, None, dweight_D, None
        dmixed_ND = torch.empty_like(x_ND)
        operands = (dout_ND, x_ND, mixed_ND, weight_D, dmixed_ND)
        dx_ND, dweight_D = _run_gradient("residual", *operands, *ctx.constants)
        return dx_ND, dmixed_ND, None, None, dweight_D, None


def _normed(
    x_ND: Tensor, mixed_ND: Tensor | None, alpha: float, beta: float, weight_D: Tensor, epsilon: float
) -> Tensor:
    if mixed_ND is None:
        return _run("rms", x_ND, x_ND, weight_D, alpha, beta, epsilon)
    return _run("residual", x_ND, mixed_ND, weight_D, alpha, beta, epsilon)


_differentiable_norm: Callable[[Tensor, Tensor | None, float, float, Tensor, float], Tensor] = _ResidualNorm.apply


def residual_norm(
    x_ND: Tensor, mixed_ND: Tensor | None, alpha: float, beta: float, weight_D: Tensor, epsilon: float
) -> Tensor:
    """RMSNorm of alpha x + beta mixed, or of x (alpha 1) where there is no mixed; [N, D] in x's dtype."""
    x_ND, weight_D = _contiguous(x_ND), _contiguous(weight_D)
    mixed_ND = None if mixed_ND is None else _contiguous(mixed_ND)
    compute = _differentiable_norm if torch.is_grad_enabled() else _normed
    return compute(x_ND, mixed_ND, alpha, beta, weight_D, epsilon)


def _gated(x_ND: Tensor, gate_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    return _run("gated", x_ND, gate_ND, weight_D, 1.0, 0.0, epsilon)


def gated_norm_gradient(
    dout_ND: Tensor, x_ND: Tensor, gate_ND: Tensor, weight_D: Tensor, epsilon: float, dgate_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to x [N, D] and weight [D]; the one to the gate goes to dgate_ND.

    gate_ND and dgate_ND: only their columns need to be contiguous. The rest: contiguous.
    """
    return _run_gradient("gated", dout_ND, x_ND, gate_ND, weight_D, dgate_ND, 1.0, 0.0, epsilon)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x_ND, gate_ND, weight_D)
        ctx.epsilon = epsilon
        return _gated(x_ND, gate_ND, weight_D, epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_ND, weight_D = ctx.saved_tensors
        dgate_ND = torch.empty_like(x_ND)
        dout_ND = _contiguous(gradients[0])
        dx_ND, dweight_D = gated_norm_gradient(dout_ND, x_ND, gate_ND, weight_D, ctx.epsilon, dgate_ND)
        return dx_ND, dgate_ND, dweight_D, None


_differentiable_gated_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = _GatedNorm.apply


def gated_norm(x_ND: Tensor, gate_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """sigmoid(gate) times the RMSNorm of x; [N, D] in x's dtype. The gate may be some columns of a wider matrix."""
    x_ND, weight_D = _contiguous(x_ND), _contiguous(weight_D)
    gate_ND = gate_ND if gate_ND.stride(1) == 1 else gate_ND.contiguous()
    compute = _differentiable_gated_norm if torch.is_grad_enabled() else _gated
    return compute(x_ND, gate_ND, weight_D, epsilon)
