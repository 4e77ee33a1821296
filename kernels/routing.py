"""Which experts a token goes to, and with what weights: the rule that every form of the expert layer follows.

N packed tokens, E experts, K experts a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cispo.kernels.product import product

Observer = Callable[[Tensor, Tensor], None]
"""(expert_ids_NK, entropy_N): the experts that each token went to, -1 where one was dropped, in any integer dtype; and
the entropy of the router's softmax over all experts, float32, in nats. Both without gradient."""


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """Which experts a token goes to: expert_ids_NK (int64) and weight_NK (float32; renormalised, a row sums to 1).

    is_kept_NK: False where a threshold dropped the expert, whose weight is 0; None where there was no threshold.
    """

    expert_ids_NK: Tensor
    weight_NK: Tensor
    is_kept_NK: Tensor | None = None

    @property
    def kept_ids_NK(self) -> Tensor:
        """The ids, with -1 in place of what was dropped."""
        return self.expert_ids_NK if self.is_kept_NK is None else self.expert_ids_NK.where(self.is_kept_NK, -1)


def router_logits(x_ND: Tensor, router_ED: Tensor) -> Tensor:
    """x router^T in float32; [N, E]."""
    return product(x_ND.float(), router_ED.float())


def choose(logits_NE: Tensor, experts_per_token: int) -> Tensor:
    """Ids of the k largest logits in falling order, equal ones by lower index; int64 [N, K]."""
    return torch.sort(logits_NE.detach(), dim=-1, descending=True, stable=True).indices[:, :experts_per_token]


def route(
    logits_NE: Tensor,
    experts_per_token: int,
    *,
    is_renormalised: bool = True,
    threshold_N: Tensor | None = None,
    given_ids_NK: Tensor | None = None,
) -> Routing:
    """Softmax over experts in float32 and the k largest, renormalised to a sum of 1 or not.

    given_ids_NK: take these experts instead, whatever their logits; the weights are the router's all the same.
    threshold_N: float32 in [0, 1). An expert whose share of the chosen ones' weight is below it is dropped, except for
    the heaviest; the others are scaled up to the sum that they all had.
    """
    probability_NE = torch.softmax(logits_NE.float(), dim=-1)
    expert_ids_NK = choose(logits_NE, experts_per_token) if given_ids_NK is None else given_ids_NK.long()
    chosen_NK = probability_NE.gather(1, expert_ids_NK)
    whole_N1 = chosen_NK.sum(-1, keepdim=True)
    if threshold_N is None:
        return Routing(expert_ids_NK, chosen_NK / whole_N1 if is_renormalised else chosen_NK)
    is_kept_NK = chosen_NK.detach() / whole_N1.detach() >= threshold_N.unsqueeze(1)
    is_kept_NK = is_kept_NK.scatter(1, chosen_NK.detach().argmax(-1, keepdim=True), True)
    kept_NK = chosen_NK * is_kept_NK
    kept_N1 = kept_NK.sum(-1, keepdim=True)
    weight_NK = kept_NK / kept_N1 if is_renormalised else kept_NK * (whole_N1 / kept_N1)
    return Routing(expert_ids_NK, weight_NK, is_kept_NK)


@torch.no_grad()
def router_entropy(logits_NE: Tensor) -> Tensor:
    """Entropy of the softmax over all experts, in nats; float32 [N]."""
    logprob_NE = torch.log_softmax(logits_NE.float(), dim=-1)
    return -(logprob_NE.exp() * logprob_NE).sum(-1)
