"""Lightning attention: training, prefill in pieces and decode, beside fla's kernels for a constant decay a head.

"operands only" is the work of fla's own kernels: q, k and v in, outputs or dq, dk and dv out. The other rows are the
work as the model has it, from projections before SiLU to outputs or to the projections' gradient; fla has no SiLU, so
its times there have PyTorch's beside it. The floor counts what must be read and written once; the work is bound by
memory at these sizes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH, chunk_grid
from cispo.kernels.gpu import lightning_backward, lightning_forward
from cispo.kernels.lightning_attention import decays, lightning_attention, lightning_decode, lightning_prefill
from cispo.model.mixers import lightning_slopes
from kernel_cases import Case, Machine, graphed

try:
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
except ImportError:
    chunk_simple_gla = fused_recurrent_simple_gla = None

Work = Callable[[], object]
CHECKED_LENGTHS = (700, 1, 64, 1283)


def _slopes(heads: int) -> Tensor:
    return lightning_slopes(heads, 1, 80).cuda()


def _has_fla(dim: int) -> bool:
    """For each size its kernels are compiled and tuned anew, half a minute and more: heads of 128 alone."""
    return chunk_simple_gla is not None and dim == 128


def _extra(dim: int) -> Mapping[str, str]:
    if chunk_simple_gla is None:
        return {"fla": "not installed"}
    return {} if _has_fla(dim) else {"fla": "timed with heads of 128 alone"}


def _projections(tokens: int, heads: int, dim: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(tokens)
    return torch.randn(tokens, 3 * heads * dim, device="cuda", dtype=torch.bfloat16, generator=generator)


def _reference(qkv_NI: Tensor, lengths: tuple[int, ...], slopes_H: Tensor) -> Tensor:
    """Decayed scores times values in float64, of operands rounded as they are for the kernels."""
    outs = []
    rounding_NI = (qkv_NI.bfloat16().double() - qkv_NI).detach()
    for rows in (qkv_NI + rounding_NI).split(lengths):
        q, k, v = rows.view(len(rows), len(slopes_H), 3, -1).permute(2, 1, 0, 3)
        position_T = torch.arange(len(rows), device=rows.device)
        distance_TT = position_T[:, None] - position_T
        decay_HTT = torch.exp(-slopes_H.double()[:, None, None] * distance_TT.clamp(min=0)) * (distance_TT >= 0)
        outs.append((((q @ k.mT) * decay_HTT) @ v).transpose(0, 1).flatten(1))
    return torch.cat(outs)


def _error(dim: int, *, has_gradient: bool = False, has_silu: bool = True) -> float:
    """Of the outputs, or of the gradient of the projections or, without SiLU, of q, k and v."""
    slopes_H = _slopes(4)
    x_NI = _projections(sum(CHECKED_LENGTHS), len(slopes_H), dim).requires_grad_()
    grid = chunk_grid(CHECKED_LENGTHS, x_NI.device)
    x_double = x_NI.detach().double().requires_grad_()
    silu_double = F.silu(x_double) if has_silu else lightning_forward.silu_rows(x_NI.detach()).double().requires_grad_()
    out_NJ = lightning_attention(x_NI, decays(slopes_H), grid)
    wanted_NJ = _reference(silu_double, CHECKED_LENGTHS, slopes_H)
    ours, wanted = out_NJ.detach(), wanted_NJ.detach()
    if has_gradient:
        dout_NJ = torch.randn_like(out_NJ)
        (wanted,) = torch.autograd.grad(wanted_NJ, x_double if has_silu else silu_double, dout_NJ.double())
        if has_silu:
            (ours,) = torch.autograd.grad(out_NJ, x_NI, dout_NJ)
        else:
            qkv_NI = lightning_forward.silu_rows(x_NI.detach())
            ours = lightning_backward.backward(qkv_NI, None, dout_NJ, slopes_H, grid)
    return float((ours.double() - wanted).norm() / wanted.norm())


def _parts(qkv_NI: Tensor, sequences: int, heads: int) -> list[Tensor]:
    """q, k and v as fla takes them, [B, T, H, D] each."""
    dim = qkv_NI.shape[1] // (3 * heads)
    return [x.contiguous() for x in qkv_NI.view(sequences, -1, heads, 3, dim).unbind(3)]


def _fla(parts: list[Tensor], slopes_H: Tensor) -> Tensor:
    out: Tensor = chunk_simple_gla(*parts, g_gamma=-slopes_H, scale=1.0)[0]
    return out


def _operands(sequences: int, tokens: int, heads: int, dim: int, *, has_gradient: bool) -> Mapping[str, Work]:
    slopes_H, grid = _slopes(heads), chunk_grid([tokens] * sequences, torch.device("cuda"))
    qkv_NI = lightning_forward.silu_rows(_projections(sequences * tokens, heads, dim))
    dout_NJ = torch.randn(sequences * tokens, heads * dim, device="cuda", dtype=torch.bfloat16)

    def ours() -> None:
        lightning_forward.forward(qkv_NI, slopes_H, grid)
        if has_gradient:
            lightning_backward.backward(qkv_NI, None, dout_NJ, slopes_H, grid)

    works: dict[str, Work] = {"cispo": ours}
    if _has_fla(dim):
        parts = [part.requires_grad_(has_gradient) for part in _parts(qkv_NI, sequences, heads)]

        def theirs() -> object:
            out = _fla(parts, slopes_H)
            return torch.autograd.grad(out, parts, dout_NJ.view(out.shape)) if has_gradient else out

        works["fla"] = theirs
    return works


def _train(sequences: int, tokens: int, heads: int, dim: int) -> Mapping[str, Work]:
    slopes_H, grid = _slopes(heads), chunk_grid([tokens] * sequences, torch.device("cuda"))
    constants = decays(slopes_H)
    x_NI = _projections(sequences * tokens, heads, dim).requires_grad_()
    dout_NJ = torch.randn(sequences * tokens, heads * dim, device="cuda", dtype=torch.bfloat16)

    def ours() -> object:
        return torch.autograd.grad(lightning_attention(x_NI, constants, grid), x_NI, dout_NJ)

    def theirs() -> object:
        out = _fla(_parts(F.silu(x_NI), sequences, heads), slopes_H)
        return torch.autograd.grad(out, x_NI, dout_NJ.view(out.shape))

    return {"cispo": ours} | ({"fla and SiLU": theirs} if _has_fla(dim) else {})


def _caches(slots: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    recent = torch.zeros(slots, heads, dim, CHUNK_LENGTH, device="cuda", dtype=torch.bfloat16)
    state = torch.zeros(slots, heads, dim, dim, device="cuda")
    return state, recent, torch.zeros_like(recent).view(slots, heads, CHUNK_LENGTH, dim)


def _prefill(tokens: int, heads: int, dim: int) -> Mapping[str, Work]:
    constants = decays(_slopes(heads))
    x_NI, caches = _projections(tokens, heads, dim), _caches(1, heads, dim)
    grid = chunk_grid([tokens], x_NI.device, [tokens])
    slot_B = torch.zeros(1, device="cuda", dtype=torch.int64)
    works: dict[str, Work] = {"cispo": lambda: lightning_prefill(x_NI, constants, grid, slot_B, *caches)}
    if chunk_simple_gla:
        works["fla and SiLU"] = lambda: _fla(_parts(F.silu(x_NI), 1, heads), constants.slopes_H)
    return works


def _decode(batch: int, heads: int, dim: int) -> Mapping[str, Work]:
    """A chunk of 64 steps in a graph; times are of all of them."""
    constants, caches, x_BI = decays(_slopes(heads)), _caches(batch, heads, dim), _projections(batch, heads, dim)
    every_B, copy = torch.arange(batch, device="cuda"), caches[0].bfloat16()
    rows = [torch.full_like(every_B, row) for row in range(CHUNK_LENGTH)]

    def ours() -> None:
        for row_B in rows:
            lightning_decode(x_BI, constants, every_B, row_B, None, *caches, copy)

    def theirs() -> None:
        for _ in rows:
            q, k, v = F.silu(x_BI).view(batch, 1, heads, 3, dim).unbind(3)
            recurrent = {"initial_state": caches[0], "output_final_state": True}
            fused_recurrent_simple_gla(q, k, v, g_gamma=-constants.slopes_H, scale=1.0, **recurrent)

    return {"cispo": graphed(ours)} | ({"fla and SiLU": graphed(theirs)} if fused_recurrent_simple_gla else {})


def _case(name: str, bytes_moved: int, reach_ms: float | None, prepare: Any, dim: int, **checks: bool) -> Case:
    def floor_s(machine: Machine) -> float:
        return bytes_moved / machine.copy_bytes_per_s

    return Case(name, floor_s, reach_ms, prepare, lambda: _error(dim, **checks), extra=_extra(dim))


def _training_cases(sequences: int, tokens: int, heads: int, dim: int, reaches: tuple[float | None, ...]) -> list[Case]:
    size = (sequences, tokens, heads, dim)
    row_bytes = 2 * sequences * tokens * heads * dim
    name = f"B{sequences} T{tokens} H{heads} D{dim}"
    both, in_all = f"lightning forward and gradient, operands only, {name}", f"lightning forward and gradient {name}"
    bytes_moved = (4 * row_bytes, (4 + 7) * row_bytes)

    def operands(has_gradient: bool) -> Callable[[], Mapping[str, Work]]:
        return lambda: _operands(*size, has_gradient=has_gradient)

    return [
        _case(f"lightning forward, operands only, {name}", bytes_moved[0], reaches[0], operands(False), dim),
        _case(both, bytes_moved[1], reaches[1], operands(True), dim, has_gradient=True, has_silu=False),
        _case(in_all, bytes_moved[1], None, lambda: _train(*size), dim, has_gradient=True),
    ]


def _decode_bytes(batch: int, heads: int, dim: int) -> int:
    """Of 64 steps: rounded states and half the recent rows each time; once, states read and written, and all rows."""
    step = 2 * dim * dim + 2 * dim * CHUNK_LENGTH
    return batch * heads * (CHUNK_LENGTH * step + 10 * dim * dim + 4 * dim * CHUNK_LENGTH)


CASES = [
    *_training_cases(8, 4096, 64, 128, (0.80, 3.0)),
    *_training_cases(1, 131_072, 64, 128, (3.1, 12.5)),
    *_training_cases(8, 4096, 16, 128, (None, 0.85)),
    *_training_cases(8, 4096, 32, 64, (None, None)),
    _case("lightning prefill, 64K more, H64 D128", 8 * 65_536 * 64 * 128, None, lambda: _prefill(65_536, 64, 128), 128),
    _case(
        "lightning decode, 64 steps, B64 H64 D128",
        _decode_bytes(64, 64, 128),
        64 * 0.105,
        lambda: _decode(64, 64, 128),
        128,
    ),
]
