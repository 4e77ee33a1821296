"""Rotary embedding and SwiGLU, each way. Their floor is the bytes that must move, at a large copy's pace.

N packed tokens, H query heads, K key heads, D head dim, R / 2 pairs of rotated dims, F expert width.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels.gpu.rotary import rotate, rotate_back
from cispo.kernels.gpu.swiglu import swiglu, swiglu_gradient
from cispo.kernels.softmax_attention import rotate as plain_rotate
from cispo.model.mixers import rotary_table
from kernel_cases import COPY_SHARE, Case, Machine

TOKENS, CHECKED_TOKENS = 16_384, 1024
HEADS, KEY_HEADS, DIM = 16, 4, 128
ROTATED = 64
ROWS, INNER = 32_768, 1408
THETA = 1e6
Work = Mapping[str, Callable[[], object]]


def _error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def _rotary_inputs(tokens: int) -> tuple[Tensor, Tensor]:
    """Projections [N, (H + 2 K) D], and cosines and sines."""
    qkv = torch.randn(tokens, (HEADS + 2 * KEY_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
    return qkv, rotary_table(torch.arange(tokens, device="cuda"), ROTATED, THETA)


def _queries_and_keys(qkv_NX: Tensor) -> Tensor:
    return qkv_NX[:, : (HEADS + KEY_HEADS) * DIM].unflatten(1, (HEADS + KEY_HEADS, DIM))


def _exact_rotation(x_NHD: Tensor, rotary_N2R: Tensor) -> Tensor:
    """`plain_rotate` in float64."""
    cos, sin = rotary_N2R.double()[:, :, None].unbind(1)
    first, second, rest = x_NHD.double().tensor_split([ROTATED // 2, ROTATED], dim=2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=2)


def _rotary_error() -> float:
    qkv, rotary = _rotary_inputs(CHECKED_TOKENS)
    exact = _exact_rotation(_queries_and_keys(qkv), rotary)
    return _error(rotate(qkv, rotary, HEADS, KEY_HEADS).view(exact.shape), exact)


def _rotary_back_error() -> float:
    qkv, rotary = _rotary_inputs(CHECKED_TOKENS)
    gradient = _queries_and_keys(qkv).float()
    rotate_back(gradient.flatten(1), rotary, HEADS, KEY_HEADS, qkv)
    backwards = rotary * torch.tensor([1.0, -1.0], device="cuda").view(1, 2, 1)
    return _error(_queries_and_keys(qkv), _exact_rotation(gradient, backwards))


def _rotary() -> Work:
    qkv, rotary = _rotary_inputs(TOKENS)
    return {
        "cispo": lambda: rotate(qkv, rotary, HEADS, KEY_HEADS),
        "torch": lambda: plain_rotate(_queries_and_keys(qkv), rotary),
    }


def _rotary_back() -> Work:
    qkv, rotary = _rotary_inputs(TOKENS)
    gradient = _queries_and_keys(qkv).float().flatten(1)
    return {"cispo": lambda: rotate_back(gradient, rotary, HEADS, KEY_HEADS, qkv)}


def _swiglu_inputs(rows: int) -> tuple[Tensor, Tensor]:
    wide, narrow = (torch.randn(rows, n * INNER, device="cuda", dtype=torch.bfloat16) for n in (2, 1))
    return wide, narrow


def _plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, 1)
    return F.silu(gate) * up


def _swiglu_error() -> float:
    gate_up, _ = _swiglu_inputs(CHECKED_TOKENS)
    return _error(swiglu(gate_up), _plain_swiglu(gate_up.double()))


def _swiglu_gradient_error() -> float:
    gate_up, dhidden = _swiglu_inputs(CHECKED_TOKENS)
    leaf = gate_up.double().requires_grad_()
    (exact,) = torch.autograd.grad(_plain_swiglu(leaf), leaf, dhidden.double())
    return _error(swiglu_gradient(gate_up, dhidden, None)[0], exact)


def _swiglu() -> Work:
    gate_up, _ = _swiglu_inputs(ROWS)
    return {"cispo": lambda: swiglu(gate_up), "torch": lambda: _plain_swiglu(gate_up)}


def _swiglu_gradient() -> Work:
    gate_up, dhidden = _swiglu_inputs(ROWS)
    leaf = gate_up.clone().requires_grad_()
    out = _plain_swiglu(leaf)
    return {
        "cispo": lambda: swiglu_gradient(gate_up, dhidden, None),
        "torch, without hidden": lambda: torch.autograd.grad(out, leaf, dhidden, retain_graph=True),
    }


def _case(name: str, moved_bytes: int, prepare: Callable[[], Work], error: Callable[[], float]) -> Case:
    def floor_s(machine: Machine) -> float:
        return moved_bytes / machine.copy_bytes_per_s

    return Case(name, floor_s, None, prepare, error, extra={"to reach": f"{1 / COPY_SHARE:.2f} x floor"})


_ROTATED_BYTES = 2 * TOKENS * (HEADS + KEY_HEADS) * DIM
_TABLE_BYTES = 4 * TOKENS * ROTATED
_HIDDEN_BYTES = 2 * ROWS * INNER

CASES = [
    _case(f"rotary {TOKENS} x {HEADS + KEY_HEADS} x {DIM}", 2 * _ROTATED_BYTES + _TABLE_BYTES, _rotary, _rotary_error),
    _case(
        f"rotary backward, from float32, {TOKENS} x {HEADS + KEY_HEADS} x {DIM}",
        3 * _ROTATED_BYTES + _TABLE_BYTES,
        _rotary_back,
        _rotary_back_error,
    ),
    _case(f"SwiGLU forward {ROWS} x {INNER}", 3 * _HIDDEN_BYTES, _swiglu, _swiglu_error),
    _case(f"SwiGLU backward and hidden {ROWS} x {INNER}", 6 * _HIDDEN_BYTES, _swiglu_gradient, _swiglu_gradient_error),
]
