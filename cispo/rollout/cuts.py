"""The filters of a step's rows, put together from what its groups ask for.

B rows of a step, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cispo.rollout.filters import Filters
from cispo.rollout.request import Drawing
from cispo.rollout.sequence import GroupState


class Cuts:
    """Keeps the masks of groups that allow or ban tokens, on the device, for as long as they are asked for."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self._masks: dict[int, Tensor] = {}
        self._all_V = torch.ones(vocabulary, dtype=torch.bool, device=device)

    def filters(self, groups: Sequence[GroupState]) -> Filters:
        """Of one row for each of these groups, in order; a group may come more than once."""
        drawings = [group.request.drawing for group in groups]
        has_mask = [one.allowed_ids is not None or bool(one.banned_ids) for one in drawings]
        masked = {
            group.order: group.request.drawing for group, is_masked in zip(groups, has_mask, strict=True) if is_masked
        }
        self._masks = {
            order: self._masks[order] if order in self._masks else self._mask_V(drawing)
            for order, drawing in masked.items()
        }
        allowed_BV = None
        if masked:
            allowed_BV = torch.stack([self._masks.get(group.order, self._all_V) for group in groups])
        return Filters(
            top_k_B=torch.tensor([one.top_k for one in drawings], device=self._device),
            top_p_B=torch.tensor([one.top_p for one in drawings], device=self._device),
            min_p_B=torch.tensor([one.min_p for one in drawings], device=self._device),
            allowed_BV=allowed_BV,
        )

    def _mask_V(self, drawing: Drawing) -> Tensor:
        if drawing.allowed_ids is None:
            mask_V = self._all_V.clone()
        else:
            mask_V = torch.zeros_like(self._all_V)
            mask_V[list(drawing.allowed_ids)] = True
        mask_V[list(drawing.banned_ids)] = False
        return mask_V
