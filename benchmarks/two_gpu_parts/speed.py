"""Tokens a second and peak memory of a learner on one GPU, sharded over two, and with the experts shared by two."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from cispo.parallel.ranks import ALONE, Ranks
from two_gpu_parts.common import LARGE, TINY, Row, Setting, join, on_two_ranks
from two_gpu_parts.learners import free, groups_of, new_learner

STEPS, WARM = 7, 3
FASTER_ASKED, MEMORY_ASKED = 1.7, 0.6
KINDS = {"2 FSDP2": ("sharded", 1), "3 experts": ("experts shared", 2)}
"""Items of the table: what two GPUs do, and expert_parallel."""


@dataclass(frozen=True)
class Case:
    """Steps of `groups` groups of completions of up to `tokens` tokens: four micro batches on one GPU, two on each of
    two. asks_speed, asks_memory: of which case the limits are.
    """

    name: str
    budget: int
    groups: int
    tokens: int
    recomputes: bool = False
    asks_speed: bool = False
    asks_memory: bool = False


ON_GPU = (
    Case("micro batches of 28,672 tokens", 28_672, 28, 1230, asks_speed=True),
    Case("8,192, activations recomputed", 8_192, 8, 1230, recomputes=True, asks_memory=True),
)
ON_CPU = (Case("micro batches of 256 tokens", 256, 4, 48), Case("256, recomputed", 256, 4, 48, recomputes=True))


@dataclass(frozen=True)
class Measured:
    """Median tokens a second of all ranks, and the peak of this rank's memory."""

    tokens_per_s: float
    peak_bytes: int


def run(setting: Setting) -> None:
    on_two_ranks(measure, setting)


def measure(rank: int, setting: Setting, scratch: Path) -> None:
    for case in ON_GPU if setting.is_gpu else ON_CPU:
        alone = None
        if rank == 0:
            alone = _measure(setting, ALONE, rank, case)
            _say(setting, "2 FSDP2", f"one GPU, {case.name}", alone)
        for item, (does, expert_parallel) in KINDS.items():
            ranks = join(rank, setting, scratch, f"{item}{case.name}", expert_parallel)
            two = _measure(setting, ranks, rank, case)
            if alone is not None:
                _say(setting, item, f"two GPUs, {does}, {case.name}", two)
                _compare(setting, item, two, alone, case)
            ranks.leave()


def _measure(setting: Setting, ranks: Ranks, rank: int, case: Case) -> Measured:
    config = LARGE if setting.is_gpu else TINY
    dtype = torch.bfloat16 if setting.is_gpu else torch.float32
    learner = new_learner(
        config,
        dtype,
        setting.of_rank(rank),
        tokens_per_micro_batch=case.budget,
        ranks=ranks,
        activation_checkpointing=case.recomputes,
    )
    free()
    speeds = []
    for step in range(STEPS):
        metrics = learner.train(groups_of(step, config, groups=case.groups, tokens=case.tokens), step)
        speeds.append(metrics["perf/learner_tokens_per_s"])
    peak = torch.cuda.max_memory_allocated() if setting.is_gpu else 0
    del learner
    free()
    return Measured(statistics.median(speeds[WARM:]), peak)


def _say(setting: Setting, item: str, what: str, found: Measured) -> None:
    memory = f", peak {found.peak_bytes / 2**30:.1f} GiB a GPU" if found.peak_bytes else ""
    setting.say(Row(item, what, f"{found.tokens_per_s:,.0f} tokens/s{memory}"))


def _compare(setting: Setting, item: str, two: Measured, one: Measured, case: Case) -> None:
    ratio, is_sharded = two.tokens_per_s / one.tokens_per_s, item == "2 FSDP2"
    asks_speed = case.asks_speed and is_sharded
    asked = f"at least {FASTER_ASKED:g}" if asks_speed else ""
    holds = ratio >= FASTER_ASKED if asks_speed else None
    setting.say(Row(item, f"tokens/s against one GPU, {case.name}", f"{ratio:.2f} times", asked, holds))
    if two.peak_bytes:
        share, asks_memory = two.peak_bytes / one.peak_bytes, case.asks_memory and not is_sharded
        asked = f"at most {MEMORY_ASKED:g}" if asks_memory else ""
        holds = share <= MEMORY_ASKED if asks_memory else None
        setting.say(Row(item, f"peak memory a GPU against one GPU's, {case.name}", f"{share:.2f}", asked, holds))
