"""Tokens a second and peak memory of a learner on one GPU, sharded over two, and with the experts shared by two."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from cispo.parallel.ranks import ALONE, Ranks
from two_gpu_parts.common import LARGE, TINY, Row, Setting, join, on_two_ranks
from two_gpu_parts.learners import free, groups_of, new_learner

STEPS, WARM = 7, 2
FASTER_ASKED, MEMORY_ASKED = 1.7, 0.6
LONG, SHORT = "16,384 tokens a micro batch", "8,192"


@dataclass(frozen=True)
class Measured:
    """Median tokens a second of all ranks, and the peak of this rank's memory."""

    tokens_per_s: float
    peak_bytes: int


def run(setting: Setting) -> None:
    on_two_ranks(measure, setting)


def measure(rank: int, setting: Setting, scratch: Path) -> None:
    budgets = (16_384, 8_192) if setting.is_gpu else (256, 128)
    alone: dict[int, Measured] = {}
    if rank == 0:
        for budget in budgets:
            alone[budget] = _measure(setting, ALONE, rank, budget)
            _say(setting, "2 FSDP2", f"one GPU, {budget:,} tokens a micro batch", alone[budget])
    for item, budget, expert_parallel in (
        ("2 FSDP2", budgets[0], 1),
        ("3 experts", budgets[0], 2),
        ("2 FSDP2", budgets[1], 1),
        ("3 experts", budgets[1], 2),
    ):
        ranks = join(rank, setting, scratch, f"{item}{budget}", expert_parallel)
        two = _measure(setting, ranks, rank, budget)
        if rank == 0:
            name = "sharded" if expert_parallel == 1 else "experts shared"
            _say(setting, item, f"two GPUs, {name}, {budget:,} tokens a micro batch", two)
            is_asked = expert_parallel == 1 and budget == budgets[0]
            _compare(setting, item, two, alone[budget], budget, asks_speed=is_asked)
        ranks.leave()


def _measure(setting: Setting, ranks: Ranks, rank: int, budget: int) -> Measured:
    config = LARGE if setting.is_gpu else TINY
    dtype = torch.bfloat16 if setting.is_gpu else torch.float32
    learner = new_learner(config, dtype, setting.of_rank(rank), tokens_per_micro_batch=budget, ranks=ranks)
    free()
    # Twice 16,384 tokens in a step, whoever works on them.
    groups, tokens = (8, 1280) if setting.is_gpu else (4, 48)
    speeds = []
    for step in range(STEPS):
        metrics = learner.train(groups_of(step, config, groups=groups, tokens=tokens), step)
        speeds.append(metrics["perf/learner_tokens_per_s"])
    peak = torch.cuda.max_memory_allocated() if setting.is_gpu else 0
    del learner
    free()
    return Measured(statistics.median(speeds[WARM:]), peak)


def _say(setting: Setting, item: str, what: str, found: Measured) -> None:
    memory = f", peak {found.peak_bytes / 2**30:.1f} GiB a GPU" if found.peak_bytes else ""
    setting.say(Row(item, what, f"{found.tokens_per_s:,.0f} tokens/s{memory}"))


def _compare(setting: Setting, item: str, two: Measured, one: Measured, budget: int, *, asks_speed: bool) -> None:
    ratio = two.tokens_per_s / one.tokens_per_s
    asked = f"at least {FASTER_ASKED:g}" if asks_speed and setting.is_gpu else ""
    holds = ratio >= FASTER_ASKED if asked else None
    setting.say(Row(item, f"tokens/s against one GPU, {budget:,}", f"{ratio:.2f} times", asked, holds))
    if two.peak_bytes:
        share = two.peak_bytes / one.peak_bytes
        asked = f"at most {MEMORY_ASKED:g}" if item.startswith("3") else ""
        holds = share <= MEMORY_ASKED if asked else None
        setting.say(Row(item, f"peak memory a GPU against one GPU's, {budget:,}", f"{share:.2f}", asked, holds))
