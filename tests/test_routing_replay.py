"""Routing replay from engine to learner: what was sampled is trained on through the same experts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from cispo.advantage import AdvantageSettings
from cispo.learner import Learner
from cispo.learner_settings import LearnerSettings
from cispo.metric_table import check_names
from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder
from cispo.model.routing import ExpertRecord, RoutingControl
from cispo.model.tokenizer import Tokenizer
from cispo.objective_settings import ObjectiveSettings
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest
from cispo.types import Group, Prompt, Rollout, Score, ScoredGroup

PROMPTS = [Prompt(id=f"p{i}", text="x" * length) for i, length in enumerate((1, 7, 40, 63, 90))]


def sample(folder: Path, *, records_experts: bool, eos_id: int | None = None) -> list[Group]:
    tokenizer = Tokenizer.load(folder)
    engine = Engine(
        load_policy(folder, dtype=torch.float32, device="cpu"),
        tokenizer if eos_id is None else replace(tokenizer, eos_id=eos_id),
        SamplingSettings(max_completion_tokens=40, seed=3),
        max_concurrent_completions=9,
        max_prompt_tokens=128,
        records_experts=records_experts,
    )
    for prompt in PROMPTS:
        engine.submit(GroupRequest(prompt, 4, Drawing(1.0), stream="0"))
    groups: dict[str, Group] = {}
    while not engine.is_idle:
        engine.step()
        groups.update({group.prompt.id: group for group in engine.collect()})
    return [groups[prompt.id] for prompt in PROMPTS]


def scored(groups: Sequence[Group]) -> list[ScoredGroup]:
    return [ScoredGroup(g.prompt, g.rollouts, tuple(Score(float(i % 2)) for i in range(4))) for g in groups]


def learner(folder: Path, objective: dict[str, Any] | None = None, **settings: Any) -> Learner:
    return Learner(
        load_policy(folder, dtype=torch.float32, device="cpu"),
        objective=TypeAdapter[ObjectiveSettings](ObjectiveSettings).validate_python(objective or {"name": "cispo"}),
        advantage=AdvantageSettings(),
        settings=LearnerSettings.model_validate({"learning_rate": 1e-2, **settings}),
        temperature=1.0,
        max_completion_tokens=40,
        total_updates=10,
        seed=7,
    )


def recompute(decoder: Decoder, rollout: Rollout) -> np.ndarray[Any, Any]:
    """Experts of all tokens but the last, by one forward."""
    ids_N = torch.from_numpy(np.concatenate((rollout.prompt_token_ids_T, rollout.completion_token_ids_T))[:-1]).long()
    record = ExpertRecord(decoder.config)
    cu_seqlens = torch.tensor([0, len(ids_N)], dtype=torch.int32)
    decoder(ids_N, torch.arange(len(ids_N)), cu_seqlens, routing=RoutingControl(record=record))
    return record.ids_NLK.numpy()


def test_the_engine_records_every_token_and_samples_the_same(small_policy_folder: Path) -> None:
    decoder = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    drawn = [rollout for group in sample(small_policy_folder, records_experts=False) for rollout in group.rollouts]
    # A token that comes often ends completions early, so that slots are left, moved and taken again.
    often = int(np.bincount(np.concatenate([rollout.completion_token_ids_T for rollout in drawn])).argmax())
    plain = sample(small_policy_folder, records_experts=False, eos_id=often)
    recorded = sample(small_policy_folder, records_experts=True, eos_id=often)
    lengths = set()
    for without, group in zip(plain, recorded, strict=True):
        for mine, other in zip(group.rollouts, without.rollouts, strict=True):
            np.testing.assert_array_equal(mine.logprobs_T, other.logprobs_T)
            assert other.expert_ids_TLK is None
            assert mine.expert_ids_TLK is not None and mine.expert_ids_TLK.dtype == np.uint8
            np.testing.assert_array_equal(mine.expert_ids_TLK, recompute(decoder, mine))
            lengths.add(mine.completion_length_tokens)
    assert len(lengths) > 3


@pytest.mark.parametrize(("anchor", "coefficient"), [("rollout", 0.0), ("proximal", 0.0), ("rollout", 0.5)])
def test_replay_changes_no_bit_at_equal_weights(small_policy_folder: Path, anchor: str, coefficient: float) -> None:
    groups = scored(sample(small_policy_folder, records_experts=True))
    results: list[tuple[dict[str, float], dict[str, Tensor]]] = []
    for is_on in (False, True):
        settings = {"routing_replay": is_on, "router_aux_loss_coef": coefficient, "tokens_per_micro_batch": 500}
        subject = learner(small_policy_folder, {"name": "cispo", "anchor": anchor}, **settings)
        metrics = subject.train(groups, 1)
        repeatable = {n: v for n, v in metrics.items() if not n.startswith(("time_s/", "perf/", "router/"))}
        assert metrics.get("router/frac_differing", 0.0) == 0.0
        assert ("router/frac_differing" in metrics) == is_on
        assert ("router/entropy" in metrics) == (is_on or coefficient > 0)
        assert ("loss/router_aux" in metrics) == (coefficient > 0)
        results.append((repeatable, subject.policy_tensors()))
        assert metrics["policy/mismatch/max"] == 0.0
    assert results[0][0] == results[1][0]
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())


def test_replayed_experts_stay_those_of_the_rollout_after_an_update(small_policy_folder: Path) -> None:
    groups = scored(sample(small_policy_folder, records_experts=True))
    taken: list[Tensor] = []
    subject = learner(small_policy_folder, routing_replay=True, updates_per_step=3, learning_rate=0.1)

    def keep(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        taken.append(named["routing"].replayed_ids_NLK.clone())

    hook = subject.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    metrics = subject.train(groups, 1)
    hook.remove()
    assert 0.0 < metrics["router/frac_differing"] < 1.0
    check_names(metrics)
    expected = []
    for group in groups:
        for i, rollout in enumerate(group.rollouts):
            assert rollout.expert_ids_TLK is not None
            own = rollout.expert_ids_TLK[len(rollout.prompt_token_ids_T) if i else 0 :]
            expected += own.reshape(len(own), -1).tolist()
    assert len(taken) == 3
    assert sorted(torch.cat(taken).flatten(1).tolist()) == sorted(expected), "a group's prompt is packed once"
    rollout = groups[0].rollouts[0]
    assert not np.array_equal(recompute(subject.decoder, rollout), rollout.expert_ids_TLK), "the routers have moved"
    free = learner(small_policy_folder, updates_per_step=3, learning_rate=0.1)
    free.train(groups, 1)
    tensors = free.policy_tensors()
    assert any(not torch.equal(tensors[name], tensor) for name, tensor in subject.policy_tensors().items())


@pytest.mark.parametrize("coefficient", [0.0, 10.0])
def test_replay_does_not_depend_on_the_split_into_micro_batches(small_policy_folder: Path, coefficient: float) -> None:
    groups = scored(sample(small_policy_folder, records_experts=True))
    norms = []
    for budget in (1, 150, 100_000):
        settings = {"router_aux_loss_coef": coefficient, "tokens_per_micro_batch": budget}
        subject = learner(small_policy_folder, routing_replay=True, **settings)
        norms.append(subject.train(groups, 1)["optim/grad_norm"])
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-5)


def test_rollouts_without_their_experts_are_refused(small_policy_folder: Path) -> None:
    groups = scored(sample(small_policy_folder, records_experts=True))
    bare = [replace(rollout, prompt_expert_ids_TLK=None) for rollout in groups[0].rollouts]
    groups[0] = replace(groups[0], rollouts=tuple(bare))
    with pytest.raises(ValueError, match="sample with records_experts=True"):
        learner(small_policy_folder, routing_replay=True).train(groups, 1)
