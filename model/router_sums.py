"""What the routers of a decoder did over the rows of one or more calls, added up.

N packed tokens, L layers that have a router, E experts, K experts a token.
"""

import torch
from torch import Tensor

from cispo.kernels.routing import choose, router_entropy, router_logits
from cispo.model.config import ModelConfig


class RouterSums:
    """Sums of choices, gate probabilities and entropies.

    for_loss: count every row of every layer, the last one's too, which otherwise routes only the rows that are asked
    for; and keep the graph behind probability_E where gradients are enabled. ValueError for a policy without routers.

    choices_LE: int64, the rows that a layer sent to an expert. probability_E: float32, the softmax over experts summed
    over rows and layers. entropy: float64, its entropy in nats, summed likewise. differing, replayed: int64, replayed
    choices that are not among the router's own k, and all that were replayed.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu", *, for_loss: bool) -> None:
        if not config.routed_layers:
            raise ValueError("the policy has no router, so there is nothing to sum up; set router_aux_loss_coef to 0")
        self.for_loss = for_loss
        self.experts_per_token = config.experts_per_token
        self.choices_LE = torch.zeros(len(config.routed_layers), config.experts, dtype=torch.int64, device=device)
        self.probability_E = torch.zeros(config.experts, device=device)
        self.entropy = torch.zeros((), dtype=torch.float64, device=device)
        self.differing = torch.zeros((), dtype=torch.int64, device=device)
        self.replayed = 0

    def add(self, layer: int, x_ND: Tensor, router_ED: Tensor, expert_ids_NK: Tensor, *, is_replayed: bool) -> None:
        """Add what one layer decided on the rows that it read; their logits are computed here once more."""
        with torch.set_grad_enabled(self.for_loss and torch.is_grad_enabled()):
            logits_NE = router_logits(x_ND, router_ED)
            self.probability_E = self.probability_E + torch.softmax(logits_NE, dim=-1).sum(0)
        experts, ids_NK = self.choices_LE.shape[1], expert_ids_NK.long()
        self.choices_LE[layer] += torch.bincount(ids_NK.flatten(), minlength=experts)
        self.entropy += router_entropy(logits_NE).sum(dtype=torch.float64)
        if is_replayed:
            own_NK = choose(logits_NE, self.experts_per_token)
            self.differing += (ids_NK.unsqueeze(2) != own_NK.unsqueeze(1)).all(-1).sum()
            self.replayed += ids_NK.numel()


def load_balancing_loss(load_E: Tensor, probability_E: Tensor, rows: int) -> Tensor:
    """E sum_e load_e P_e with P the mean gate probability, as transformers' `load_balancing_loss_func`; scalar float32.

    load_E: choices of each expert a routed row, over all layers together; no gradient flows to it. probability_E: gate
    probabilities summed over rows and layers. rows: all routed rows, over all layers. Even loads give K. It is linear
    in probability_E, so the losses of parts of the rows add up when load_E and rows are those of the whole.
    """
    return load_E.shape[0] * torch.dot(load_E, probability_E) / rows
