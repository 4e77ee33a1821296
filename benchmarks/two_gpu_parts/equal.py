"""A learner over two ranks does what one does: loss and gradient norm of 20 updates, and a checkpoint read by one."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cispo.broadcast import weights_checksum
from cispo.checkpoint import load_checkpoint, write_checkpoint
from cispo.learner import Learner
from cispo.model.checkpoint import save_policy
from two_gpu_parts.common import SHORT, TINY, Row, Setting, join, on_two_ranks
from two_gpu_parts.learners import free, groups_of, new_learner

UPDATES = 20
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
KINDS = {"2 FSDP2": 1, "3 experts": 2}
"""Items of the table and expert_parallel in each."""


@dataclass(frozen=True)
class Curve:
    """Loss and gradient norm of each update."""

    losses: list[float]
    norms: list[float]


def run(setting: Setting) -> None:
    on_two_ranks(compare, setting)


def compare(rank: int, setting: Setting, scratch: Path) -> None:
    own = (torch.float32, torch.bfloat16)[rank]
    # Each rank alone has one dtype first.
    alone = _train(_learner(setting, own, rank), setting, 0, UPDATES)
    torch.save(alone, scratch / f"alone_{own}")
    free()
    if own is torch.bfloat16:
        # What the split into micro batches alone does, as their gradients are rounded one by one.
        other = _train(_learner(setting, own, rank, halves=True), setting, 0, UPDATES)
        loss = max(abs(a - b) for a, b in zip(alone.losses, other.losses, strict=True))
        setting.say(Row("2 FSDP2", "bfloat16, one GPU with micro batches half as long, loss", f"differs by {loss:.1e}"))
        free()
    for item, expert_parallel in KINDS.items():
        for dtype in LIMITS:
            began = time.perf_counter()
            ranks = join(rank, setting, scratch, f"{item}{dtype}", expert_parallel)
            learner = _learner(setting, dtype, rank, ranks=ranks)
            curve = _train(learner, setting, 0, UPDATES)
            if rank == 0:
                alone = torch.load(scratch / f"alone_{dtype}", weights_only=False)
                _report(item, dtype, alone, curve, setting, time.perf_counter() - began)
            if dtype is torch.float32:
                _hand_over(learner, setting, scratch / f"{expert_parallel}" / f"step_{UPDATES:06d}", rank, item)
            ranks.leave()
            del learner
            free()


def _learner(
    setting: Setting, dtype: torch.dtype, rank: int, *, halves: bool = False, **given: object
) -> Learner:
    tokens = 16_384 if dtype is torch.bfloat16 else 4096
    config, budget = (SHORT, tokens) if setting.is_gpu else (TINY, 128)
    budget //= 1 + halves
    return new_learner(config, dtype, setting.of_rank(rank), tokens_per_micro_batch=budget, **given)  # type: ignore[arg-type]


def _train(learner: Learner, setting: Setting, first: int, last: int) -> Curve:
    """In float32 batches of some 6,700 tokens. In bfloat16 a logprob differs by some hundredths when any weight has
    moved by a rounding, so the loss of those is compared that an RL step has, of some 64,000.
    """
    config = learner.decoder.config
    is_rounded = learner.decoder.head_weight.dtype is torch.bfloat16
    groups, tokens = ((16, 1230) if is_rounded else (8, 256)) if setting.is_gpu else (3, 32)
    batches = (groups_of(step, config, groups=groups, tokens=tokens) for step in range(first, last))
    steps = [learner.train(batch, first + index) for index, batch in enumerate(batches)]
    return Curve([step["loss/policy"] for step in steps], [step["optim/grad_norm"] for step in steps])


def _report(item: str, dtype: torch.dtype, alone: Curve, two: Curve, setting: Setting, seconds: float) -> None:
    loss = max(abs(a - b) for a, b in zip(alone.losses, two.losses, strict=True))
    norm = max(abs(a - b) / a for a, b in zip(alone.norms, two.norms, strict=True))
    limit, name = LIMITS[dtype], str(dtype).removeprefix("torch.")
    sizes = f"of losses up to {max(map(abs, alone.losses)):.3f}"
    what = f"{UPDATES} updates in {name}"
    setting.say(Row(item, f"{what}, loss", f"differs by {loss:.1e} {sizes}", f"{limit:g}", loss <= limit))
    setting.say(Row(item, f"{what}, gradient norm", f"differs by {norm:.1e} of it", f"{limit:g}", norm <= limit))
    print(f"{what}: {seconds:.1f} s; norms {alone.norms[0]:.4g} to {alone.norms[-1]:.4g}", flush=True)


def _hand_over(two: Learner, setting: Setting, path: Path, rank: int, item: str) -> None:
    """A checkpoint of two ranks is read by one, and both go on."""
    state, whole, weights = two.state_dict(), two.whole_policy(), two.policy_tensors()
    checksum = weights_checksum(weights) if rank == 0 else ""
    del weights
    if whole is not None:
        write_checkpoint(path, write_policy=partial(save_policy, whole), learner_state=state, loop_state={})
    del state, whole
    together = _train(two, setting, UPDATES, UPDATES + 1)
    if rank:
        return
    one = _learner(setting, torch.float32, rank)
    one.load_state_dict(load_checkpoint(path).learner_state)
    same = weights_checksum(one.policy_tensors()) == checksum
    alone = _train(one, setting, UPDATES, UPDATES + 1)
    loss, norm = abs(alone.losses[0] - together.losses[0]), abs(alone.norms[0] - together.norms[0]) / alone.norms[0]
    limit = LIMITS[torch.float32]
    setting.say(Row(item, "checkpoint of two read by one", "the same weights" if same else "OTHER weights", "", same))
    setting.say(
        Row(item, "its next update", f"loss differs by {loss:.1e}, gradient norm by {norm:.1e} of it", f"{limit:g}",
            max(loss, norm) <= limit)
    )  # fmt: skip
