"""The GPUs of a run as Ray reserves them: a placement group with a bundle for each, so who shares one is decided."""

from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cispo.errors import DeadlineError


class GpuPlaces:
    """So many GPUs of the cluster, together on as few machines as they fit; reserved until `free`.

    DeadlineError where they are not free within timeout_s. One needs no group, and none are none.
    """

    def __init__(self, count: int, *, timeout_s: float) -> None:
        self._group: Any = None
        if count < 2:
            return
        self._group = placement_group([{"GPU": 1.0}] * count, strategy="PACK")
        if not self._group.wait(timeout_s):
            remove_placement_group(self._group)
            have = ray.available_resources().get("GPU", 0.0)
            raise DeadlineError(
                f"waited {timeout_s:g} s for {count} GPUs of the cluster, of which {have:g} are free; end what uses "
                "them, or lower resources.learner_ranks or rollout.workers"
            )

    def share(self, gpus: float, place: int) -> dict[str, Any]:
        """Options of an actor that takes such a part of the GPU of that number."""
        if self._group is None or not gpus:
            return {"num_gpus": gpus}
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place)
        return {"num_gpus": gpus, "scheduling_strategy": strategy}

    def free(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
