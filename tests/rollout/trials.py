"""What tests of the engine share: requests, runs to the end, and the learner's forward to compare with."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cispo.kernels.head_loss import head_logprobs
from cispo.model.decoder import Decoder
from cispo.model.tokenizer import Tokenizer
from cispo.rollout.decode_step import AtHand
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest, Stops
from cispo.types import Group, Prompt, Rollout

LIMIT = 70
"""Most tokens of a completion: more than a page."""


@dataclass(frozen=True)
class Policy:
    """A decoder that tests leave as it is, and its tokenizer."""

    decoder: Decoder
    tokenizer: Tokenizer

    def engine(
        self,
        *,
        capacity: int = 32,
        limit: int = LIMIT,
        max_prompt_tokens: int = 128,
        runs_ahead: bool = False,
        **changes: Any,
    ) -> Engine:
        """runs_ahead: launch a step before the tokens of the last one are looked at, as on a GPU."""
        engine = Engine(
            self.decoder,
            self.tokenizer,
            SamplingSettings(max_completion_tokens=limit, seed=3),
            max_concurrent_completions=capacity,
            max_prompt_tokens=max_prompt_tokens,
            **changes,
        )
        if runs_ahead:
            run_ahead(engine)
        return engine


def run_ahead(engine: Engine) -> None:
    stepper = engine._runner._stepper
    launch = stepper.launch

    def launch_and_keep(*args: Any) -> AtHand:
        # A plan writes to the same place at every step.
        ids_B, logprob_B = launch(*args).wait()
        return AtHand(torch.tensor(ids_B), torch.tensor(logprob_B))

    stepper.launch = launch_and_keep  # type: ignore[method-assign]
    engine._runs_ahead = True


def request(name: str, length: int = 5, group_size: int = 1, **changes: Any) -> GroupRequest:
    """A prompt of so many letters."""
    return GroupRequest(Prompt(id=name, text="x" * length), group_size, **{"drawing": Drawing(), **changes})


def stops(**changes: Any) -> dict[str, Stops]:
    return {"stops": Stops(**changes)}


def run(
    engine: Engine,
    requests: Iterable[GroupRequest] = (),
    *,
    before_step: Callable[[], object] = lambda: None,
    most_steps: int = 20_000,
) -> dict[str, Group]:
    """Groups by prompt id, once the engine is idle; fails where that takes too many steps."""
    for one in requests:
        engine.submit(one)
    groups: dict[str, Group] = {}
    for _ in range(most_steps):
        if engine.is_idle:
            return groups
        before_step()
        engine.step()
        for group in engine.collect():
            assert group.prompt.id not in groups
            groups[group.prompt.id] = group
    raise AssertionError(f"not idle after {most_steps} steps: {len(groups)} groups have ended")


def facts(rollout: Rollout) -> tuple[Any, ...]:
    """All that a rollout says, to be compared bit for bit."""
    return (
        rollout.completion_token_ids_T.tolist(),
        rollout.logprobs_T.tobytes(),
        rollout.loss_mask_T.tolist(),
        rollout.policy_versions_T.tolist(),
        rollout.stop_reason,
        rollout.text,
        rollout.is_interrupted,
    )


def samples(groups: dict[str, Group]) -> dict[tuple[str, int], tuple[Any, ...]]:
    return {(name, one.completion_index): facts(one) for name, group in groups.items() for one in group.rollouts}


def assert_learners_logprobs(decoder: Decoder, rollouts: Iterable[Rollout], temperature: float = 1.0) -> None:
    """Logprobs of sampled tokens are those of one forward over prompt and completion, bit for bit; others are 0."""
    for rollout in rollouts:
        prompt = len(rollout.prompt_token_ids_T)
        ids_N = torch.from_numpy(
            np.concatenate((rollout.prompt_token_ids_T, rollout.completion_token_ids_T)).astype(np.int64)
        )
        length = len(ids_N)
        with torch.no_grad():
            hidden_ND = decoder(ids_N, torch.arange(length), torch.tensor([0, length], dtype=torch.int32))
            asked = hidden_ND[prompt - 1 : length - 1]
            expected_N, _ = head_logprobs(asked, decoder.head_weight, ids_N[prompt:], temperature=temperature)
        expected = np.where(rollout.loss_mask_T, expected_N.numpy(), np.float32(0))
        np.testing.assert_array_equal(rollout.logprobs_T, expected)


def assert_empty(engine: Engine) -> None:
    """Nothing is left of any request."""
    assert engine.is_idle
    assert engine.active_completions == engine.waiting_groups == engine.open_turns == 0
    assert engine.cache_share == 0
    assert engine._cache.free_pages == engine._cache.pages
    assert sorted(engine._room._free_slots) == list(range(engine._cache.capacity))
    assert not engine._cache._page_references.any()
