"""Softmax attention: training forward and backward, a piece of a long prefill, and a decode step.

Ours rotates queries and keys as well, and in prefill and decode appends to the pages; the peers only attend. H query
heads, K key heads, D head dim, T tokens of one sequence.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from cispo.kernels.chunks import CHUNK_LENGTH, chunk_grid
from cispo.kernels.softmax_attention import softmax_attention, softmax_decode, softmax_prefill
from cispo.kernels.softmax_cpu import Pages
from cispo.model.mixers import rotary_table
from kernel_cases import Case, Machine, graphed

DEVICE = torch.device("cuda")
THETA = 1e6
CHECKED_TOKENS = 2000
Work = Mapping[str, Callable[[], object]]


def _projections(tokens: int, heads: int, key_heads: int, dim: int, start: int = 0) -> tuple[Tensor, Tensor]:
    qkv = torch.randn(tokens, (heads + 2 * key_heads) * dim, device=DEVICE, dtype=torch.bfloat16)
    return qkv, rotary_table(torch.arange(start, start + tokens, device=DEVICE), dim // 2, THETA)


def _exact(qkv: Tensor, rotary: Tensor, heads: int, key_heads: int) -> Tensor:
    """Float64 attention of one sequence, differentiable; rotation of the first D / 2 dims."""
    x = qkv.double().view(len(qkv), heads + 2 * key_heads, -1)
    cos, sin = rotary.double().unbind(1)
    half = cos.shape[1]
    first, second, rest = x[:, : heads + key_heads].split([half, half, x.shape[2] - 2 * half], 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), 2).transpose(0, 1)
    q, k = turned.split([heads, key_heads])
    v = x[:, heads + key_heads :].transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


def _relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def _training_error(heads: int, key_heads: int, dim: int, is_backward: bool) -> float:
    qkv, rotary = _projections(CHECKED_TOKENS, heads, key_heads, dim)
    leaf, doubled = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out = softmax_attention(leaf, rotary, heads, key_heads, chunk_grid([CHECKED_TOKENS], DEVICE))
    exact = _exact(doubled, rotary, heads, key_heads)
    if not is_backward:
        return _relative(out.detach(), exact.detach())
    dout = torch.randn_like(out)
    (ours,), (wanted,) = torch.autograd.grad(out, leaf, dout), torch.autograd.grad(exact, doubled, dout.double())
    return _relative(ours, wanted)


def _training(tokens: int, heads: int, key_heads: int, dim: int, is_backward: bool) -> Work:
    qkv, rotary = _projections(tokens, heads, key_heads, dim)
    grid, ends = chunk_grid([tokens], DEVICE), torch.tensor([0, tokens], device=DEVICE, dtype=torch.int32)
    dout = torch.randn(tokens, heads * dim, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = qkv.view(tokens, -1, dim).split([heads, key_heads, key_heads], 1)
    k, v = (x.repeat_interleave(heads // key_heads, 1) for x in (k, v))
    packed = [x.contiguous() for x in (q, k, v)]
    batched = [x.transpose(0, 1).unsqueeze(0).contiguous() for x in (q, k, v)]

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = varlen_attn(q, k, v, ends, ends, tokens, tokens, window_size=(-1, 0))
        return out.flatten(1)

    def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).flatten(1)

    def timed(forward: Callable[..., Tensor], operands: list[Tensor]) -> Callable[[], object]:
        if not is_backward:
            return lambda: forward(*operands)
        leaves = [x.requires_grad_() for x in operands]
        return lambda: torch.autograd.grad(forward(*leaves), leaves, dout)

    ours = partial(softmax_attention, rotary_N2R=rotary, heads=heads, key_heads=key_heads, grid=grid)
    return {"cispo": timed(ours, [qkv]), "varlen_attn": timed(varlen, packed), "SDPA": timed(library, batched)}


def _training_floor(tokens: int, heads: int, dim: int, products: int, machine: Machine) -> float:
    return products * tokens**2 * heads * dim / machine.products_flops_per_s


def _pages(sequences: int, tokens: int, key_heads: int, dim: int) -> Pages:
    each = -(-tokens // CHUNK_LENGTH)
    shapes = (key_heads, dim, CHUNK_LENGTH), (key_heads, CHUNK_LENGTH, dim)
    k, v = (torch.randn(1 + sequences * each, *shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes)
    return Pages(k, v, 1 + torch.randperm(sequences * each, device=DEVICE).view(sequences, each))


def _piece(start: int, tokens: int, heads: int, key_heads: int, dim: int) -> Work:
    qkv, rotary = _projections(tokens, heads, key_heads, dim, start)
    grid, pages = chunk_grid([tokens], DEVICE, [start]), _pages(1, start + tokens, key_heads, dim)
    return {"cispo": lambda: softmax_prefill(qkv, rotary, heads, key_heads, grid, pages)}


def _piece_error(heads: int, key_heads: int, dim: int, last: int) -> float:
    """A sequence in two pieces, or all but its last token and then that token by decode."""
    qkv, rotary = _projections(CHECKED_TOKENS, heads, key_heads, dim)
    pages = _pages(1, CHECKED_TOKENS, key_heads, dim)
    start = CHECKED_TOKENS - last
    shape = (heads, key_heads)
    softmax_prefill(qkv[:start], rotary[:start], *shape, chunk_grid([start], DEVICE), pages)
    if last == 1:
        out = softmax_decode(qkv[start:], rotary[start:], *shape, pages, torch.tensor([start], device=DEVICE), 1)
    else:
        out = softmax_prefill(qkv[start:], rotary[start:], *shape, chunk_grid([last], DEVICE, [start]), pages)
    return _relative(out, _exact(qkv, rotary, *shape)[start:])


def _piece_floor(start: int, tokens: int, heads: int, dim: int, machine: Machine) -> float:
    return 4 * tokens * (start + tokens / 2) * heads * dim / machine.products_flops_per_s


def _decode(batch: int, context: int, heads: int, key_heads: int, dim: int) -> Work:
    qkv, _ = _projections(batch, heads, key_heads, dim)
    position_B = torch.full((batch,), context - 1, device=DEVICE)
    rotary, pages = rotary_table(position_B, dim // 2, THETA), _pages(batch, context, key_heads, dim)

    def step() -> Tensor:
        return softmax_decode(qkv, rotary, heads, key_heads, pages, position_B, batch)

    return {"cispo": graphed(step)}


def _decode_floor(batch: int, context: int, key_heads: int, dim: int, machine: Machine) -> float:
    return batch * context * key_heads * dim * 4 / machine.copy_bytes_per_s


# The forward is to take at most 1.35 times varlen_attn's 3.34 ms, forward and backward 1.15 times its 12.08 ms.
CASES = [
    Case("attention forward T 16384 H 16 K 16 D 128", partial(_training_floor, 16384, 16, 128, 2), 4.51,
         partial(_training, 16384, 16, 16, 128, False), partial(_training_error, 16, 16, 128, False)),
    Case("attention forward+backward T 16384 H 16 K 16 D 128", partial(_training_floor, 16384, 16, 128, 7), 13.89,
         partial(_training, 16384, 16, 16, 128, True), partial(_training_error, 16, 16, 128, True), 6e-3),
    Case("attention forward+backward T 16384 H 16 K 4 D 64", partial(_training_floor, 16384, 16, 64, 7), None,
         partial(_training, 16384, 16, 4, 64, True), partial(_training_error, 16, 4, 64, True), 6e-3),
    Case("attention prefill, last 65536 of 1,048,576, H 16 K 4 D 64", partial(_piece_floor, 983040, 65536, 16, 64),
         None, partial(_piece, 983040, 65536, 16, 4, 64), partial(_piece_error, 16, 4, 64, 333)),
    Case("attention decode, batch 256, context 4096, H 16 K 4 D 64", partial(_decode_floor, 256, 4096, 4, 64), None,
         partial(_decode, 256, 4096, 16, 4, 64), partial(_piece_error, 16, 4, 64, 1)),
]  # fmt: skip
