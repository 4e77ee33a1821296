"""What `Policy.generate` hands out: answers, their pieces, what they took, and what could not be answered."""

from collections.abc import Sequence
from dataclasses import dataclass

from cispo.errors import CispoError
from cispo.model.tokenizer import Message
from cispo.types import StopReason

PromptLike = str | Sequence[Message] | Sequence[int]
"""A user's message, a conversation of messages with role and content, or token ids that are taken as they are."""


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
    """One completion of one prompt, both counted from 0.

    logprobs: of its tokens, in nats, at the temperature they were sampled at (1 if that was 0), over the whole
    vocabulary, whatever was cut. is_sampled: False for the tokens that interrupted its thinking, which have none (0).
    """

    prompt: PromptLike
    prompt_number: int
    completion_index: int
    text: str
    token_ids: tuple[int, ...]
    is_sampled: tuple[bool, ...]
    logprobs: tuple[float, ...]
    stop_reason: StopReason
    prompt_tokens: int
    routing: RoutingUse | None

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that a completion goes on with; its pieces together are its text. The last one has all of it as well."""

    prompt_number: int
    completion_index: int
    text: str
    generation: Generation | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What was computed. prompt_tokens: of every prompt once; forked_prompt_tokens: those that further completions of a
    prompt took over instead of reading them again."""

    prompt_tokens: int
    forked_prompt_tokens: int
    completion_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens a second, reading of the prompts included."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


class Generations(list[Generation]):
    """Answers, prompt by prompt, with what they took."""

    def __init__(self, generations: Sequence[Generation], usage: Usage) -> None:
        super().__init__(generations)
        self.usage = usage


@dataclass(frozen=True, slots=True)
class Failure:
    """A prompt that could not be answered, and why; the others were."""

    prompt_number: int
    message: str


class GenerationError(CispoError, ValueError):
    """What was asked of `Policy.generate` cannot be done; says what to ask instead.

    Where some of the prompts could be answered, it comes last: `generations` holds their answers, and `failures` says
    what of the others could not be done.
    """

    def __init__(
        self, message: str, *, failures: Sequence[Failure] = (), generations: Sequence[Generation] = ()
    ) -> None:
        super().__init__(message)
        self.failures, self.generations = tuple(failures), tuple(generations)
