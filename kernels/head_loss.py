"""From hidden states to logprobs and policy-gradient loss, without all logits in memory.

The gradient of every policy-gradient objective is a sum of `coefficient * grad(logprob)` with a coefficient that takes
no gradient, so the loss of a block of rows, its coefficients and its gradients come out of one pass over the block's
logits:

    loss = -sum_n c_n logprob_n        dloss/dlogit_nv = -c_n (1[v = target_n] - p_nv) / temperature

Logits and everything after them are float32. Rows are computed in blocks; a row's values do not depend on its block.
On CPU cispo.kernels.head_cpu does all of that in float32, on CUDA cispo.kernels.gpu.head; sampling takes its logprobs
from the same places.

N rows, V vocabulary, D model width, C rows of one block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cispo.kernels import head_cpu
from cispo.kernels.product import product

BLOCK_ROWS = 2048

Coefficients = Callable[[Tensor, slice], Tensor]
"""(logprob_C, rows) -> coefficient_C, both float32 and without gradient; rows are those of the call's N."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadLoss:
    """loss: float32 scalar with gradients to hidden and head weight. logprob_N, entropy_N: float32, detached."""

    loss: Tensor
    logprob_N: Tensor
    entropy_N: Tensor


def _on_gpu(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether the CUDA kernels take this head; only asked of a CUDA tensor are they imported."""
    if not hidden_ND.is_cuda:
        return False
    from cispo.kernels.gpu import head as gpu

    return gpu.serves(hidden_ND, weight_VD)


def head_logits(hidden_ND: Tensor, weight_VD: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Float32 logits [N, V] at a temperature; hidden and weight in one dtype, products accumulated in float32."""
    if hidden_ND.is_cuda and hidden_ND.dtype is torch.bfloat16:
        from cispo.kernels.gpu.product import product as gpu_product

        logits_NV = gpu_product(hidden_ND, weight_VD, torch.float32)
    else:
        logits_NV = product(hidden_ND.float(), weight_VD.float())
    if temperature == 1.0:
        return logits_NV
    # By a tensor, not a Python number: CUDA would multiply by the number's reciprocal, and sampling divides row by row.
    return logits_NV / torch.full((), temperature, device=logits_NV.device)


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, rows))


def _entropy(logprob_CV: Tensor) -> Tensor:
    return -(logprob_CV.exp() * logprob_CV).sum(-1)


@torch.no_grad()
def head_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row's distribution, in nats; float32 [N] each.

    hidden_ND: final hidden states. weight_VD: LM head. targets_N: int64 token ids. temperature: > 0.
    """
    if head_cpu.serves(hidden_ND, weight_VD):
        return head_cpu.head_logprobs(hidden_ND, weight_VD, targets_N, temperature)
    if _on_gpu(hidden_ND, weight_VD):
        from cispo.kernels.gpu import head as gpu

        return gpu.head_logprobs(hidden_ND, weight_VD, targets_N, temperature)
    logprob_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=torch.float32)
    entropy_N = torch.empty_like(logprob_N)
    for rows in _blocks(hidden_ND.shape[0]):
        logprob_CV = torch.log_softmax(head_logits(hidden_ND[rows], weight_VD, temperature=temperature), dim=-1)
        logprob_N[rows] = logprob_CV.gather(1, targets_N[rows].unsqueeze(1)).squeeze(1)
        entropy_N[rows] = _entropy(logprob_CV)
    return logprob_N, entropy_N


class _HeadPolicyLoss(torch.autograd.Function):
    """Gradients are known once the coefficients are, so they are computed with the logits and only scaled later."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        coefficients: Coefficients,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dhidden_ND = torch.empty_like(hidden_ND)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        logprob_N = hidden_ND.new_empty(hidden_ND.shape[0], dtype=torch.float32)
        entropy_N = torch.empty_like(logprob_N)
        loss = hidden_ND.new_zeros((), dtype=torch.float32)
        for rows in _blocks(hidden_ND.shape[0]):
            target_C1 = targets_N[rows].unsqueeze(1)
            logprob_CV = torch.log_softmax(head_logits(hidden_ND[rows], weight_VD, temperature=temperature), dim=-1)
            logprob_N[rows] = logprob_CV.gather(1, target_C1).squeeze(1)
            entropy_N[rows] = _entropy(logprob_CV)
            coefficient_C = coefficients(logprob_N[rows], rows)
            loss -= (coefficient_C * logprob_N[rows]).sum()
            scale_C1 = (coefficient_C / temperature).unsqueeze(1)
            dlogits_CV = logprob_CV.exp_().mul_(scale_C1).scatter_add_(1, target_C1, -scale_C1)
            dlogits_CV = dlogits_CV.to(hidden_ND.dtype)
            dhidden_ND[rows] = dlogits_CV @ weight_VD
            dweight_VD += (dlogits_CV.t() @ hidden_ND[rows]).float()
        ctx.save_for_backward(dhidden_ND, dweight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(logprob_N, entropy_N)
        return loss, logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        return dhidden_ND * gradients[0], dweight_VD * gradients[0], None, None, None


def head_policy_loss(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, coefficients: Coefficients, *, temperature: float
) -> HeadLoss:
    """-sum_n coefficient_n * logprob_n with its gradients; `coefficients` sees the logprobs of each block of rows.

    hidden_ND: final hidden states, one row a loss token. weight_VD: LM head. targets_N: int64 token ids.
    coefficients: called once a block, in order, on detached float32 logprobs. temperature: > 0.
    """
    if head_cpu.serves(hidden_ND, weight_VD):
        blocks = _blocks(hidden_ND.shape[0])
        outputs = head_cpu.head_policy_loss(hidden_ND, weight_VD, targets_N, coefficients, temperature, blocks)
    elif _on_gpu(hidden_ND, weight_VD):
        from cispo.kernels.gpu import head as gpu

        outputs = gpu.head_policy_loss(hidden_ND, weight_VD, targets_N, coefficients, temperature)
    else:
        apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _HeadPolicyLoss.apply
        outputs = apply(hidden_ND, weight_VD, targets_N, coefficients, temperature)
    loss, logprob_N, entropy_N = outputs
    return HeadLoss(loss=loss, logprob_N=logprob_N, entropy_N=entropy_N)
