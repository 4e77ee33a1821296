"""The load-balancing loss of a whole mini batch, in `cispo train`, and the metrics of routers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

from cispo.advantage import AdvantageSettings
from cispo.kernels.routing import router_logits
from cispo.learner import Learner
from cispo.learner_settings import LearnerSettings
from cispo.metric_table import check_names
from cispo.model.checkpoint import load_policy
from cispo.model.decoder import Decoder, Experts
from cispo.model.routing import RoutingControl, RoutingLog
from cispo.objective_settings import ObjectiveSettings
from cispo.types import Prompt, Rollout, Score, ScoredGroup, StopReason, Turn

MASKS_ALL = {"name": "cispo", "mask_ratio_low": 0.5, "mask_ratio_high": 2.0}
"""Takes out every token of the groups below, so that the gradient is that of the load-balancing loss alone."""


def learner(folder: Path, **settings: Any) -> Learner:
    return Learner(
        load_policy(folder, dtype=torch.float32, device="cpu"),
        objective=TypeAdapter[ObjectiveSettings](ObjectiveSettings).validate_python(MASKS_ALL),
        advantage=AdvantageSettings(),
        settings=LearnerSettings.model_validate({"learning_rate": 1e-2, "eps": 1e-3, **settings}),
        temperature=1.0,
        max_completion_tokens=40,
        total_updates=10,
        seed=7,
    )


def groups() -> list[ScoredGroup]:
    """Completions whose stored logprobs are far from a policy's, to the side where the mask takes their tokens out."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(4):
        prompt, rollouts = rng.integers(0, 256, int(rng.integers(3, 30))).astype(np.int32), []
        for i in range(3):
            tokens = rng.integers(0, 256, int(rng.integers(5, 90))).astype(np.int32)
            length = len(tokens)
            logprob = 30.0 if i == 0 else -60.0  # the first has a negative advantage, the second none
            turn = Turn(tokens, np.ones(length, bool), np.full(length, logprob, np.float32), np.zeros(length, np.int32))
            rollouts.append(Rollout(f"p{index}", i, prompt, (turn,), StopReason.EOS, ""))
        made.append(ScoredGroup(Prompt(f"p{index}", ""), tuple(rollouts), tuple(Score(float(i)) for i in range(3))))
    return made


def all_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of the groups but each completion's last, packed."""
    rollouts = [rollout for group in groups() for rollout in group.rollouts]
    ids = [np.concatenate((r.prompt_token_ids_T, r.completion_token_ids_T))[:-1] for r in rollouts]
    lengths = [len(part) for part in ids]
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    return torch.from_numpy(np.concatenate(ids)).long(), positions_N, torch.tensor([0, *lengths]).cumsum(0).int()


def peer_loss(decoder: Decoder) -> Tensor:
    """The loss of transformers on the logits of every router, from one forward over everything."""
    logits: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Experts) and module.router is not None
        logits.append(router_logits(arguments[0], module.router))

    hooks = [module.register_forward_pre_hook(keep) for module in decoder.modules() if isinstance(module, Experts)]
    decoder(*all_inputs())
    for hook in hooks:
        hook.remove()
    loss = load_balancing_loss_func(tuple(logits), decoder.config.experts, decoder.config.experts_per_token)
    assert isinstance(loss, Tensor)
    return loss


def test_value_and_gradient_are_those_of_one_pass_under_any_split(small_policy_folder: Path) -> None:
    model = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    expected = peer_loss(model)
    expected.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    assert norm > 1e-3
    results = []
    for budget in (1, 200, 100_000):
        subject = learner(small_policy_folder, router_aux_loss_coef=0.25, tokens_per_micro_batch=budget)
        metrics = subject.train(groups(), 1)
        check_names(metrics)
        assert metrics["loss/router_aux"] == pytest.approx(float(expected.detach()), rel=1e-6)
        assert metrics["optim/grad_norm"] == pytest.approx(0.25 * norm, rel=1e-4)
        results.append(subject.policy_tensors())
    for tensors in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_load_of_the_whole_mini_batch_is_not_that_of_its_parts(small_policy_folder: Path) -> None:
    """Otherwise the test above would also pass with losses that each micro batch takes by itself."""
    model = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    ids_N, positions_N, cu_seqlens = all_inputs()
    log = RoutingLog(model.config, len(cu_seqlens) - 1)
    model(ids_N, positions_N, cu_seqlens, routing=RoutingControl(log=log))
    load_BE = log.tokens_BLE.sum(1).double() / log.routed_BL.sum(1, keepdim=True)
    assert (load_BE - load_BE.mean(0)).abs().max() > 0.05


def test_metrics_are_of_what_the_routers_do(small_policy_folder: Path) -> None:
    metrics = learner(small_policy_folder, router_aux_loss_coef=1e-9, tokens_per_micro_batch=200).train(groups(), 1)
    model = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    ids_N, positions_N, cu_seqlens = all_inputs()
    log = RoutingLog(model.config, len(cu_seqlens) - 1)
    model(ids_N, positions_N, cu_seqlens, routing=RoutingControl(log=log))
    tokens_LE = log.tokens_BLE.sum(0)
    even = len(ids_N) * model.config.experts_per_token / model.config.experts
    assert metrics["router/max_load"] == pytest.approx(float(tokens_LE.max()) / even)
    entropy = float((log.mean_entropy_BL * log.routed_BL).sum() / log.routed_BL.sum())
    assert metrics["router/entropy"] == pytest.approx(entropy, rel=1e-6)
    assert "router/frac_differing" not in metrics, "nothing was replayed"


def test_training_on_it_evens_out_the_loads(small_policy_folder: Path) -> None:
    subject = learner(small_policy_folder, router_aux_loss_coef=1.0, tokens_per_micro_batch=400)
    steps = [subject.train(groups(), step) for step in range(8)]
    even = subject.decoder.config.experts_per_token
    assert steps[0]["loss/router_aux"] - even > 4 * (steps[-1]["loss/router_aux"] - even) > -1e-3


def test_without_a_coefficient_routers_are_left_alone(small_policy_folder: Path) -> None:
    subject = learner(small_policy_folder)
    calls: list[dict[str, Any]] = []

    def keep(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append(named)

    subject.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    metrics = subject.train(groups(), 1)
    assert [named["routing"] for named in calls] == [None]
    assert not [name for name in metrics if name.startswith(("router/", "loss/router"))]
