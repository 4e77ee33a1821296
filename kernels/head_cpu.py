"""The head's logprobs and gradients, and sampling from its logits, on CPU in float32.

The logits of the rows of one block stay between the pass that yields their logprobs and the pass that, once the
coefficients are known, makes gradients of them. Sampling takes its logprobs from the same function.

N rows, V vocabulary, D model width (a multiple of 16), C rows of one block, B sequences.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cispo.kernels import cpu_library
from cispo.kernels.cpu_library import CpuFunction
from cispo.kernels.product import packed_weight

_LANES = 16
_PANEL = 32

_head_logprobs = CpuFunction("head_logprobs", "pippfppppiiii")
_head_gradient = CpuFunction("head_gradient", "ppppfpipppiiii")
_pack_head = CpuFunction("pack_head", "ppii")
_sample = CpuFunction("sample", "pipppppnit")


def serves(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether these kernels take this head: float32 on CPU, of a width that is a multiple of 16."""
    return cpu_library.serves(hidden_ND, weight_VD) and weight_VD.shape[1] % _LANES == 0


def _in_range(targets_N: Tensor, vocabulary: int) -> Tensor:
    """The targets as C++ reads them. IndexError for one outside the vocabulary."""
    if targets_N.numel():
        low, high = (int(bound) for bound in torch.aminmax(targets_N))
        if low < 0 or high >= vocabulary:
            raise IndexError(f"targets from {low} to {high} do not fit a vocabulary of {vocabulary} tokens")
    return targets_N.to(torch.int64).contiguous()


def _rows(x_NK: Tensor) -> Tensor:
    """The same with each row contiguous; rows may lie any distance apart."""
    return x_NK if x_NK.stride(1) == 1 else x_NK.contiguous()


def head_logprobs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As cispo.kernels.head_loss.head_logprobs."""
    rows, (vocabulary, width) = hidden_ND.shape[0], weight_VD.shape
    hidden_ND, packed, targets_N = _rows(hidden_ND), packed_weight(weight_VD), _in_range(targets_N, vocabulary)
    logprob_N, entropy_N = torch.empty(rows), torch.empty(rows)
    inputs = (hidden_ND, hidden_ND.stride(0), packed, targets_N, temperature)
    sizes = (rows, width, vocabulary, torch.get_num_threads())
    _head_logprobs(*inputs, None, None, logprob_N, entropy_N, *sizes)
    return logprob_N, entropy_N


class _HeadPolicyLoss(torch.autograd.Function):
    """As the twin's: gradients come with the logits, and are only scaled later."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        coefficients: Callable[[Tensor, slice], Tensor],
        temperature: float,
        blocks: list[slice],
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, (vocabulary, width) = hidden_ND.shape[0], weight_VD.shape
        packed = packed_weight(weight_VD)
        packed_transpose = torch.empty(-(-width // _PANEL) * _PANEL * vocabulary)
        _pack_head(weight_VD, packed_transpose, vocabulary, width)
        dhidden_ND, dweight_VD = torch.empty(rows, width), torch.zeros(vocabulary, width)
        logprob_N, entropy_N, loss = torch.empty(rows), torch.empty(rows), torch.zeros(())
        largest = max((block.stop - block.start for block in blocks), default=0)
        weights_CV, totals_C = torch.empty(largest, vocabulary), torch.empty(largest)
        for block in blocks:
            hidden_CD, target_C, logprob_C = hidden_ND[block], targets_N[block], logprob_N[block]
            sizes = (len(target_C), width, vocabulary, torch.get_num_threads())
            inputs = (hidden_CD, hidden_CD.stride(0), packed, target_C, temperature)
            _head_logprobs(*inputs, weights_CV, totals_C, logprob_C, entropy_N[block], *sizes)
            coefficient_C = coefficients(logprob_C, block).to(torch.float32).contiguous()
            loss -= (coefficient_C * logprob_C).sum()
            dlogits = (weights_CV, totals_C, target_C, coefficient_C, temperature)
            inputs_again = (hidden_CD, hidden_CD.stride(0), packed_transpose)
            _head_gradient(*dlogits, *inputs_again, dhidden_ND[block], dweight_VD, *sizes)
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.mark_non_differentiable(logprob_N, entropy_N)
        return loss, logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        if float(gradients[0]) != 1.0:
            dhidden_ND, dweight_VD = dhidden_ND * gradients[0], dweight_VD * gradients[0]
        return dhidden_ND, dweight_VD, None, None, None, None


def head_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    coefficients: Callable[[Tensor, slice], Tensor],
    temperature: float,
    blocks: Iterable[slice],
) -> tuple[Tensor, Tensor, Tensor]:
    """As cispo.kernels.head_loss.head_policy_loss, with coefficients of these blocks; loss, logprob_N and entropy_N."""
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _HeadPolicyLoss.apply
    targets_N = _in_range(targets_N, weight_VD.shape[0])
    return apply(_rows(hidden_ND), weight_VD.contiguous(), targets_N, coefficients, temperature, list(blocks))


def sample(
    logits_BV: Tensor, uniform_B: Tensor, temperature_B: Tensor | None, cut_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and logprobs of cispo.rollout.sampling.sample_tokens, from float32 logits on CPU."""
    batch, vocabulary = logits_BV.shape
    logits_BV = _rows(logits_BV)
    temperature_B = None if temperature_B is None else temperature_B.contiguous()
    ids_B, logprob_B = torch.empty(batch, dtype=torch.int64), torch.empty(batch)
    cut_BV = None if cut_BV is None else cut_BV.contiguous()
    inputs = (logits_BV, logits_BV.stride(0), cut_BV, temperature_B, uniform_B.contiguous())
    _sample(*inputs, ids_B, logprob_B, batch, vocabulary, torch.get_num_threads())
    return ids_B, logprob_B
