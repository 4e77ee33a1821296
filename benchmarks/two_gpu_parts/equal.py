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
from cispo.parallel.ranks import ALONE, Ranks
from two_gpu_parts.common import SHORT, TINY, Row, Setting, join, on_two_ranks
from two_gpu_parts.learners import free, groups_of, new_learner

UPDATES = 20
KINDS = {"2 FSDP2": 1, "3 experts": 2}
"""Items of the table and expert_parallel in each."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    tokens: of a micro batch. limit: what the loss and the norm may differ by; None where that is only told. replays:
    every token goes to the experts that its rollout names. Where routers choose, a choice that hangs on the last bit of
    a sum sends a token elsewhere now and then, and the loss jumps.
    """

    name: str
    dtype: torch.dtype
    tokens: int
    groups: int
    longest: int
    limit: float | None
    replays: bool = False


FLOAT32 = Case("float32, experts replayed", torch.float32, 4096, 4, 256, 1e-5, replays=True)
ROUTED = Case("float32, routers choosing", torch.float32, 4096, 4, 256, 1e-5)
BFLOAT16 = Case("bfloat16", torch.bfloat16, 16_384, 16, 1230, 1e-3)
"""A logprob differs by some hundredths when any weight has moved by a rounding, so the loss of these is compared on a
batch that an RL step has, of some 64,000 tokens."""
OF_RANK = ((FLOAT32, ROUTED), (BFLOAT16,))
"""What each rank does alone before both do it together."""


@dataclass(frozen=True)
class Curve:
    """Loss and gradient norm of each update."""

    losses: list[float]
    norms: list[float]


def run(setting: Setting) -> None:
    on_two_ranks(compare, setting)


def compare(rank: int, setting: Setting, scratch: Path) -> None:
    for case in OF_RANK[rank]:
        alone = _train(_learner(setting, case, rank), setting, case, 0, UPDATES)
        torch.save(alone, scratch / f"alone {case.name}")
        free()
        if case is BFLOAT16:
            # What the split into micro batches alone does, as their gradients are rounded one by one.
            halves = _train(_learner(setting, case, rank, parts=2), setting, case, 0, UPDATES)
            loss = max(abs(a - b) for a, b in zip(alone.losses, halves.losses, strict=True))
            what = "bfloat16, one GPU with micro batches half as long, loss"
            setting.say(Row("2 FSDP2", what, f"differs by {loss:.1e}"))
            free()
    for item, expert_parallel in KINDS.items():
        for case in (case for cases in OF_RANK for case in cases):
            began = time.perf_counter()
            ranks = join(rank, setting, scratch, f"{item}{case.name}", expert_parallel)
            learner = _learner(setting, case, rank, ranks=ranks)
            curve = _train(learner, setting, case, 0, UPDATES)
            if rank == 0:
                alone = torch.load(scratch / f"alone {case.name}", weights_only=False)
                _report(item, case, alone, curve, setting, time.perf_counter() - began)
            if case is FLOAT32:
                _hand_over(learner, setting, scratch / f"{expert_parallel}" / f"step_{UPDATES:06d}", rank, item)
            ranks.leave()
            del learner
            free()


def _learner(setting: Setting, case: Case, rank: int, *, parts: int = 1, ranks: Ranks = ALONE) -> Learner:
    """parts: how many micro batches to make of one."""
    config, budget = (SHORT, case.tokens) if setting.is_gpu else (TINY, 128)
    return new_learner(
        config,
        case.dtype,
        setting.of_rank(rank),
        tokens_per_micro_batch=budget // parts,
        ranks=ranks,
        routing_replay=case.replays,
    )


def _train(learner: Learner, setting: Setting, case: Case, first: int, last: int) -> Curve:
    config = learner.decoder.config
    groups, tokens = (case.groups, case.longest) if setting.is_gpu else (3, 32)
    steps = []
    for step in range(first, last):
        batch = groups_of(step, config, groups=groups, tokens=tokens, records_experts=case.replays)
        steps.append(learner.train(batch, step))
    return Curve([step["loss/policy"] for step in steps], [step["optim/grad_norm"] for step in steps])


def _report(item: str, case: Case, alone: Curve, two: Curve, setting: Setting, seconds: float) -> None:
    losses = [abs(a - b) for a, b in zip(alone.losses, two.losses, strict=True)]
    norms = [abs(a - b) / a for a, b in zip(alone.norms, two.norms, strict=True)]
    what = f"{UPDATES} updates in {case.name}"
    for name, found, of in (
        ("loss", losses, f"of losses up to {max(map(abs, alone.losses)):.3f}"),
        ("gradient norm", norms, "of it"),
    ):
        limit, holds = ("", None) if case.limit is None else (f"{case.limit:g}", max(found) <= case.limit)
        setting.say(Row(item, f"{what}, {name}", f"differs by {max(found):.1e} {of}", limit, holds))
    told = " ".join(f"{loss:.0e}" for loss in losses)
    print(f"{what}: {seconds:.1f} s; norms {alone.norms[0]:.4g} to {alone.norms[-1]:.4g}; losses {told}", flush=True)


def _hand_over(two: Learner, setting: Setting, path: Path, rank: int, item: str) -> None:
    """A checkpoint of two ranks is read by one, and both go on."""
    state, whole, weights = two.state_dict(), two.whole_policy(), two.policy_tensors()
    checksum = weights_checksum(weights) if rank == 0 else ""
    del weights
    if whole is not None:
        write_checkpoint(path, write_policy=partial(save_policy, whole), learner_state=state, loop_state={})
    del state, whole
    together = _train(two, setting, FLOAT32, UPDATES, UPDATES + 1)
    if rank:
        return
    one = _learner(setting, FLOAT32, rank)
    one.load_state_dict(load_checkpoint(path).learner_state)
    same = weights_checksum(one.policy_tensors()) == checksum
    alone = _train(one, setting, FLOAT32, UPDATES, UPDATES + 1)
    loss, norm = abs(alone.losses[0] - together.losses[0]), abs(alone.norms[0] - together.norms[0]) / alone.norms[0]
    setting.say(Row(item, "checkpoint of two read by one", "the same weights" if same else "OTHER weights", "", same))
    setting.say(
        Row(item, "its next update", f"loss differs by {loss:.1e}, gradient norm by {norm:.1e} of it", "1e-05",
            max(loss, norm) <= 1e-5)
    )  # fmt: skip
