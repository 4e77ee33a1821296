"""Cutting a distribution before sampling: top-k, top-p, min-p, and tokens that are allowed or banned.

Only what is drawn is cut. Logprobs stay those of the whole distribution, and training refuses every cut.

B sequences, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Filters:
    """What is left of each row's distribution.

    top_k_B: int64, 0 keeps all. top_p_B, min_p_B: float32; 1 and 0 keep all. allowed_BV: bool; None allows every token.
    """

    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    allowed_BV: Tensor | None


def cut_logits(logits_BV: Tensor, temperature_B: Tensor, filters: Filters) -> Tensor:
    """The logits with -inf for what is cut: first tokens not allowed, then all but the k likeliest, then the tail.

    The nucleus is the fewest of the likeliest tokens whose probability, among those left, reaches top_p; equal tokens
    go by lower id. min_p counts against the likeliest token. A row's result depends on that row alone, and rows
    without any cut keep all their logits. temperature_B: 0 counts as 1.
    """
    if filters.allowed_BV is not None:
        logits_BV = logits_BV.masked_fill(~filters.allowed_BV, float("-inf"))
    temperature_B1 = temperature_B.masked_fill(temperature_B == 0, 1.0).unsqueeze(1)
    ordered_BV, ids_BV = torch.sort(logits_BV / temperature_B1, dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    top_k_B1 = filters.top_k_B.unsqueeze(1)
    is_kept_BV = (rank_V < top_k_B1) | (top_k_B1 == 0)
    probability_BV = torch.softmax(ordered_BV.masked_fill(~is_kept_BV, float("-inf")), dim=-1)
    before_BV = torch.cumsum(probability_BV, dim=-1, dtype=torch.float64) - probability_BV
    top_p_B1 = filters.top_p_B.unsqueeze(1)
    is_kept_BV &= (before_BV < top_p_B1) | (top_p_B1 >= 1)
    is_kept_BV &= probability_BV >= filters.min_p_B.unsqueeze(1) * probability_BV[:, :1]
    is_cut_BV = torch.empty_like(is_kept_BV).scatter_(1, ids_BV, ~is_kept_BV)
    return logits_BV.masked_fill(is_cut_BV, float("-inf"))
