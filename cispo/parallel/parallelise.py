"""A decoder over several ranks, from outside of it, in a fixed order: experts, recomputation, sharded weights.

Weights are sharded by FSDP2, one sublayer at a time: token mixers and channel mixers are gathered for their forward and
again for their backward; embedding, head and norms, which more than one sublayer reads, from the start of the forward
to the end of the backward. So the LM head is whole outside of `forward` too. Routers are small, and float32 whatever
the rest is: every rank has them whole.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Placement

from cispo.model.decoder import Decoder, Experts
from cispo.parallel.experts import SharedExperts
from cispo.parallel.ranks import Ranks
from cispo.parallel.recompute import checkpoint_activations
from cispo.parallel.shards import Shard, even_bounds


def parallelise(decoder: Decoder, ranks: Ranks, *, activation_checkpointing: bool) -> dict[str, Shard]:
    """Spread a decoder, the same on every rank, over the ranks; what this rank holds of each parameter, by name.

    The decoder may be on the CPU: what is sharded goes to the rank's device shard by shard. A rank that is alone has no
    shards, and its decoder stays as it is but for recomputation. Its gradients are sums over ranks, not means.
    """
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    split = {f"layers.{index}.experts" for index in decoder.config.routed_layers if ranks.expert_parallel > 1}
    for name in sorted(split):
        whole = decoder.get_submodule(name)
        assert isinstance(whole, Experts)
        decoder.set_submodule(name, SharedExperts(whole, ranks))
    if activation_checkpointing:
        checkpoint_activations(decoder)
    if ranks.is_alone:
        return {}
    _shard(decoder, ranks, split)
    return {name: _held(name, shape, ranks, split) for name, shape in shapes.items()}


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient; the same memory."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def release(decoder: Decoder) -> None:
    """Let go of the embedding and head that a forward without a backward has gathered."""
    if isinstance(decoder, FSDPModule):
        decoder.reshard()


def _shard(decoder: Decoder, ranks: Ranks, split: set[str]) -> None:
    assert ranks.shard_mesh is not None and ranks.expert_mesh is not None
    replicas = ranks.expert_mesh["replica"]
    unsharded: set[nn.Parameter] = set()
    sublayers: list[FSDPModule] = []
    for index, layer in enumerate(decoder.whole_layers):
        experts = layer.experts
        if experts.router is not None:
            unsharded.add(experts.router)
        sublayers.append(_fully_shard(layer.mixer, ranks.shard_mesh, set()))
        if f"layers.{index}.experts" not in split:
            sublayers.append(_fully_shard(experts, ranks.shard_mesh, unsharded))
        elif replicas.size() > 1:
            sublayers.append(_fully_shard(experts, replicas, unsharded, by_experts=True))
        else:
            unsharded |= {experts.gate_up, experts.down}
    _fully_shard(decoder, ranks.shard_mesh, unsharded)
    for sublayer, following in pairwise(sublayers):
        # A sublayer is gathered before the one ahead of it is launched, not after: whoever launches slowly still has
        # both at once.
        sublayer.set_modules_to_forward_prefetch([following])
    for parameter in unsharded:
        parameter.data = parameter.data.to(ranks.device)
    _count_changes(decoder)


def _fully_shard(
    module: Any, mesh: DeviceMesh, unsharded: set[nn.Parameter], *, by_experts: bool = False
) -> FSDPModule:
    def placement(parameter: nn.Parameter) -> Placement:
        return Placement(0 if by_experts else _shard_dim(parameter.shape, mesh.size()))

    sharded: FSDPModule = fully_shard(
        module,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        shard_placement_fn=placement,
        ignored_params=unsharded,
    )
    # The loss is a sum over tokens whose weights know the whole mini batch, so gradients of ranks are added.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    return sharded


def _shard_dim(shape: torch.Size, parts: int) -> int:
    """The first dim, but for experts that are too few for it, as in a dense layer: those are sharded inside."""
    is_uneven = len(shape) > 2 and shape[0] % parts > 0
    return 1 if is_uneven and shape[1] % parts == 0 else 0


def _held(name: str, shape: torch.Size, ranks: Ranks, split: set[str]) -> Shard:
    """What each rank holds of a parameter, as `_shard` has left it."""
    module, _, field = name.rpartition(".")
    if field == "router":
        return Shard(shape)
    if module not in split:
        dim = _shard_dim(shape, ranks.world_size)
        return Shard(shape, dim, tuple(even_bounds(0, shape[dim], ranks.world_size)))
    together, size = ranks.expert_parallel, shape[0] // ranks.expert_parallel
    of_place = [even_bounds(size * i, size * (i + 1), ranks.world_size // together) for i in range(together)]
    return Shard(shape, 0, tuple(of_place[rank % together][rank // together] for rank in range(ranks.world_size)))


def _count_changes(decoder: Decoder) -> None:
    """Let PyTorch count that gathered weights are other ones after an update: packed copies are kept by that count, and
    gathering leaves it alone. Only the CPU kernels pack weights, and only for products.
    """
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.register_forward_pre_hook(_count_change)


def _count_change(module: nn.Module, inputs: Any) -> None:
    gathered = [p for p in module.parameters() if p.is_cpu and not isinstance(p, DTensor)]
    if gathered:
        torch.autograd.graph.increment_version(gathered)
