"""The head: loss and both gradients of 8192 rows, scoring without gradients, and plain PyTorch in one piece beside it.

The floor counts three products (one for scoring) and nothing else.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cispo.kernels.head_loss import head_logprobs, head_policy_loss
from kernel_cases import Case, Machine

ROWS = 8192
CHECKED_ROWS, CHECKED_VOCABULARY = 512, 8000
SIZES = ((2048, 151_936), (6144, 200_064))
"""Model width and vocabulary."""


def _inputs(rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head weight, targets, coefficients."""
    generator = torch.Generator("cuda").manual_seed(width)
    kinds = {"device": "cuda", "generator": generator}
    hidden_ND = torch.randn(rows, width, dtype=torch.bfloat16, **kinds)
    weight_VD = torch.randn(vocabulary, width, dtype=torch.bfloat16, **kinds).mul_(0.02)
    return hidden_ND, weight_VD, torch.randint(0, vocabulary, (rows,), **kinds), torch.randn(rows, **kinds)


def _ours(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, coefficient_N: Tensor) -> tuple[Tensor, ...]:
    leaves = hidden_ND.detach().requires_grad_(), weight_VD.detach().requires_grad_()
    head = head_policy_loss(*leaves, targets_N, lambda _, rows: coefficient_N[rows], temperature=1.0)
    return head.loss.detach(), head.logprob_N, head.entropy_N, *torch.autograd.grad(head.loss, leaves)


def _in_one_piece(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, coefficient_N: Tensor) -> tuple[Tensor, ...]:
    """What a trainer without a fused head computes: all logits, made float32, and autograd through log_softmax."""
    leaves = hidden_ND.detach().requires_grad_(), weight_VD.detach().requires_grad_()
    logits_NV = leaves[0] @ leaves[1].t()
    if logits_NV.dtype is torch.bfloat16:
        logits_NV = logits_NV.float()
    logprob_NV = torch.log_softmax(logits_NV, dim=-1)
    del logits_NV
    logprob_N = logprob_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    entropy_N = -(logprob_NV.detach().exp() * logprob_NV.detach()).sum(-1)
    loss = -(coefficient_N * logprob_N).sum()
    return loss.detach(), logprob_N.detach(), entropy_N, *torch.autograd.grad(loss, leaves)


def _scored_in_one_piece(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    logprob_NV = torch.log_softmax((hidden_ND @ weight_VD.t()).float(), dim=-1)
    return logprob_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1), -(logprob_NV.exp() * logprob_NV).sum(-1)


def _error(width: int) -> float:
    hidden_ND, weight_VD, targets_N, coefficient_N = _inputs(CHECKED_ROWS, width, CHECKED_VOCABULARY)
    wanted = _in_one_piece(hidden_ND.double(), weight_VD.double(), targets_N, coefficient_N.double())
    pairs = zip(_ours(hidden_ND, weight_VD, targets_N, coefficient_N), wanted, strict=True)
    return max(float((ours.double() - reference).norm() / reference.norm()) for ours, reference in pairs)


def _peak_gib(work: Callable[[], object]) -> str:
    """Most memory beyond what is there before and what is returned, in GiB."""
    returned = work()
    returned_bytes = sum(x.nbytes for x in returned if isinstance(x, Tensor)) if isinstance(returned, tuple) else 0
    del returned
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return f"{(torch.cuda.max_memory_allocated() - before - returned_bytes) / 2**30:.2f} GiB"


def _train(width: int, vocabulary: int, extra: dict[str, str]) -> Mapping[str, Callable[[], object]]:
    tensors = _inputs(ROWS, width, vocabulary)
    works = {"cispo": lambda: _ours(*tensors), "one piece": lambda: _in_one_piece(*tensors)}
    for name, work in works.items():
        extra[f"memory of {name}"] = _peak_gib(work)
        torch.cuda.empty_cache()
    return works


def _score(width: int, vocabulary: int) -> Mapping[str, Callable[[], object]]:
    hidden_ND, weight_VD, targets_N, _ = _inputs(ROWS, width, vocabulary)

    def one_piece() -> object:
        with torch.no_grad():
            return _scored_in_one_piece(hidden_ND, weight_VD, targets_N)

    return {"cispo": lambda: head_logprobs(hidden_ND, weight_VD, targets_N, temperature=1.0), "one piece": one_piece}


def _cases(width: int, vocabulary: int) -> list[Case]:
    product_flops = 2 * ROWS * width * vocabulary
    extra: dict[str, str] = {}

    def floor_s(products: int) -> Callable[[Machine], float]:
        return lambda machine: products * product_flops / machine.products_flops_per_s

    size = f"{ROWS} x {width} x {vocabulary}"
    return [
        Case(
            name=f"head loss and gradients {size}",
            floor_s=floor_s(3),
            reach_ms=None,
            prepare=lambda: _train(width, vocabulary, extra),
            error=lambda: _error(width),
            extra=extra,
        ),
        Case(
            name=f"head logprobs {size}",
            floor_s=floor_s(1),
            reach_ms=None,
            prepare=lambda: _score(width, vocabulary),
            error=lambda: _error(width),
        ),
    ]


CASES = [case for size in SIZES for case in _cases(*size)]
