"""SwiGLU of rows and its gradient on CUDA, one pass over memory each.

R rows, F hidden width; gate columns before up columns in [R, 2 F].
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build


@triton.jit
def _swiglu_kernel(gate_up, hidden, R, F, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """silu(gate) up in float32, rounded once."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (row < R)[:, None] & (column < F)[None, :]
    gate_tile = gate_up + row[:, None] * (2 * F) + column[None, :]
    gate_RF = tl.load(gate_tile, mask=mask, other=0.0).to(tl.float32)
    up_RF = tl.load(gate_tile + F, mask=mask, other=0.0).to(tl.float32)
    hidden_RF = gate_RF / (1.0 + tl.exp(-gate_RF)) * up_RF
    tl.store(hidden + row[:, None] * F + column[None, :], hidden_RF.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_gradient_kernel(
    gate_up,
    dhidden,
    weight,
    dgate_up,
    hidden,
    dweight,
    R,
    F,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """From the gradient of unweighted hidden rows: that of gate and up, hidden rows times weight, and the weight's."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    is_row = row < R
    dweight_R = tl.zeros([BLOCK_R], tl.float32)
    if HAS_WEIGHT:
        weight_R = tl.load(weight + row, mask=is_row, other=0.0)
    for start in range(0, F, BLOCK_F):
        column = start + tl.arange(0, BLOCK_F)
        mask = is_row[:, None] & (column < F)[None, :]
        wide, narrow = row[:, None] * (2 * F) + column[None, :], row[:, None] * F + column[None, :]
        gate_RF = tl.load(gate_up + wide, mask=mask, other=0.0).to(tl.float32)
        up_RF = tl.load(gate_up + wide + F, mask=mask, other=0.0).to(tl.float32)
        dhidden_RF = tl.load(dhidden + narrow, mask=mask, other=0.0).to(tl.float32)
        sigmoid_RF = 1.0 / (1.0 + tl.exp(-gate_RF))
        silu_RF = gate_RF * sigmoid_RF
        hidden_RF = silu_RF * up_RF
        if HAS_WEIGHT:
            dweight_R += tl.sum(dhidden_RF * hidden_RF, 1)
            hidden_RF *= weight_R[:, None]
            dhidden_RF *= weight_R[:, None]
        dgate_RF = dhidden_RF * up_RF * (sigmoid_RF + silu_RF * (1.0 - sigmoid_RF))
        dtype = hidden.dtype.element_ty
        tl.store(dgate_up + wide, dgate_RF.to(dtype), mask=mask)
        tl.store(dgate_up + wide + F, (dhidden_RF * silu_RF).to(dtype), mask=mask)
        tl.store(hidden + narrow, hidden_RF.to(dtype), mask=mask)
    if HAS_WEIGHT:
        tl.store(dweight + row, dweight_R, mask=is_row)


_BF16 = dict.fromkeys(("gate_up", "dhidden", "dgate_up", "hidden"), "*bf16")
_TYPES = _BF16 | {"weight": "*fp32", "dweight": "*fp32", "R": "i32", "F": "i32"}
_TILE = {"BLOCK_R": 4, "BLOCK_F": 512}
_SWIGLU = Build("expert_swiglu", _swiglu_kernel, _TYPES, _TILE, 4, 1, False, ("F",))


@cache
def _gradient_build(has_weight: bool) -> Build:
    constants = _TILE | {"HAS_WEIGHT": has_weight}
    name = f"expert_swiglu_gradient_{has_weight:d}"
    return Build(name, _swiglu_gradient_kernel, _TYPES, constants, 4, 1, False, ("F",))


BUILDS: list[Build] = [_SWIGLU, _gradient_build(False), _gradient_build(True)]


def swiglu(gate_up_RF: Tensor) -> Tensor:
    """silu(gate) up of [R, 2F], gate columns first; [R, F]."""
    rows, width = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    hidden_RF = gate_up_RF.new_empty(rows, width)
    grid = (triton.cdiv(rows, _TILE["BLOCK_R"]), triton.cdiv(width, _TILE["BLOCK_F"]))
    _SWIGLU.launch(grid, gate_up_RF, hidden_RF, rows, width)
    return hidden_RF


def swiglu_gradient(gate_up_RF: Tensor, dhidden_RF: Tensor, weight_R: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of gate_up [R, 2F], the hidden rows times weight [R, F], and the gradient of weight [R].

    dhidden_RF: the gradient of the hidden rows as if no weight followed. weight_R: None where there is none; its
    gradient is empty then.
    """
    rows, width = dhidden_RF.shape
    dgate_up_RF, hidden_RF = torch.empty_like(gate_up_RF), torch.empty_like(dhidden_RF)
    dweight_R = gate_up_RF.new_empty(0 if weight_R is None else rows, dtype=torch.float32)
    build, grid = _gradient_build(weight_R is not None), (triton.cdiv(rows, _TILE["BLOCK_R"]),)
    weight_R = dweight_R if weight_R is None else weight_R
    build.launch(grid, gate_up_RF, dhidden_RF, weight_R, dgate_up_RF, hidden_RF, dweight_R, rows, width)
    return dgate_up_RF, hidden_RF, dweight_R
