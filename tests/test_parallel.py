"""A learner of several gloo ranks equals a learner of one process.

Some dozens of small all-to-alls are waited for, so what this takes is mostly the start of the processes.
"""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from cispo.advantage import AdvantageSettings, group_advantages
from cispo.batch import TrainSequence, training_sequences
from cispo.errors import CispoError
from cispo.packing import deal_micro_batches
from cispo.parallel.experts import SharedExperts
from cispo.parallel.ranks import ALONE, Ranks, RankSettings
from cispo.parallel.shards import Shard, deal, even_bounds
from tests.rank_tasks import Outcome, Task, groups_of, hybrid, run_rank, run_task

BALANCE = {"router_aux_loss_coef": 0.01}
KL = {"objective": {"name": "grpo", "kl_coefficient": 0.1, "anchor": "proximal"}, "tied": True}
RECOMPUTED = {"activation_checkpointing": True}
BEFORE = [
    Task("one"),
    Task("one_balanced", settings=BALANCE),
    Task("one_scored", settings=KL),
    Task("one_half", last=3),
]
TWO = [
    Task("two_sharded"),
    Task("two_experts", expert_parallel=2),
    Task("two_balanced", expert_parallel=2, settings=BALANCE | RECOMPUTED),
    Task("two_scored", settings=KL),
    Task("two_after_one", expert_parallel=2, first=3, resumed="one_half"),
    Task("two_half", settings=RECOMPUTED, last=3),
]
FOUR = [Task("four", expert_parallel=2)]
AFTER = [Task("one_after_two", first=3, resumed="two_half"), Task("one_recomputed", settings=BALANCE | RECOMPUTED)]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outcomes of all tasks, each in a file."""
    path = tmp_path_factory.mktemp("ranks")
    _alone(BEFORE, path)
    multiprocessing.set_forkserver_preload(["tests.rank_tasks"])
    for world_size, tasks in ((2, TWO), (4, FOUR)):
        # Ranks are forks of a server that has imported what they need once.
        mp.start_processes(run_rank, args=(world_size, path, tasks), nprocs=world_size, start_method="forkserver")
    _alone(AFTER, path)
    return path


def _alone(tasks: list[Task], folder: Path) -> None:
    for task in tasks:
        torch.save(run_task(task, ALONE, folder), folder / f"{task.name}.pt")


def outcome(folder: Path, name: str) -> Outcome:
    loaded = torch.load(folder / f"{name}.pt", weights_only=False)
    assert isinstance(loaded, Outcome)
    return loaded


def difference(left: Outcome, right: Outcome) -> float:
    assert left.weights.keys() == right.weights.keys()
    return max(float((left.weights[name] - right.weights[name]).abs().max()) for name in left.weights)


@pytest.mark.parametrize(
    ("one", "several"),
    [
        ("one", "two_sharded"),
        ("one", "two_experts"),
        ("one", "two_after_one"),
        ("one", "one_after_two"),
        ("one", "four"),
        ("one_balanced", "two_balanced"),
        ("one_scored", "two_scored"),
        ("one_half", "two_half"),
    ],
)
def test_several_ranks_have_the_weights_of_one(folder: Path, one: str, several: str) -> None:
    assert difference(outcome(folder, one), outcome(folder, several)) <= TOLERANCE


def test_the_weights_have_moved(folder: Path) -> None:
    assert difference(outcome(folder, "one"), outcome(folder, "one_half")) > 100 * TOLERANCE


def test_recomputation_changes_no_bit(folder: Path) -> None:
    kept, recomputed = outcome(folder, "one_balanced"), outcome(folder, "one_recomputed")
    assert [name for name in kept.state if not torch.equal(kept.state[name], recomputed.state[name])] == []
    assert without_speed(kept.metrics[0]) == without_speed(recomputed.metrics[0])


@pytest.mark.parametrize(("one", "several"), [("one_balanced", "two_balanced"), ("one_scored", "two_scored")])
def test_metrics_are_of_all_ranks_and_on_each(folder: Path, one: str, several: str) -> None:
    expected, (first, second) = outcome(folder, one).metrics[0], outcome(folder, several).metrics
    assert without_speed(first) == without_speed(second)
    for alone, together in zip(without_speed(expected), without_speed(first), strict=True):
        # What is left of a mean of rounding errors is not compared digit by digit.
        assert together == pytest.approx(alone, rel=2e-3, abs=2e-5)


def without_speed(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{n: value for n, value in step.items() if not n.startswith(("time_s/", "perf/"))} for step in steps]


@pytest.mark.parametrize(("name", "ranks"), [("two_sharded", 2), ("two_experts", 2), ("four", 4)])
def test_a_rank_holds_its_share_of_the_weights(folder: Path, name: str, ranks: int) -> None:
    whole = sum(weight.numel() for weight in outcome(folder, "one").weights.values())
    # Routers, which all have, and rows that do not come out even.
    assert max(outcome(folder, name).held) < 1.1 * whole / ranks


def sequences() -> list[TrainSequence]:
    groups = groups_of(0)
    return [seq for group in training_sequences(groups, group_advantages(groups, AdvantageSettings())) for seq in group]


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
@pytest.mark.parametrize("shares_prompts", [True, False])
def test_every_token_goes_to_one_rank_and_all_have_equally_many_micro_batches(
    world_size: int, shares_prompts: bool
) -> None:
    all_sequences = sequences()
    weights = [1.0 + index for index in range(len(all_sequences))]
    hands = [
        deal_micro_batches(all_sequences, weights, 90, rank=rank, world_size=world_size, shares_prompts=shares_prompts)
        for rank in range(world_size)
    ]
    assert len({len(hand) for hand in hands}) == 1
    micros = [micro for hand in hands for micro in hand]
    seen = torch.cat([micro.tokens.sequence_N for micro in micros if not micro.is_filler])
    assert sorted(seen.tolist()) == sorted(seq.sequence for seq in all_sequences for _ in range(seq.loss_tokens))
    total = sum(float(micro.tokens.weight_N.double().sum()) for micro in micros)
    expected = sum(weight * seq.loss_tokens for weight, seq in zip(weights, all_sequences, strict=True))
    assert total == pytest.approx(expected)
    assert all(not micro.tokens.weight_N.any() for micro in micros if micro.is_filler)
    assert any(micro.is_filler for micro in micros) == (world_size == 40)


def test_work_is_dealt_evenly() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 60).tolist()
    sums = [sum(lengths[index] for index in hand) for hand in deal(lengths, 4)]
    assert max(sums) - min(sums) < 20


def test_shards_are_cut_where_rows_do_not_come_out_even() -> None:
    shard = Shard(torch.Size((5, 2)), 0, tuple(even_bounds(0, 5, 4)))
    whole = torch.arange(10).view(5, 2)
    assert [len(shard.cut(whole, rank)) for rank in range(4)] == [2, 2, 1, 0]
    assert torch.equal(torch.cat([shard.cut(whole, rank) for rank in range(4)]), whole)


@pytest.mark.parametrize(("rank", "together"), [(2, 1), (-1, 1), (0, 3), (0, 0)])
def test_settings_that_make_no_group_are_refused(rank: int, together: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        RankSettings(rank, 2, "tcp://localhost:1", together)


def test_experts_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(CispoError, match="4 experts cannot be shared among 3 ranks"):
        SharedExperts(hybrid().whole_layers[0].experts, replace(ALONE, world_size=3, expert_parallel=3))


def test_a_rank_alone_joins_nobody() -> None:
    ranks = Ranks.join(RankSettings(0, 1, "tcp://localhost:1"), torch.device("cpu"))
    assert ranks.is_alone and not torch.distributed.is_initialized()
