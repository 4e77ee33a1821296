"""Which experts a token goes to, on CUDA: `kernels.routing.route` and its gradient, one kernel each.

A row is worked out in one order whatever rows come with it. The gradient, for p the softmax over all experts, w the
weights, A = sum_k w_k dw_k / sum_k w_k, and over the chosen experts c:

    renormalised:  dlogit_e = [e in c] w_e (dw_e - A)
    not:           dlogit_e = [e in c] (w_e (dw_e - A) + A p_e) - A p_e sum_k w_k

Dropped experts have w = 0, and both hold with and without a threshold. N packed tokens, E experts, K experts a token.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build

_TILE = 2048
"""Logits that one program holds."""


@triton.jit
def _exponentials(logits, row, expert, N, E):
    """exp(logit - largest) of the tile, and its sum over experts."""
    logit = logits + tl.minimum(row, N - 1)[:, None] * E + expert[None, :]
    logit_NE = tl.load(logit, mask=(expert < E)[None, :], other=-float("inf"))
    exponential_NE = tl.exp(logit_NE - tl.max(logit_NE, 1)[:, None])
    return logit_NE, exponential_NE, tl.sum(exponential_NE, 1)


@triton.jit
def _route_kernel(
    logits,
    threshold,
    ids,
    weight,
    is_kept,
    N,
    E,
    K: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    IS_RENORMALISED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    choice = tl.arange(0, BLOCK_K)
    is_row = row < N
    logit_NE, exponential_NE, total_N = _exponentials(logits, row, expert, N, E)
    weight_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    is_left_NE = (row[:, None] >= 0) & (expert < E)[None, :]
    for k in tl.static_range(K):
        if IS_GIVEN:
            id_N = tl.load(ids + row * K + k, mask=is_row, other=0).to(tl.int32)
        else:
            left_NE = tl.where(is_left_NE, logit_NE, -float("inf"))
            is_largest_NE = is_left_NE & (left_NE == tl.max(left_NE, 1)[:, None])
            # A row with a NaN has no largest: the last expert takes it, with a weight of NaN.
            id_N = tl.min(tl.where(is_largest_NE, expert[None, :], E - 1), 1)
            is_left_NE = is_left_NE & (expert[None, :] != id_N[:, None])
            tl.store(ids + row * K + k, id_N.to(tl.int64), mask=is_row)
        chosen_N = tl.sum(tl.where(expert[None, :] == id_N[:, None], exponential_NE, 0.0), 1) / total_N
        # Nobody waits here for the device to tell of a given id that is no expert: its token turns to NaN.
        chosen_N = tl.where((id_N >= 0) & (id_N < E), chosen_N, float("nan"))
        weight_NK = tl.where((choice == k)[None, :], chosen_N[:, None], weight_NK)
    whole_N = tl.sum(weight_NK, 1)
    kept_N = whole_N
    place = row[:, None] * K + choice[None, :]
    mask = is_row[:, None] & (choice < K)[None, :]
    if HAS_THRESHOLD:
        threshold_N = tl.load(threshold + row, mask=is_row, other=0.0)
        is_heaviest_NK = (weight_NK == tl.max(weight_NK, 1)[:, None]) & (choice < K)[None, :]
        heaviest_N = tl.min(tl.where(is_heaviest_NK, choice[None, :], BLOCK_K), 1)
        is_kept_NK = (weight_NK / whole_N[:, None] >= threshold_N[:, None]) | (choice[None, :] == heaviest_N[:, None])
        weight_NK = tl.where(is_kept_NK, weight_NK, weight_NK * 0.0)
        kept_N = tl.sum(weight_NK, 1)
        tl.store(is_kept + place, is_kept_NK.to(tl.uint8), mask=mask)
    if IS_RENORMALISED:
        weight_NK = weight_NK / kept_N[:, None]
    elif HAS_THRESHOLD:
        weight_NK = weight_NK * (whole_N / kept_N)[:, None]
    tl.store(weight + place, weight_NK, mask=mask)


@triton.jit
def _route_gradient_kernel(
    logits,
    ids,
    weight,
    dweight,
    dlogits,
    N,
    E,
    K: tl.constexpr,
    IS_RENORMALISED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    is_row = row < N
    mean_N = tl.zeros([BLOCK_N], tl.float32)
    whole_N = tl.zeros([BLOCK_N], tl.float32)
    for k in tl.static_range(K):
        weight_N = tl.load(weight + row * K + k, mask=is_row, other=1.0)
        mean_N += weight_N * tl.load(dweight + row * K + k, mask=is_row, other=0.0)
        whole_N += weight_N
    mean_N = mean_N / whole_N
    gradient_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if not IS_RENORMALISED:
        _, exponential_NE, total_N = _exponentials(logits, row, expert, N, E)
        mean_NE = exponential_NE * (mean_N / total_N)[:, None]
        gradient_NE -= mean_NE * whole_N[:, None]
    for k in tl.static_range(K):
        id_N = tl.load(ids + row * K + k, mask=is_row, other=0).to(tl.int32)
        weight_N = tl.load(weight + row * K + k, mask=is_row, other=0.0)
        dweight_N = tl.load(dweight + row * K + k, mask=is_row, other=0.0)
        chosen_NE = (weight_N * (dweight_N - mean_N))[:, None]
        if not IS_RENORMALISED:
            chosen_NE += mean_NE
        gradient_NE += tl.where(expert[None, :] == id_N[:, None], chosen_NE, 0.0)
    mask = is_row[:, None] & (expert < E)[None, :]
    tl.store(dlogits + row[:, None] * E + expert[None, :], gradient_NE, mask=mask)


_POINTERS = {"ids": "*i64", "is_kept": "*u8"}
_TYPES = _POINTERS | dict.fromkeys(("logits", "threshold", "weight", "dweight", "dlogits"), "*fp32")


def _tile(experts: int, experts_per_token: int, is_renormalised: bool) -> dict[str, Any]:
    block_e = max(16, triton.next_power_of_2(experts))
    block_n = max(1, min(64, _TILE // block_e))
    return {"K": experts_per_token, "IS_RENORMALISED": is_renormalised, "BLOCK_N": block_n, "BLOCK_E": block_e}


@cache
def _forward(experts: int, k: int, is_renormalised: bool, is_given: bool, has_threshold: bool) -> Build:
    flags = {"IS_GIVEN": is_given, "HAS_THRESHOLD": has_threshold, "BLOCK_K": triton.next_power_of_2(k)}
    name = f"route_{experts}_{k}_{is_renormalised:d}{is_given:d}{has_threshold:d}"
    types = _TYPES | {"N": "i32", "E": "i32"}
    return Build(name, _route_kernel, types, _tile(experts, k, is_renormalised) | flags, 4, 1, False)


@cache
def _backward(experts: int, k: int, is_renormalised: bool) -> Build:
    name, types = f"route_gradient_{experts}_{k}_{is_renormalised:d}", _TYPES | {"N": "i32", "E": "i32"}
    return Build(name, _route_gradient_kernel, types, _tile(experts, k, is_renormalised), 4, 1, False)


BUILDS: list[Build] = [
    build
    for experts, k in ((4, 2), (32, 2), (256, 8))
    for build in (
        _forward(experts, k, True, False, False),
        _forward(experts, k, True, True, False),
        _forward(experts, k, False, False, True),
        _backward(experts, k, True),
        _backward(experts, k, False),
    )
]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NE: Tensor,
        given_ids_NK: Tensor | None,
        threshold_N: Tensor | None,
        k: int,
        is_renormalised: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, experts = logits_NE.shape
        is_given, has_threshold = given_ids_NK is not None, threshold_N is not None
        build = _forward(experts, k, is_renormalised, is_given, has_threshold)
        ids_NK = logits_NE.new_empty(tokens, k, dtype=torch.int64) if given_ids_NK is None else given_ids_NK
        weight_NK = logits_NE.new_empty(tokens, k)
        is_kept_NK = logits_NE.new_empty((tokens, k) if has_threshold else (0,), dtype=torch.uint8)
        threshold_N = weight_NK if threshold_N is None else threshold_N
        grid = (triton.cdiv(tokens, build.constants["BLOCK_N"]),)
        build.launch(grid, logits_NE, threshold_N, ids_NK, weight_NK, is_kept_NK, tokens, experts)
        ctx.save_for_backward(logits_NE, ids_NK, weight_NK)
        ctx.is_renormalised = is_renormalised
        ctx.mark_non_differentiable(ids_NK, is_kept_NK)
        return ids_NK, weight_NK, is_kept_NK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits_NE, ids_NK, weight_NK = ctx.saved_tensors
        tokens, experts = logits_NE.shape
        build = _backward(experts, ids_NK.shape[1], ctx.is_renormalised)
        dlogits_NE = torch.empty_like(logits_NE)
        grid = (triton.cdiv(tokens, build.constants["BLOCK_N"]),)
        build.launch(grid, logits_NE, ids_NK, weight_NK, gradients[1].contiguous(), dlogits_NE, tokens, experts)
        return dlogits_NE, None, None, None, None


_route: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Route.apply


def route(
    logits_NE: Tensor,
    experts_per_token: int,
    is_renormalised: bool,
    threshold_N: Tensor | None,
    given_ids_NK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """expert_ids_NK (int64), weight_NK (float32) and is_kept_NK of `kernels.routing.route`, for float32 logits.

    A given id that is no expert makes its token's weights NaN.
    """
    given_ids_NK = None if given_ids_NK is None else given_ids_NK.long().contiguous()
    threshold_N = None if threshold_N is None else threshold_N.float().contiguous()
    logits_NE = logits_NE.contiguous()
    ids_NK, weight_NK, is_kept_NK = _route(logits_NE, given_ids_NK, threshold_N, experts_per_token, is_renormalised)
    return ids_NK, weight_NK, None if threshold_N is None else is_kept_NK.view(torch.bool)
