"""The processes that one learner is spread over, and what they say to each other.

A rank is a process with a number. It joins the others by an address that all of them were given, whoever started it: a
Ray actor, `torch.multiprocessing`, a shell. A learner of one process has `ALONE`, and talks to nobody.

What is called collective below must be called by every rank, in the same order.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, slots=True)
class RankSettings:
    """What a process must be told to become one rank of a learner.

    rank: its number, from 0 to world_size - 1. init_method: where the ranks meet, as `torch.distributed` takes it:
    `tcp://host:port` of rank 0's machine, or `file:///path` of a file that does not exist yet, on a disk that all see;
    None for ranks that join with a store. expert_parallel: ranks that share the experts of a layer among them; it must
    divide world_size. timeout_s: how long a rank waits for the others before it fails. ValueError for settings that
    make no group.
    """

    rank: int
    world_size: int
    init_method: str | None = None
    expert_parallel: int = 1
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to {self.world_size - 1}, got {self.rank}")
        if self.expert_parallel < 1 or self.world_size % self.expert_parallel:
            raise ValueError(
                f"expert_parallel must divide the number of ranks, got {self.expert_parallel} of {self.world_size}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """A process's place among the ranks.

    shard_mesh: all ranks, over which weights are sharded; None for a rank that is alone. expert_mesh: [replicas,
    expert_parallel]; the ranks of a row hold the experts of a layer among them, those of a column hold the same ones.
    """

    rank: int = 0
    world_size: int = 1
    expert_parallel: int = 1
    device: torch.device | None = None
    shard_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None

    @classmethod
    def join(cls, settings: RankSettings, device: torch.device, store: Store | None = None) -> Self:
        """Meet the other ranks; collective. device: this rank's own GPU (NCCL), or the CPU (gloo).

        store: one that all ranks share, in place of an init_method.
        """
        if settings.world_size == 1:
            return cls(device=device)
        if device.type == "cuda":
            # A device that is in use is this rank's own; the mesh would guess one from the rank otherwise.
            torch.cuda.init()
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=settings.init_method,
            store=store,
            rank=settings.rank,
            world_size=settings.world_size,
            timeout=timedelta(seconds=settings.timeout_s),
        )
        size, together = settings.world_size, settings.expert_parallel
        return cls(
            rank=settings.rank,
            world_size=size,
            expert_parallel=together,
            device=device,
            shard_mesh=init_device_mesh(device.type, (size,), mesh_dim_names=("shard",)),
            expert_mesh=init_device_mesh(
                device.type, (size // together, together), mesh_dim_names=("replica", "expert")
            ),
        )

    def leave(self) -> None:
        """Part from the others at the end of the process's work; collective."""
        if not self.is_alone:
            # Gloo aborts a process whose group goes while another still speaks to it.
            dist.barrier()
            dist.destroy_process_group()

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """The ranks that this one shares the experts of a layer with."""
        assert self.expert_mesh is not None
        return self.expert_mesh.get_group("expert")

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place, with equal bits on all; collective."""
        if not self.is_alone:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, thing: Any) -> list[Any]:
        """What each rank gave, by rank; collective, and for small things that can be pickled."""
        if self.is_alone:
            return [thing]
        things: list[Any] = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things


ALONE = Ranks()
"""The place of a learner's only process."""
