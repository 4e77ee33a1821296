"""The mixture of experts on CPU in float32: router, choice and experts in one call, and so their backward.

Experts of one token are added in order of their number, not of choice; otherwise this is `kernels.experts`. Sizes that
are not multiples of 16 lanes go to the plain form there.

N packed tokens, D model width, E experts, K experts a token, F expert width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.cpu_library import CpuFunction
from cispo.kernels.product import packed_weight
from cispo.kernels.routing import Observer

_LANES = 16
_PANEL = 32
_SPANS = 16

_experts = CpuFunction("experts", "pppppppppppniiiit")
_gradient = CpuFunction("experts_gradient", "pppppppppppppiiiiii")


def serves(x_ND: Tensor, router_ED: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> bool:
    """Whether the CPU kernel takes these operands; by dtype, device, D and F, never by the number of rows."""
    _, width, inner = down_EDF.shape
    return width % _LANES == 0 and inner % _LANES == 0 and cpu_library.serves(x_ND, router_ED, gate_up_EFD, down_EDF)


class _Choice(NamedTuple):
    """What steers the router and where its decisions are left; None for what is not wanted.

    threshold_N, entropy_N: float32. given_ids_NK, ids_NK: int32, contiguous; -1 is left where an expert was dropped.
    """

    threshold_N: Tensor | None = None
    given_ids_NK: Tensor | None = None
    ids_NK: Tensor | None = None
    entropy_N: Tensor | None = None


_PLAIN = _Choice()


def _run(
    x_ND: Tensor,
    router_ED: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    experts_per_token: int,
    choice: _Choice,
    weight_NK: Tensor | None = None,
    gate_up_NKF: Tensor | None = None,
) -> Tensor:
    experts, width, inner = down_EDF.shape
    y_ND = torch.empty_like(x_ND)
    _experts(
        x_ND,
        packed_weight(router_ED),
        packed_weight(gate_up_EFD, 2 * experts),
        packed_weight(down_EDF, experts),
        choice.threshold_N,
        choice.given_ids_NK,
        y_ND,
        choice.ids_NK,
        weight_NK,
        choice.entropy_N,
        gate_up_NKF,
        x_ND.shape[0],
        width,
        inner,
        experts,
        experts_per_token,
        torch.get_num_threads(),
    )
    return y_ND


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        router_ED: Tensor,
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
        experts_per_token: int,
        choice: _Choice,
    ) -> Tensor:
        slots = (x_ND.shape[0], experts_per_token)
        weight_NK = torch.empty(slots)
        gate_up_NKF = torch.empty(*slots, gate_up_EFD.shape[1])
        operands = x_ND, router_ED, gate_up_EFD, down_EDF
        y_ND = _run(*operands, experts_per_token, choice, weight_NK, gate_up_NKF)
        ctx.save_for_backward(*operands, choice.ids_NK, weight_NK, gate_up_NKF)
        return y_ND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, router_ED, gate_up_EFD, down_EDF, ids_NK, weight_NK, gate_up_NKF = ctx.saved_tensors
        experts, width, inner = down_EDF.shape
        inputs = (x_ND, router_ED, gate_up_EFD, down_EDF)
        outputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        sizes = (x_ND.shape[0], width, inner, experts, ids_NK.shape[1])
        scratch = torch.empty(_scratch_size(*sizes))
        dy_ND = gradients[0].contiguous()
        threads = torch.get_num_threads()
        _gradient(dy_ND, *inputs, ids_NK, weight_NK, gate_up_NKF, *outputs, scratch, *sizes, threads)
        return *outputs, None, None


def _scratch_size(tokens: int, width: int, inner: int, experts: int, experts_per_token: int) -> int:
    """Floats: packed weights, sums of weight gradients of every span, and a row and a value of every slot."""
    wide, long = -(-width // _PANEL) * _PANEL, -(-inner // _PANEL) * _PANEL
    packed = experts * 3 * wide * long
    sums = _SPANS * experts * width + (_SPANS + experts) * 3 * width * inner
    return packed + sums + tokens * experts_per_token * (width + 1)


_differentiable_experts: Callable[[Tensor, Tensor, Tensor, Tensor, int, _Choice], Tensor] = _Experts.apply


@functools.cache
def lone_router(width: int, device: torch.device) -> Tensor:
    """The router of a layer of one expert, float32 [1, width]: zeros, kept so that they are packed once."""
    with torch.inference_mode(False), cpu_library.unrecorded():
        return torch.zeros(1, width, device=device)


def expert_layer(
    x_ND: Tensor,
    router_ED: Tensor,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    experts_per_token: int,
    threshold_N: Tensor | None = None,
    given_ids_NK: Tensor | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """As `kernels.experts.expert_layer`, for operands that this module serves."""
    operands = x_ND.contiguous(), router_ED.contiguous(), gate_up_EFD.contiguous(), down_EDF.contiguous()
    is_training = torch.is_grad_enabled()
    if not is_training and threshold_N is None and given_ids_NK is None and observe is None:
        return _run(*operands, experts_per_token, _PLAIN)
    slots = x_ND.shape[0], experts_per_token
    choice = _Choice(
        threshold_N=None if threshold_N is None else _checked_threshold(threshold_N, slots[0]),
        given_ids_NK=None if given_ids_NK is None else _checked_ids(given_ids_NK, slots, router_ED.shape[0]),
        ids_NK=torch.empty(slots, dtype=torch.int32),
        entropy_N=None if observe is None else torch.empty(slots[0]),
    )
    run = _differentiable_experts if is_training else _run
    y_ND = run(*operands, experts_per_token, choice)
    if observe is not None and choice.ids_NK is not None and choice.entropy_N is not None:
        observe(choice.ids_NK, choice.entropy_N)
    return y_ND


def _checked_threshold(threshold_N: Tensor, tokens: int) -> Tensor:
    if threshold_N.shape != (tokens,):
        raise ValueError(f"thresholds of {tuple(threshold_N.shape)} for {tokens} tokens; give one for each token")
    return threshold_N.to("cpu", torch.float32).contiguous()


def _checked_ids(ids_NK: Tensor, slots: tuple[int, int], experts: int) -> Tensor:
    """The kernel takes ids as addresses, so none may lie outside."""
    if ids_NK.shape != slots:
        raise ValueError(f"expert ids of {tuple(ids_NK.shape)}, expected {slots}; they were recorded for other tokens")
    if ids_NK.numel() and not (int(ids_NK.min()) >= 0 and int(ids_NK.max()) < experts):
        raise ValueError(
            f"expert ids from {int(ids_NK.min())} to {int(ids_NK.max())} for {experts} experts; they were recorded "
            "with another policy"
        )
    return ids_NK.to(torch.int32).contiguous()
