"""A policy for people: load a folder and let it answer, on the engine that rollouts are sampled with.

    from cispo import load_policy
    policy = load_policy("bundled:tiny")
    for generation in policy.generate(["Write a function ..."], max_new_tokens=64, temperature=0.0):
        print(generation.text, generation.stop_reason, generation.completion_tokens)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cispo.devices import resolve_device, resolve_dtype
from cispo.errors import CispoError
from cispo.model.checkpoint import load_policy as load_decoder
from cispo.model.decoder import Decoder
from cispo.model.routing import RoutingLog
from cispo.model.tokenizer import Tokenizer
from cispo.resources import resolve_policy
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest
from cispo.types import Group, Prompt, Rollout, StopReason

MAX_CONCURRENT_COMPLETIONS = 64


class GenerationError(CispoError, ValueError):
    """What was asked of `Policy.generate` cannot be done; says what to ask instead."""


@dataclass(frozen=True, slots=True)
class RoutingUse:
    """Where the tokens of one prompt and its completions went. Layers are those that have a router, in order.

    tokens_LE: how many a layer sent to each expert; a token counts once for each expert it went to. mean_entropy_L: of
    the router's softmax over all experts, in nats.
    """

    tokens_LE: tuple[tuple[int, ...], ...]
    mean_entropy_L: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """One completion. logprobs: of its tokens, in nats, at the temperature they were sampled at (1 if that was 0)."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: StopReason
    prompt_tokens: int
    routing: RoutingUse | None

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """A decoder and its tokenizer."""

    decoder: Decoder
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", dtype: str = "auto") -> "Policy":
        """A policy folder, or a bundled policy by name.

        device: cpu, cuda, or auto for CUDA where there is one. dtype: float32, bfloat16, or auto for bfloat16 on CUDA
        and float32 on CPU.
        """
        folder, place = resolve_policy(str(path), base_path=Path.cwd()), resolve_device(device)
        if dtype == "auto":
            dtype = "bfloat16" if place.type == "cuda" else "float32"
        decoder = load_decoder(folder, dtype=resolve_dtype(dtype), device=place)
        return cls(decoder, Tokenizer.load(folder))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        completions: int = 1,
        expert_threshold: float = 0.0,
        log_routing: bool = False,
        seed: int = 0,
    ) -> list[Generation]:
        """Answers to user messages, each in the policy's chat template; `completions` of each, prompt by prompt.

        temperature: 0 takes the likeliest token each time. expert_threshold: in [0, 1); of a token's experts those
        with less of the gate weight are dropped, the rest renormalised. log_routing: say where tokens went. The same
        seed gives the same answers, whatever else is asked beside. GenerationError for what cannot be done.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        self._refuse_impossible(max_new_tokens, completions, expert_threshold, log_routing)
        if not asked:
            return []
        log = RoutingLog(self.decoder.config, len(asked), self.decoder.head_weight.device) if log_routing else None
        lengths = [len(self.tokenizer.render_prompt(prompt)) for prompt in asked]
        engine = Engine(
            self.decoder,
            self.tokenizer,
            SamplingSettings(max_completion_tokens=max_new_tokens, seed=seed),
            max_concurrent_completions=max(completions, min(MAX_CONCURRENT_COMPLETIONS, completions * len(asked))),
            max_prompt_tokens=max(lengths),
            routing_log=log,
        )
        for number, prompt in enumerate(asked):
            # Noise is by id, so equal prompts of one call need ids of their own to be answered differently.
            request = GroupRequest(
                Prompt(id=str(number), text=prompt),
                completions,
                Drawing(temperature),
                expert_threshold=expert_threshold,
                log_sequence=number,
            )
            try:
                engine.submit(request)
            except ValueError as error:
                raise GenerationError(str(error)) from error
        return [
            _generation(group, rollout, None if log is None else _routing_use(log, number))
            for number, group in enumerate(_run(engine))
            for rollout in group.rollouts
        ]

    def _refuse_impossible(
        self, max_new_tokens: int, completions: int, expert_threshold: float, log_routing: bool
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("completions", completions)):
            if value < 1:
                raise GenerationError(f"{name} is {value}; it must be at least 1")
        if (expert_threshold or log_routing) and not self.decoder.config.routed_layers:
            raise GenerationError("this policy has no router; leave out expert_threshold and log_routing")


def _run(engine: Engine) -> list[Group]:
    groups: list[Group] = []
    while not engine.is_idle:
        engine.step()
        groups += engine.collect()
    return sorted(groups, key=lambda group: int(group.prompt.id))


def _generation(group: Group, rollout: Rollout, routing: RoutingUse | None) -> Generation:
    return Generation(
        prompt=group.prompt.text,
        text=rollout.text,
        token_ids=tuple(rollout.completion_token_ids_T.tolist()),
        logprobs=tuple(rollout.logprobs_T.tolist()),
        stop_reason=rollout.stop_reason,
        prompt_tokens=len(rollout.prompt_token_ids_T),
        routing=routing,
    )


@torch.no_grad()
def _routing_use(log: RoutingLog, number: int) -> RoutingUse:
    tokens_LE: list[list[int]] = log.tokens_BLE[number].tolist()
    return RoutingUse(tuple(map(tuple, tokens_LE)), tuple(log.mean_entropy_BL[number].tolist()))
