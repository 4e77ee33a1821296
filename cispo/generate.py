"""A policy for people: load a folder and let it answer, on the engine that rollouts are sampled with.

    from cispo import load_policy
    policy = load_policy("bundled:tiny")
    for generation in policy.generate(["Write a function ..."], max_new_tokens=64, temperature=0.0):
        print(generation.text, generation.stop_reason, generation.completion_tokens)
    for piece in policy.generate("Write a function ...", stream=True):
        print(piece.text, end="", flush=True)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Literal, TypedDict, Unpack, cast, overload

from cispo.devices import resolve_device, resolve_dtype
from cispo.errors import CheckpointError
from cispo.generation import (
    Failure,
    Generation,
    GenerationError,
    Generations,
    Piece,
    PromptLike,
    RoutingUse,
    Usage,
)
from cispo.generation_stream import GenerationStream
from cispo.model.cache import PAGE_LENGTH
from cispo.model.checkpoint import load_policy as load_decoder
from cispo.model.decoder import Decoder
from cispo.model.routing import RoutingLog
from cispo.model.tokenizer import Message, Tokenizer
from cispo.resources import resolve_policy
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest, Repetition, RequestError, Stops, ThinkingBudget
from cispo.types import Prompt

__all__ = [
    "Failure",
    "Generation",
    "GenerationError",
    "GenerationOptions",
    "GenerationStream",
    "Generations",
    "Piece",
    "Policy",
    "PromptLike",
    "Repetition",
    "RoutingUse",
    "ThinkingBudget",
    "Usage",
]


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments of `Policy.generate` but `stream`, with their defaults in brackets."""

    max_new_tokens: int
    """The most tokens of a completion (256)."""
    temperature: float
    """Divides the logits; 0 takes the likeliest token each time (1)."""
    top_p: float
    """The fewest of the likeliest tokens that reach this probability are drawn from; 1 is all (1)."""
    top_k: int
    """So many of the likeliest tokens are drawn from; 0 is all (0)."""
    min_p: float
    """Tokens of at least this share of the likeliest token's probability are drawn from; 0 is all (0)."""
    stop: str | int | Sequence[str | int]
    """Text that ends a completion and is cut off with what follows it, or the id of a token that ends it (none)."""
    thinking_budget: int | ThinkingBudget | None
    """Tokens after which thinking that has not ended is interrupted; with other texts as ThinkingBudget (None)."""
    repetition: Repetition | None
    """Ends a completion that goes round in circles; `Repetition()` is MiniMax-M1's rule (None)."""
    expert_threshold: float
    """In [0, 1): of a token's experts those with less of the gate weight are dropped, the rest renormalised (0)."""
    log_routing: bool
    """Say where tokens went (False)."""
    seed: int
    """The same seed gives the same answers, whatever else is asked beside (0)."""
    completions: int
    """Completions of each prompt (1)."""
    max_concurrent_completions: int
    """Decoded at a time; bounds memory and changes no answer (64)."""


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

    @overload
    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerationOptions],
    ) -> Generations: ...

    @overload
    def generate(
        self, prompts: PromptLike | Sequence[PromptLike], *, stream: Literal[True], **options: Unpack[GenerationOptions]
    ) -> GenerationStream: ...

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        stream: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> Generations | GenerationStream:
        """Answers, prompt by prompt; a prompt is text, a list of messages, or token ids.

        Text and messages (with role and content) go through the policy's chat template, token ids are taken as they
        are. stream: an iterator of pieces of text as they come, in place of the list. GenerationError for options that
        cannot be; and, once all others have been answered, for the prompts that could not.
        """
        asked = _prompt_list(prompts)
        pieces = self._start(asked, _Options(**options))
        if stream:
            return pieces
        for _ in pieces:
            pass
        return Generations(pieces.generations, pieces.usage)

    def _start(self, prompts: Sequence[PromptLike], options: "_Options") -> GenerationStream:
        drawing, stops = self._rules(options)
        if options.seed < 0:
            raise GenerationError(f"seed is {options.seed}; it must be at least 0")
        requests, failures = [], []
        for number, prompt in enumerate(prompts):
            try:
                ids = self._prompt_ids(prompt, f"prompt {number}", options.max_new_tokens)
            except (GenerationError, CheckpointError) as error:
                failures.append(Failure(number, str(error)))
                continue
            # Noise is by id, so equal prompts of one call need ids of their own to be answered differently.
            asked = Prompt(id=str(number), text=prompt if isinstance(prompt, str) else "")
            requests.append(
                GroupRequest(
                    asked,
                    options.completions,
                    drawing,
                    stops=stops,
                    prompt_ids=ids,
                    expert_threshold=options.expert_threshold,
                    log_sequence=number,
                )
            )
        log = None
        if options.log_routing and requests:
            log = RoutingLog(self.decoder.config, len(prompts), self.decoder.head_weight.device)
        engine = self._engine([len(r.prompt_ids or ()) for r in requests], options, log) if requests else None
        return GenerationStream(engine, prompts, requests, failures, log)

    def _rules(self, options: "_Options") -> tuple[Drawing, Stops]:
        """How tokens are drawn and what ends completions; GenerationError for what cannot be, for any prompt."""
        for name in ("max_new_tokens", "completions", "max_concurrent_completions"):
            if getattr(options, name) < 1:
                raise GenerationError(f"{name} is {getattr(options, name)}; it must be at least 1")
        if (options.expert_threshold or options.log_routing) and not self.decoder.config.routed_layers:
            raise GenerationError("this policy has no router; leave out expert_threshold and log_routing")
        drawing = Drawing(options.temperature, options.top_p, options.top_k, options.min_p)
        stops = options.stops
        try:
            drawing.check(self.decoder.trained_ids)
            stops.check(options.max_new_tokens, self.decoder.trained_ids)
        except RequestError as error:
            raise GenerationError(str(error)) from error
        return drawing, stops

    def _engine(self, prompt_tokens: Sequence[int], options: "_Options", log: RoutingLog | None) -> Engine:
        """An engine with room for the longest of these prompts, and no more pages than all of them can take."""
        completions = len(prompt_tokens) * options.completions
        slots = max(options.completions, min(options.max_concurrent_completions, completions))
        pages = sorted((-(-(tokens + options.max_new_tokens) // PAGE_LENGTH) for tokens in prompt_tokens), reverse=True)
        return Engine(
            self.decoder,
            self.tokenizer,
            SamplingSettings(max_completion_tokens=options.max_new_tokens, seed=options.seed),
            max_concurrent_completions=slots,
            max_prompt_tokens=max(prompt_tokens),
            cache_pages=sum([count for count in pages for _ in range(options.completions)][:slots]),
            routing_log=log,
        )

    def _prompt_ids(self, prompt: PromptLike, name: str, max_new_tokens: int) -> list[int]:
        """The token ids of a prompt; GenerationError or CheckpointError, which name it, where there are none."""
        ids = _ids_of(self.tokenizer, prompt, name)
        known = self.decoder.config.vocabulary_size
        strange = [token for token in ids if not 0 <= token < known]
        if strange:
            raise GenerationError(f"{name}: token id {strange[0]} is none of the policy's {known}")
        context = self.decoder.config.max_positions
        if len(ids) + max_new_tokens > context:
            raise GenerationError(
                f"{name} has {len(ids)} tokens, which with {max_new_tokens} new ones are more than the policy's "
                f"context of {context}; shorten it or lower max_new_tokens"
            )
        return ids


@dataclass(frozen=True, slots=True)
class _Options:
    """GenerationOptions with their defaults."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: str | int | Sequence[str | int] = ()
    thinking_budget: int | ThinkingBudget | None = None
    repetition: Repetition | None = None
    expert_threshold: float = 0.0
    log_routing: bool = False
    seed: int = 0
    completions: int = 1
    max_concurrent_completions: int = 64

    @property
    def stops(self) -> Stops:
        thinking = self.thinking_budget
        stop = [self.stop] if isinstance(self.stop, str | int) else self.stop
        return Stops(
            max_new_tokens=self.max_new_tokens,
            strings=tuple(one for one in stop if isinstance(one, str)),
            token_ids=tuple(one for one in stop if isinstance(one, int)),
            thinking=ThinkingBudget(thinking) if isinstance(thinking, int) else thinking,
            repetition=self.repetition,
        )


def _prompt_list(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """What was given as a list: numbers are the ids of one prompt, and messages are one conversation."""
    if isinstance(prompts, str):
        return [prompts]
    given = list(prompts)
    if given and isinstance(given[0], Integral | Mapping):
        return [cast(PromptLike, given)]
    return cast(list[PromptLike], given)


def _ids_of(tokenizer: Tokenizer, prompt: PromptLike, name: str) -> list[int]:
    if not len(prompt) or (isinstance(prompt, str) and not prompt.strip()):
        raise GenerationError(f"{name} is empty; give it some text")
    if isinstance(prompt, str):
        return tokenizer.render_prompt(prompt)
    if not isinstance(prompt[0], Mapping):
        return [int(token) for token in cast(Sequence[int], prompt)]
    messages = cast(Sequence[Message], prompt)
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise GenerationError(f"{name} has a message without role or content: {message}; give each both")
    try:
        return tokenizer.encode(tokenizer.render_messages(messages))
    except CheckpointError as error:
        raise GenerationError(f"{name}: {error}") from error
