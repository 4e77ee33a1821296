"""Lightning attention: training, prefill in pieces and decode, beside fla's kernels for a constant decay a head.

Times are of the work as the model has it: projections before SiLU in, outputs or their gradients out. fla has no SiLU,
so its times have PyTorch's beside it. "operands only" starts from q, k and v, as fla's own kernels do. The floor counts
what must be read and written once; the work is bound by memory at these sizes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH, chunk_grid
from cispo.kernels.gpu import lightning_forward
from cispo.kernels.lightning_attention import decays, lightning_attention, lightning_decode, lightning_prefill
from cispo.model.mixers import lightning_slopes
from kernel_cases import Case, Machine

try:
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
except ImportError:
    chunk_simple_gla = fused_recurrent_simple_gla = None

Work = Callable[[], object]
CHECKED_LENGTHS = (700, 1, 64, 1283)


def _slopes(heads: int) -> Tensor:
    return lightning_slopes(heads, 1, 80).cuda()


def _extra() -> Mapping[str, str]:
    return {} if chunk_simple_gla else {"fla": "not installed"}


def _projections(tokens: int, heads: int, dim: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(tokens)
    return torch.randn(tokens, 3 * heads * dim, device="cuda", dtype=torch.bfloat16, generator=generator)


def _reference(x_NI: Tensor, lengths: tuple[int, ...], slopes_H: Tensor) -> Tensor:
    """Decayed scores times values in float64, of operands rounded as they are for the kernels."""
    outs = []
    exact_NI = F.silu(x_NI)
    rounding_NI = (F.silu(x_NI.bfloat16()).double() - exact_NI).detach()
    for rows in (exact_NI + rounding_NI).split(lengths):
        q, k, v = rows.view(len(rows), len(slopes_H), 3, -1).permute(2, 1, 0, 3)
        position_T = torch.arange(len(rows), device=rows.device)
        distance_TT = position_T[:, None] - position_T
        decay_HTT = torch.exp(-slopes_H.double()[:, None, None] * distance_TT.clamp(min=0)) * (distance_TT >= 0)
        outs.append((((q @ k.mT) * decay_HTT) @ v).transpose(0, 1).flatten(1))
    return torch.cat(outs)


def _error(dim: int, has_gradient: bool) -> float:
    slopes_H = _slopes(4)
    x_NI = _projections(sum(CHECKED_LENGTHS), len(slopes_H), dim).requires_grad_()
    x_double = x_NI.detach().double().requires_grad_()
    out_NJ = lightning_attention(x_NI, decays(slopes_H), chunk_grid(CHECKED_LENGTHS, x_NI.device))
    wanted_NJ = _reference(x_double, CHECKED_LENGTHS, slopes_H)
    ours, wanted = out_NJ.detach(), wanted_NJ.detach()
    if has_gradient:
        dout_NJ = torch.randn_like(out_NJ)
        (ours,) = torch.autograd.grad(out_NJ, x_NI, dout_NJ)
        (wanted,) = torch.autograd.grad(wanted_NJ, x_double, dout_NJ.double())
    return float((ours.double() - wanted).norm() / wanted.norm())


def _fla(x_NI: Tensor, sequences: int, slopes_H: Tensor) -> Tensor:
    q, k, v = x_NI.view(sequences, -1, len(slopes_H), 3, x_NI.shape[1] // (3 * len(slopes_H))).unbind(3)
    out: Tensor = chunk_simple_gla(q.contiguous(), k.contiguous(), v.contiguous(), g_gamma=-slopes_H, scale=1.0)[0]
    return out


def _operands(sequences: int, tokens: int, heads: int, dim: int) -> Mapping[str, Work]:
    slopes_H, grid = _slopes(heads), chunk_grid([tokens] * sequences, torch.device("cuda"))
    qkv_NI = lightning_forward.silu_rows(_projections(sequences * tokens, heads, dim))
    works: dict[str, Work] = {"cispo": lambda: lightning_forward.forward(qkv_NI, slopes_H, grid)}
    if chunk_simple_gla:
        q, k, v = (x.contiguous() for x in qkv_NI.view(sequences, tokens, heads, 3, dim).unbind(3))
        works["fla"] = lambda: chunk_simple_gla(q, k, v, g_gamma=-slopes_H, scale=1.0)
    return works


def _train(sequences: int, tokens: int, heads: int, dim: int) -> Mapping[str, Work]:
    slopes_H, grid = _slopes(heads), chunk_grid([tokens] * sequences, torch.device("cuda"))
    constants = decays(slopes_H)
    x_NI = _projections(sequences * tokens, heads, dim).requires_grad_()
    dout_NJ = torch.randn(sequences * tokens, heads * dim, device="cuda", dtype=torch.bfloat16)

    def ours() -> object:
        return torch.autograd.grad(lightning_attention(x_NI, constants, grid), x_NI, dout_NJ)

    def theirs() -> object:
        out = _fla(F.silu(x_NI), sequences, slopes_H)
        return torch.autograd.grad(out, x_NI, dout_NJ.view(out.shape))

    return {"cispo": ours} | ({"fla and SiLU": theirs} if chunk_simple_gla else {})


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
        works["fla and SiLU"] = lambda: _fla(F.silu(x_NI), 1, constants.slopes_H)
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

    return {"cispo": _graph(ours)} | ({"fla and SiLU": _graph(theirs)} if fused_recurrent_simple_gla else {})


def _graph(work: Callable[[], None]) -> Work:
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _case(name: str, bytes_moved: int, reach_ms: float | None, prepare: Any, dim: int, **checks: Any) -> Case:
    def floor_s(machine: Machine) -> float:
        return bytes_moved / machine.copy_bytes_per_s

    error = checks.pop("error", lambda: _error(dim, has_gradient=False))
    return Case(name, floor_s, reach_ms, prepare, error, extra=_extra())


def _training_cases(sequences: int, tokens: int, heads: int, dim: int, reaches: tuple[float | None, ...]) -> list[Case]:
    size = (sequences, tokens, heads, dim)
    row_bytes = 2 * sequences * tokens * heads * dim
    name = f"B{sequences} T{tokens} H{heads} D{dim}"
    return [
        _case(f"lightning forward, operands only, {name}", 4 * row_bytes, reaches[0], lambda: _operands(*size), dim),
        _case(
            f"lightning forward and gradient {name}",
            (4 + 7) * row_bytes,
            reaches[1],
            lambda: _train(*size),
            dim,
            error=lambda: _error(dim, has_gradient=True),
        ),
    ]


def _decode_bytes(batch: int, heads: int, dim: int) -> int:
    """Of 64 steps: rounded states and half the recent rows each time; once, states read and written, and all rows."""
    step = 2 * dim * dim + 2 * dim * CHUNK_LENGTH
    return batch * heads * (CHUNK_LENGTH * step + 10 * dim * dim + 4 * dim * CHUNK_LENGTH)


CASES = [
    *_training_cases(8, 4096, 64, 128, (0.80, 3.0)),
    *_training_cases(1, 131_072, 64, 128, (None, None)),
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
