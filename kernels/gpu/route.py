"""Which experts a token goes to, on CUDA: softmax in float32, the K largest or the given ones, and the gradient.

A row is worked out in one order whatever rows come with it. The twin is `kernels.experts.route`.
N packed tokens, E experts, K experts a token.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.gpu.build import Build

_TILE = 4096
"""Logits that one program holds."""


@triton.jit
def _route_kernel(
    logits,
    ids,
    weight,
    N,
    E,
    K: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    IS_RENORMALISED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Softmax, then the largest logit left K times, the lowest index among equals; or the ids that are given."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    choice = tl.arange(0, BLOCK_K)
    is_row = row < N
    logit = logits + tl.minimum(row, N - 1)[:, None] * E + expert[None, :]
    logit_NE = tl.load(logit, mask=(expert < E)[None, :], other=-float("inf"))
    exponential_NE = tl.exp(logit_NE - tl.max(logit_NE, 1)[:, None])
    total_N = tl.sum(exponential_NE, 1)
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
            tl.store(ids + row * K + k, id_N.to(tl.int64), mask=is_row)
        is_chosen_NE = expert[None, :] == id_N[:, None]
        is_left_NE = is_left_NE & (expert[None, :] != id_N[:, None])
        chosen_N = tl.sum(tl.where(is_chosen_NE, exponential_NE, 0.0), 1) / total_N
        weight_NK = tl.where(choice[None, :] == k, chosen_N[:, None], weight_NK)
    if IS_RENORMALISED:
        weight_NK = weight_NK / tl.sum(weight_NK, 1)[:, None]
    tl.store(weight + row[:, None] * K + choice[None, :], weight_NK, mask=is_row[:, None] & (choice < K)[None, :])


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
    """Renormalised weights are a softmax over the chosen logits alone, so the others get no gradient."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    is_row = row < N
    mean_N = tl.zeros([BLOCK_N], tl.float32)
    for k in tl.static_range(K):
        weight_N = tl.load(weight + row * K + k, mask=is_row, other=0.0)
        mean_N += weight_N * tl.load(dweight + row * K + k, mask=is_row, other=0.0)
    mask = is_row[:, None] & (expert < E)[None, :]
    gradient_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if not IS_RENORMALISED:
        logit = logits + tl.minimum(row, N - 1)[:, None] * E + expert[None, :]
        logit_NE = tl.load(logit, mask=(expert < E)[None, :], other=-float("inf"))
        exponential_NE = tl.exp(logit_NE - tl.max(logit_NE, 1)[:, None])
        gradient_NE = -exponential_NE / tl.sum(exponential_NE, 1)[:, None] * mean_N[:, None]
    for k in tl.static_range(K):
        id_N = tl.load(ids + row * K + k, mask=is_row, other=0).to(tl.int32)
        weight_N = tl.load(weight + row * K + k, mask=is_row, other=0.0)
        chosen_N = tl.load(dweight + row * K + k, mask=is_row, other=0.0)
        if IS_RENORMALISED:
            chosen_N -= mean_N
        gradient_NE += tl.where(expert[None, :] == id_N[:, None], (weight_N * chosen_N)[:, None], 0.0)
    tl.store(dlogits + row[:, None] * E + expert[None, :], gradient_NE, mask=mask)


def _constants(experts: int, experts_per_token: int) -> dict[str, Any]:
    block_e = max(16, triton.next_power_of_2(experts))
    return {"K": experts_per_token, "BLOCK_N": max(1, min(64, _TILE // block_e)), "BLOCK_E": block_e}


_TYPES = {"N": "i32", "E": "i32", "ids": "*i64"} | dict.fromkeys(("logits", "weight", "dweight", "dlogits"), "*fp32")


def _builds(experts: int, experts_per_token: int, is_renormalised: bool) -> list[Build]:
    constants = _constants(experts, experts_per_token) | {"IS_RENORMALISED": is_renormalised}
    size = f"{experts}_{experts_per_token}_{is_renormalised}"
    forward = constants | {"BLOCK_K": triton.next_power_of_2(experts_per_token)}
    return [
        *(
            Build(f"route_{size}_{is_given}", _route_kernel, _TYPES, forward | {"IS_GIVEN": is_given}, 4, 1, False)
            for is_given in (False, True)
        ),
        Build(f"route_gradient_{size}", _route_gradient_kernel, _TYPES, constants, 4, 1, False),
    ]


BUILDS: list[Build] = [
    build
    for experts, experts_per_token in ((4, 2), (32, 2), (128, 8), (256, 8))
    for is_renormalised in (False, True)
    for build in _builds(experts, experts_per_token, is_renormalised)
]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NE: Tensor, ids_NK: Tensor | None, experts_per_token: int, is_renormalised: bool
    ) -> tuple[Tensor, Tensor]:
        tokens, experts = logits_NE.shape
        is_given = ids_NK is not None
        if ids_NK is None:
            ids_NK = logits_NE.new_empty(tokens, experts_per_token, dtype=torch.int64)
        weight_NK = logits_NE.new_empty(tokens, experts_per_token)
        constants = _constants(experts, experts_per_token)
        _route_kernel[(triton.cdiv(tokens, constants["BLOCK_N"]),)](
            logits_NE,
            ids_NK,
            weight_NK,
            tokens,
            experts,
            IS_GIVEN=is_given,
            IS_RENORMALISED=is_renormalised,
            BLOCK_K=triton.next_power_of_2(experts_per_token),
            num_warps=4,
            num_stages=1,
            **constants,
        )
        ctx.save_for_backward(logits_NE, ids_NK, weight_NK)
        ctx.is_renormalised = is_renormalised
        ctx.mark_non_differentiable(ids_NK)
        return ids_NK, weight_NK

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits_NE, ids_NK, weight_NK = ctx.saved_tensors
        (tokens, experts), experts_per_token = logits_NE.shape, ids_NK.shape[1]
        dlogits_NE = torch.empty_like(logits_NE)
        constants = _constants(experts, experts_per_token)
        _route_gradient_kernel[(triton.cdiv(tokens, constants["BLOCK_N"]),)](
            logits_NE,
            ids_NK,
            weight_NK,
            gradients[1].contiguous(),
            dlogits_NE,
            tokens,
            experts,
            IS_RENORMALISED=ctx.is_renormalised,
            num_warps=4,
            num_stages=1,
            **constants,
        )
        return dlogits_NE, None, None, None


_route: Callable[..., tuple[Tensor, Tensor]] = _Route.apply


def route(
    logits_NE: Tensor, experts_per_token: int, *, is_renormalised: bool = True, ids_NK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ids (int64) and weights (float32) of each token's experts, [N, K] each; float32 logits, differentiable in them.

    Chosen are the largest logits, the largest first and the lower index among equals, or the experts in ids_NK. Weights
    are their softmax probabilities over all experts, scaled to sum to 1 if is_renormalised.
    """
    given_NK = None if ids_NK is None else ids_NK.contiguous()
    chosen_NK, weight_NK = _route(logits_NE.contiguous(), given_NK, experts_per_token, is_renormalised)
    return (chosen_NK if ids_NK is None else ids_NK), weight_NK
