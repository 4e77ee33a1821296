"""The memory that a run needs at least, device by device, before anything is loaded; loads neither torch nor ray.

Counted is what is certain: weights, gradients and optimiser of the learner, the weights and caches of each engine, and
a reference policy. Activations of a micro batch and the blocks of the LM head come on top.
"""

import os
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from cispo.errors import RecipeError
from cispo.model.sizes import cache_bytes
from cispo.model.weight_files import stored_tensors, weight_files
from cispo.model_report import BYTES, find_config
from cispo.placement import Placement, place
from cispo.recipe.schema import TrainRecipe
from cispo.resources import resolve_policy

MASTER_BYTES = 16
"""Bytes of the learner for one parameter: float32 master weight, gradient and AdamW's two moments."""
_COPY_DIMS = (64, 128)
"""Head dims whose states decode on CUDA reads rounded, in bfloat16 (`cispo.kernels.lightning_attention.keeps_copy`)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes of main memory, and of each GPU that may be used."""

    host_bytes: int
    gpu_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunMemory:
    """What the actors of a run need, in bytes: the learner, a reference policy (0 without one), and each engine's
    weights (0 where it has the learner's) and caches; and where they will be."""

    recipe: TrainRecipe
    parameters: int
    learner: int
    reference: int
    engine_weights: int
    engine_caches: int
    placement: Placement
    machine: Machine

    def refuse_what_cannot_fit(self) -> None:
        """Raise a RecipeError when what is certain is more than a device of this machine has."""
        ranks, places = self.placement.learner_ranks, self.placement.rollout_places
        learner = {"the learner": self.learner, "the reference policy": self.reference}
        engine = {"engine weights": self.engine_weights, "caches": self.engine_caches}
        workers, gpus = self.recipe.rollout.workers, self.machine.gpu_bytes
        if not places:
            self._refuse(learner | _times(engine, workers), self.machine.host_bytes, "this machine's memory")
            return
        sharing = _times(engine, max(Counter(places).values()))
        of_rank = {f"{name}'s share" if ranks > 1 else name: -(-size // ranks) for name, size in learner.items()}
        if self.placement.has_gpus_apart:
            self._refuse(of_rank, min(gpus), "the learner's GPU")
            self._refuse(sharing, min(gpus), "a GPU of rollout workers")
        else:
            self._refuse(of_rank | sharing, min(gpus), "the GPU" if len(gpus) < 2 else "a GPU")

    def _refuse(self, parts: Mapping[str, int], capacity: int, where: str) -> None:
        needed = sum(parts.values())
        if needed <= capacity:
            return
        listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
        rollout = self.recipe.rollout
        raise RecipeError(
            f"the run needs {size_text(needed)} of {where}, which has {size_text(capacity)} ({listed}; activations "
            f"come on top): lower rollout.max_concurrent_completions ({rollout.max_concurrent_completions}), "
            f"rollout.max_completion_tokens ({rollout.max_completion_tokens}) or rollout.workers ({rollout.workers}), "
            "or train a smaller policy"
        )


def run_memory(recipe: TrainRecipe, machine: Machine) -> RunMemory:
    """Of a recipe on a machine. Reads the policy's configuration and the headers of its weight files."""
    folder = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    parameters, config = count_parameters(folder), find_config(str(folder))
    placement = place(recipe, cores=1, gpus=len(machine.gpu_bytes))
    rollout, element_bytes = recipe.rollout, BYTES[recipe.policy.dtype]
    # Routers stay float32 whatever the policy computes in.
    routers = len(config.routed_layers) * config.experts * config.hidden_size
    weights = parameters * element_bytes + routers * (4 - element_bytes)
    is_rounded = bool(placement.rollout_places) and recipe.policy.dtype == "bfloat16" and config.head_dim in _COPY_DIMS
    return RunMemory(
        recipe=recipe,
        parameters=parameters,
        learner=learner_bytes(parameters, recipe.policy.dtype),
        reference=weights if recipe.objective.needs_reference else 0,
        engine_weights=0 if placement.colocated else weights,
        engine_caches=cache_bytes(
            config,
            capacity=rollout.max_concurrent_completions,
            max_tokens=rollout.max_prompt_tokens + rollout.max_completion_tokens,
            element_bytes=element_bytes,
            has_copy=is_rounded,
        ),
        placement=placement,
        machine=machine,
    )


def refuse_what_cannot_fit(recipe: TrainRecipe) -> None:
    """Raise a RecipeError when the run needs more than this machine has; of another cluster's nothing can be told."""
    if recipe.ray.address is None:
        run_memory(recipe, this_machine()).refuse_what_cannot_fit()


def learner_bytes(parameters: int, dtype: str) -> int:
    """Float32 masters, gradients and moments, and the weights in the dtype that is computed in, where it is another."""
    return parameters * (MASTER_BYTES + (BYTES[dtype] if dtype != "float32" else 0))


def count_parameters(folder: Path) -> int:
    """Parameters of a policy folder, from the headers of its safetensors files; no weights are read."""
    return sum(prod(tensor.shape) for file in weight_files(folder) for tensor in stored_tensors(file))


def _times(parts: dict[str, int], count: int) -> dict[str, int]:
    return {f"{count} x {name}" if count > 1 else name: size * count for name, size in parts.items()}


def this_machine() -> Machine:
    """As it is visible from this process: the memory of its control group, the GPUs of CUDA_VISIBLE_DEVICES."""
    return Machine(_host_bytes(), _gpu_bytes())


def _host_bytes() -> int:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    texts = [file.read_text(encoding="ascii").strip() for file in limits if file.is_file()]
    return min([total, *(int(text) for text in texts if text.isdecimal())])


def _gpu_bytes() -> tuple[int, ...]:
    """Of each visible GPU by NVIDIA's tool, which loads no framework; none where the tool is not there."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return ()
    if answer.returncode:
        return ()
    sizes = [int(line) * 2**20 for line in answer.stdout.split() if line.isdecimal()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(sizes)
    named = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return tuple(sizes[: len(named)])


def size_text(count: int) -> str:
    """Bytes for people: `12.3 GiB` or `45.6 MiB`."""
    mib = count / 2**20
    return f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:,.1f} MiB"
