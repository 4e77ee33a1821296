import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from cispo.advantage import AdvantageSettings
from cispo.devices import peak_flops
from cispo.errors import CheckpointError, CispoError
from cispo.kernels.head_loss import HeadLoss, head_logprobs
from cispo.learner import Learner
from cispo.learner_settings import LearnerSettings
from cispo.metric_table import check_names
from cispo.model.config import LIGHTNING, SOFTMAX, ModelConfig
from cispo.model.decoder import Decoder
from cispo.objective_settings import ObjectiveSettings
from cispo.packing import MicroBatch
from cispo.types import Prompt, Rollout, Score, ScoredGroup, ScoreStatus, StopReason, Turn

CONFIG = ModelConfig(
    vocabulary_size=48,
    hidden_size=32,
    mixers=(LIGHTNING, SOFTMAX),
    heads=2,
    key_heads=1,
    head_dim=16,
    rotary_dim=8,
    rope_theta=10000.0,
    expert_width=24,
    experts=4,
    experts_per_token=2,
    norm_epsilon=1e-5,
    lightning_alpha=1.0,
    lightning_beta=1.0,
    softmax_alpha=1.0,
    softmax_beta=1.0,
    expert_alpha=1.0,
    expert_beta=1.0,
    initializer_range=0.2,
    tie_embeddings=True,
    max_positions=512,
)
TEMPERATURE = 0.8
OBJECTIVES: list[dict[str, object]] = [
    {"name": "cispo"},
    {"name": "cispo", "anchor": "proximal", "reduction": "mixed", "mixed_sample_weight": 0.5},
    {"name": "cispo", "reduction": "token", "mask_ratio_low": 0.5, "mask_ratio_high": 2.0},
    {"name": "grpo", "kl_coefficient": 0.1},
    {"name": "dapo", "anchor": "proximal"},
    {"name": "dr_grpo"},
    {"name": "reinforce", "reduction": "sample"},
]


def decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(CONFIG)
    model.initialise(0)
    return model.to(dtype)


def learner(model: Decoder | None = None, objective: Mapping[str, object] | None = None, **settings: object) -> Learner:
    model = decoder() if model is None else model
    parsed = TypeAdapter[ObjectiveSettings](ObjectiveSettings).validate_python(objective or {"name": "cispo"})
    return Learner(
        model,
        objective=parsed,
        advantage=AdvantageSettings(),
        settings=LearnerSettings.model_validate({"learning_rate": 1e-2, **settings}),
        temperature=TEMPERATURE,
        max_completion_tokens=40,
        total_updates=100,
        seed=7,
        reference=copy.deepcopy(model) if parsed.needs_reference else None,
    )


def score_tokens(model: Decoder, ids: np.ndarray, first: int) -> np.ndarray:
    """Logprobs of ids[first:], from a forward of this sequence alone."""
    ids_N = torch.from_numpy(ids).long().to(model.head_weight.device)
    positions_N = torch.arange(len(ids) - 1, device=ids_N.device)
    with torch.no_grad():
        hidden_ND = model(ids_N[:-1], positions_N, torch.tensor([0, len(ids) - 1], dtype=torch.int32))
        logprob_N, _ = head_logprobs(hidden_ND[first - 1 :], model.head_weight, ids_N[first:], temperature=TEMPERATURE)
    return logprob_N.cpu().numpy()


def sampled_groups(model: Decoder, count: int, *, seed: int = 0, size: int = 4, version: int = 0) -> list[ScoredGroup]:
    """Random completions with the policy's own logprobs; every second one has a turn of tokens it did not sample."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(count):
        prompt = rng.integers(0, 48, int(rng.integers(3, 9))).astype(np.int32)
        rollouts = []
        for i in range(size):
            tokens = rng.integers(0, 48, int(rng.integers(2, 75))).astype(np.int32)
            sampled = np.ones(len(tokens), dtype=np.bool_)
            if i % 2:
                sampled[len(tokens) // 2 : -1] = False
            logprobs = score_tokens(model, np.concatenate([prompt, tokens]), len(prompt))
            turn = Turn(tokens, sampled, np.where(sampled, logprobs, 0), np.where(sampled, version, 0).astype(np.int32))
            rollouts.append(Rollout(f"p{index}", i, prompt, (turn,), StopReason.EOS, ""))
        scores = tuple(Score(float(i + index) % 3) for i in range(size))
        groups.append(ScoredGroup(Prompt(f"p{index}", ""), tuple(rollouts), scores))
    return groups


def shifted(groups: list[ScoredGroup], difference: float) -> list[ScoredGroup]:
    """The same groups as if another policy had sampled them."""

    def shift(rollout: Rollout) -> Rollout:
        turns = tuple(
            replace(t, logprobs_T=np.where(t.loss_mask_T, t.logprobs_T + np.float32(difference), 0).astype(np.float32))
            for t in rollout.turns
        )
        return replace(rollout, turns=turns)

    return [replace(group, rollouts=tuple(shift(rollout) for rollout in group.rollouts)) for group in groups]


def weights(subject: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in subject.policy_tensors().items()}


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("time_s/", "perf/"))}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_step_of_several_updates(objective: dict[str, object]) -> None:
    model = decoder()
    subject = learner(model, objective, updates_per_step=3)
    groups = sampled_groups(model, 5)
    before = weights(subject)
    metrics = subject.train(groups, 1)
    check_names(metrics)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["optim/updates"] == 3
    assert metrics["policy/version"] == subject.policy_version == 1
    assert metrics["policy/mismatch/max"] == metrics["policy/mismatch_kl"] == 0.0
    assert metrics["policy/ratio/max"] > 1.0, "later updates of the step see a policy that has moved"
    assert all(not torch.equal(before[name], tensor) for name, tensor in weights(subject).items())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_micro_batches_change_no_result(objective: dict[str, object]) -> None:
    results = []
    for budget in (1, 90, 100_000):
        model = decoder()
        subject = learner(model, objective, tokens_per_micro_batch=budget, updates_per_step=2, eps=1e-3)
        groups = shifted(sampled_groups(model, 4), 0.3)
        results.append((subject.train(groups, 1), weights(subject)))
    for metrics, tensors in results[1:]:
        for name, value in without_times(results[0][0]).items():
            assert metrics[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
        for name, tensor in results[0][1].items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=str)
def test_a_shared_prompt_changes_no_logprob_and_no_gradient(objective: dict[str, object]) -> None:
    model = decoder()
    groups = sampled_groups(model, 4)
    packed: list[list[MicroBatch]] = []
    results = []
    for shares_prompts in (True, False):
        subject = learner(copy.deepcopy(model), objective, tokens_per_micro_batch=250)
        assert subject.shares_prompts, "float32 on CPU takes branches"
        subject.shares_prompts = shares_prompts
        taken: list[MicroBatch] = []
        gradients: dict[str, Tensor] = {}
        seen, update = subject._forward_backward, subject._optimizer.update

        def watch(micro: MicroBatch, *rest: Any, seen: Any = seen, taken: list[MicroBatch] = taken) -> HeadLoss:
            head: HeadLoss = seen(micro, *rest)
            taken.append(replace(micro, tokens=micro.tokens.with_logprob(head.logprob_N.clone())))
            return head

        def keep(rate: float, subject: Learner = subject, gradients: Any = gradients, update: Any = update) -> None:
            update(rate)
            gradients.update((name, x) for name, x in subject.state_dict().items() if name.startswith("exp_avg/"))

        subject._forward_backward = watch  # type: ignore[method-assign]
        subject._optimizer.update = keep  # type: ignore[method-assign]
        metrics = subject.train(groups, 1)
        assert metrics["policy/mismatch/max"] == 0.0
        packed.append(taken)
        results.append((without_times(metrics), gradients))
    shared, apart = packed
    assert sum(len(micro.ids_N) for micro in shared) < sum(len(micro.ids_N) for micro in apart)
    assert logprobs_of(shared) == logprobs_of(apart)
    (metrics, gradients), (wanted, reference) = results
    assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        assert float((gradients[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


def logprobs_of(micro_batches: list[MicroBatch]) -> dict[int, list[float]]:
    """The logprobs of each sequence's loss tokens, in order."""
    found: dict[int, list[float]] = {}
    for micro in micro_batches:
        assert micro.tokens.logprob_N is not None
        for sequence, logprob in zip(micro.tokens.sequence_N.tolist(), micro.tokens.logprob_N.tolist(), strict=True):
            found.setdefault(sequence, []).append(logprob)
    return found


def test_policies_that_take_no_branches_are_packed_without() -> None:
    model = decoder(torch.bfloat16)
    subject = learner(model)
    assert not subject.shares_prompts
    assert subject.train(sampled_groups(model, 2), 1)["policy/mismatch/max"] == 0.0


def test_gradient_is_that_of_equation_4_by_autograd() -> None:
    model = decoder()
    groups = shifted(sampled_groups(model, 3), -0.5)
    plain = copy.deepcopy(model)
    loss = torch.zeros(())
    for group in groups:
        reward = np.array([score.value for score in group.scores])
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        tokens = sum(int(rollout.loss_mask_T.sum()) for rollout in group.rollouts)
        for rollout, a in zip(group.rollouts, advantage, strict=True):
            ids_N = torch.from_numpy(
                np.concatenate([rollout.prompt_token_ids_T, rollout.completion_token_ids_T])
            ).long()
            first = len(rollout.prompt_token_ids_T)
            hidden_ND = plain(ids_N, torch.arange(len(ids_N)), torch.tensor([0, len(ids_N)], dtype=torch.int32))
            logits = hidden_ND[first - 1 : -1] @ plain.head_weight.t() / TEMPERATURE
            logprob = logits.log_softmax(-1).gather(1, ids_N[first:, None]).squeeze(1)
            ratio = (logprob - torch.from_numpy(rollout.logprobs_T)).exp().clamp(max=1.5).detach()
            terms = ratio * float(a) * logprob / tokens / len(groups)
            loss = loss - terms[torch.from_numpy(rollout.loss_mask_T)].sum()
    torch.autograd.backward(loss)
    gradient = torch.cat([parameter.grad.flatten() for parameter in plain.parameters() if parameter.grad is not None])
    metrics = learner(model, {"name": "cispo", "ratio_max": 1.5}).train(groups, 1)
    assert metrics["optim/grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert metrics["loss/policy"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert metrics["loss/frac_clipped_high"] == 1.0


@pytest.mark.parametrize("objective", OBJECTIVES[:4], ids=str)
def test_resume_is_exact(objective: dict[str, object]) -> None:
    def fresh() -> Learner:
        return learner(objective=objective, updates_per_step=2, schedule="cosine", warmup_updates=3, weight_decay=0.1)

    unbroken, broken = fresh(), fresh()
    first, second = sampled_groups(unbroken.decoder, 4), sampled_groups(unbroken.decoder, 4, seed=1)
    unbroken.train(first, 1)
    broken.train(first, 1)
    saved = {name: tensor.clone() for name, tensor in broken.state_dict().items()}
    resumed = fresh()
    resumed.load_state_dict(saved)
    assert resumed.policy_version == 1
    assert without_times(resumed.train(second, 2)) == without_times(unbroken.train(second, 2))
    assert_same(resumed.state_dict(), unbroken.state_dict())
    assert_same(weights(resumed), weights(unbroken))


def test_state_of_another_model_is_refused() -> None:
    subject = learner()
    state = dict(subject.state_dict())
    with pytest.raises(CheckpointError, match="policy_version"):
        subject.load_state_dict({name: tensor for name, tensor in state.items() if name != "policy_version"})
    with pytest.raises(CheckpointError, match=r"first exp_avg/embedding"):
        subject.load_state_dict({**state, "exp_avg/embedding": torch.zeros(2)})


def test_a_step_without_lessons_makes_no_update_and_is_counted() -> None:
    subject = learner()
    groups = [replace(group, scores=(Score(0.7),) * 4) for group in sampled_groups(subject.decoder, 3)]
    before = subject.state_dict()["updates"].clone(), weights(subject)
    metrics = subject.train(groups, 1)
    assert without_times(metrics) == {"group/dropped": 3.0, "optim/updates": 0.0, "policy/version": 1.0}
    assert torch.equal(subject.state_dict()["updates"], before[0])
    assert_same(weights(subject), before[1])


def test_failed_samples_have_no_gradient() -> None:
    model = decoder()
    groups = sampled_groups(model, 2, size=3)
    failed = [
        replace(
            group, rollouts=(*group.rollouts, other.rollouts[0]), scores=(*group.scores, Score(0, ScoreStatus.ERROR))
        )
        for group, other in zip(groups, reversed(groups), strict=True)
    ]
    with_failed, without = learner(copy.deepcopy(model)), learner(copy.deepcopy(model))
    metrics = with_failed.train(failed, 1)
    without.train(groups, 1)
    assert_same(weights(with_failed), weights(without))
    assert metrics["loss/frac_masked"] > 0


def test_mismatch_is_measured_before_the_first_update_at_equal_weights() -> None:
    model = decoder()
    groups = sampled_groups(model, 4)
    for objective in ({"name": "cispo"}, {"name": "cispo", "anchor": "proximal"}):
        metrics = learner(copy.deepcopy(model), objective, updates_per_step=4).train(shifted(groups, 0.25), 1)
        assert metrics["policy/mismatch/max"] == pytest.approx(0.25, rel=1e-5)
        assert metrics["policy/mismatch/mean"] == pytest.approx(0.25, rel=1e-5)
    half_old = [*groups[:2], *sampled_groups(model, 2, seed=5, version=-1)]
    metrics = learner(copy.deepcopy(model)).train(half_old, 1)
    assert metrics["policy/mismatch/max"] == 0.0
    assert metrics["off_policy/steps/max"] == 1.0
    assert 0.0 < metrics["off_policy/steps/mean"] < 1.0
    metrics = learner(copy.deepcopy(model)).train(sampled_groups(model, 2, version=-1), 1)
    assert "policy/mismatch/max" not in metrics, "no token was sampled at the learner's weights"


def test_the_anchor_is_what_the_ratio_is_taken_to() -> None:
    model = decoder()
    groups = shifted(sampled_groups(model, 3), -math.log(2.0))
    rollout = learner(copy.deepcopy(model), {"name": "cispo"}).train(groups, 1)
    proximal = learner(copy.deepcopy(model), {"name": "cispo", "anchor": "proximal"}).train(groups, 1)
    assert rollout["policy/ratio/mean"] == pytest.approx(2.0, rel=1e-5)
    assert proximal["policy/ratio/mean"] == proximal["policy/ratio/max"] == 1.0


def test_the_learning_rate_follows_the_schedule_over_updates() -> None:
    subject = learner(learning_rate=1e-3, warmup_updates=5, schedule="linear", updates_per_step=2)
    rates = [subject.train(sampled_groups(subject.decoder, 4, seed=s), s)["optim/lr"] for s in range(4)]
    assert rates == pytest.approx([4e-4, 8e-4, 1e-3, 1e-3 * (1 - 2 / 95)])


def test_kl_is_to_the_frozen_reference() -> None:
    subject = learner(objective={"name": "reinforce", "kl_coefficient": 0.1})
    groups = sampled_groups(subject.decoder, 3)
    assert subject.train(groups, 1)["policy/kl_reference"] == 0.0
    assert subject.train(groups, 2)["policy/kl_reference"] > 0.0
    with pytest.raises(ValueError, match="reference policy"):
        Learner(
            decoder(),
            objective=TypeAdapter[ObjectiveSettings](ObjectiveSettings).validate_python(
                {"name": "grpo", "kl_coefficient": 1.0}
            ),
            advantage=AdvantageSettings(),
            settings=LearnerSettings(learning_rate=1.0),
            temperature=1.0,
            max_completion_tokens=1,
            total_updates=1,
            seed=0,
        )


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_step_and_names_the_group(bad: float) -> None:
    subject = learner(objective={"name": "cispo", "ratio_max": math.inf})
    groups = sampled_groups(subject.decoder, 3)
    groups[1] = shifted([groups[1]], bad)[0]
    before = weights(subject)
    with pytest.raises(CispoError, match=r"step 9: the loss is not finite in the groups of prompts 'p1'; the weights"):
        subject.train(groups, 9)
    assert_same(weights(subject), before)


def test_bfloat16_weights_follow_float32_masters() -> None:
    model = decoder(torch.bfloat16)
    subject = learner(model, learning_rate=1e-6)
    master = subject.state_dict()["master/embedding"].clone()
    for step in range(3):
        subject.train(sampled_groups(model, 2, seed=step, version=step), step)
    state = subject.state_dict()
    assert state["master/embedding"].dtype == torch.float32
    assert not torch.equal(state["master/embedding"], master), "updates too small for bfloat16 are kept in the master"
    assert not torch.equal(state["master/embedding"], state["master/embedding"].bfloat16().float())
    for name, tensor in weights(subject).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, state[f"master/{name}"].bfloat16())


def test_policy_tensors_are_the_weights_in_use() -> None:
    subject = learner()
    tensors = subject.policy_tensors()
    assert list(tensors) == [name for name, _ in subject.decoder.named_parameters()]
    subject.train(sampled_groups(subject.decoder, 2), 1)
    assert all(torch.equal(tensors[name], parameter) for name, parameter in subject.decoder.named_parameters())


def test_completions_with_a_better_score_become_likelier() -> None:
    subject = learner(learning_rate=3e-3)
    groups = sampled_groups(subject.decoder, 2)
    before = weights(subject)
    for step in range(4):
        subject.train(groups, step)
    old = decoder()
    for name, parameter in old.named_parameters():
        parameter.data.copy_(before[name])
    for group in groups:
        gains = []
        for rollout in group.rollouts:
            ids = np.concatenate([rollout.prompt_token_ids_T, rollout.completion_token_ids_T])
            first, mask = len(rollout.prompt_token_ids_T), rollout.loss_mask_T
            now, then = (score_tokens(m, ids, first)[mask].mean() for m in (subject.decoder, old))
            gains.append(float(now - then))
        rewards = [score.value for score in group.scores]
        assert gains[int(np.argmax(rewards))] > 0 > gains[int(np.argmin(rewards))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu_steps_repeat_bit_for_bit_and_resume(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)

    def fresh() -> Learner:
        objective = {"name": "cispo", "anchor": "proximal", "kl_coefficient": 0.1}
        return learner(decoder(dtype).cuda(), objective, updates_per_step=3, tokens_per_micro_batch=300)

    try:
        first, second = fresh(), fresh()
        groups = [sampled_groups(first.decoder, 6, seed=seed) for seed in range(2)]
        assert without_times(first.train(groups[0], 1)) == without_times(second.train(groups[0], 1))
        resumed = fresh()
        resumed.load_state_dict({name: tensor.cpu() for name, tensor in second.state_dict().items()})
        assert without_times(first.train(groups[1], 2)) == without_times(resumed.train(groups[1], 2))
        assert_same(first.state_dict(), resumed.state_dict())
        assert_same(weights(first), weights(resumed))
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_share_of_a_known_peak_is_counted_from_the_packed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cispo.learner.peak_flops", lambda device, dtype: 1e9)
    subject = learner()
    metrics = subject.train(sampled_groups(subject.decoder, 2), 0)
    flops_per_token = metrics["perf/mfu"] * 1e9 / metrics["perf/learner_tokens_per_s"]
    # Six operations a weight, without those of the embedding and of the two experts that a token does not meet.
    weights = sum(p.numel() for name, p in subject.decoder.named_parameters() if p.dim() > 1 and name != "embedding")
    assert 0.5 * 6 * weights < flops_per_token < 3 * 6 * weights
    assert "perf/mfu" not in learner().train([], 0)


def test_a_peak_is_known_for_bfloat16_on_named_devices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    cuda = torch.device("cuda")
    assert peak_flops(cuda, torch.bfloat16) == 989e12
    assert peak_flops(cuda, torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert peak_flops(cuda, torch.bfloat16) is None
