"""Learners with random policies and the groups that they train on, the same on every rank."""

import gc
import math

import numpy as np
import torch

from cispo.advantage import AdvantageSettings
from cispo.learner import Learner
from cispo.learner_settings import LearnerSettings
from cispo.model.config import ModelConfig
from cispo.objective_settings import CispoSettings
from cispo.parallel.ranks import ALONE, Ranks
from cispo.types import ExpertIdArray, Prompt, Rollout, Score, ScoredGroup, StopReason, Turn
from two_gpu_parts.common import new_decoder

GROUP_SIZE = 4
LEARNING_RATE = 1e-6
"""Of models of this size under RL."""
EPSILON = 1e-8
"""AdamW's usual one. With M1's 1e-15 a weight whose gradient is rounding error alone moves as far as any other, and
routers then send a token now and then to another expert: a jump that says nothing about the sums compared here."""


def new_learner(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens_per_micro_batch: int,
    ranks: Ranks = ALONE,
    activation_checkpointing: bool = False,
    routing_replay: bool = False,
) -> Learner:
    settings = LearnerSettings(
        learning_rate=LEARNING_RATE,
        eps=EPSILON,
        tokens_per_micro_batch=tokens_per_micro_batch,
        activation_checkpointing=activation_checkpointing,
        routing_replay=routing_replay,
    )
    return Learner(
        new_decoder(config, dtype, device),
        objective=CispoSettings(),
        advantage=AdvantageSettings(),
        settings=settings,
        temperature=1.0,
        max_completion_tokens=4096,
        total_updates=1000,
        seed=0,
        ranks=ranks,
    )


def groups_of(
    step: int, config: ModelConfig, *, groups: int, tokens: int, records_experts: bool = False
) -> list[ScoredGroup]:
    """Random completions of half to all of so many tokens, as a policy that knows nothing would have sampled them.

    Tokens and rewards differ from step to step, lengths do not, so that every step costs the same. records_experts:
    with the experts that each token went to, random as well, to be replayed.
    """
    rng, of_lengths = np.random.default_rng(step), np.random.default_rng(0)
    made = []
    for index in range(groups):
        prompt = rng.integers(0, config.vocabulary_size, tokens // 16).astype(np.int32)
        of_prompt = _random_experts(rng, config, len(prompt) - 1) if records_experts else None
        rollouts = []
        for place in range(GROUP_SIZE):
            length = int(of_lengths.integers(tokens // 2, tokens + 1))
            ids = rng.integers(0, config.vocabulary_size, length).astype(np.int32)
            logprobs = rng.normal(-math.log(config.vocabulary_size), 0.1, len(ids)).astype(np.float32)
            experts = _random_experts(rng, config, length) if records_experts else None
            turn = Turn(ids, np.ones(length, np.bool_), logprobs, np.zeros(length, np.int32), expert_ids_TLK=experts)
            rollouts.append(
                Rollout(f"p{index}", place, prompt, (turn,), StopReason.LENGTH, "", prompt_expert_ids_TLK=of_prompt)
            )
        scores = tuple(Score(float(value)) for value in rng.random(GROUP_SIZE))
        made.append(ScoredGroup(Prompt(f"p{index}", ""), tuple(rollouts), scores))
    return made


def _random_experts(rng: np.random.Generator, config: ModelConfig, tokens: int) -> ExpertIdArray:
    """Different ones for each token and layer: [tokens, L, K]."""
    order_TLE = rng.random((tokens, len(config.routed_layers), config.experts)).argsort(-1)
    return order_TLE[..., : config.experts_per_token].astype(np.uint8)


def free() -> None:
    """Give back what a learner that is gone held; sharded modules refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
