"""What can be asked of the engine: a prompt, how its tokens are drawn, and when its completions end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from cispo.errors import CispoError
from cispo.types import Prompt


class RequestError(CispoError, ValueError):
    """A request that can never be served; says what of it, and what to ask instead. Nothing else is touched."""


def refuse_strange(name: str, ids: Sequence[int], vocabulary: int) -> None:
    """RequestError for an id that the policy does not have."""
    strange = [token for token in ids if not 0 <= token < vocabulary]
    if strange:
        raise RequestError(f"{name} holds {strange[0]}; the policy's token ids go from 0 to {vocabulary - 1}")


@dataclass(frozen=True, slots=True)
class Drawing:
    """How each token is drawn.

    temperature: divides the logits; 0 takes the likeliest token. top_p, top_k, min_p: what of the distribution is left,
    as in `cispo.rollout.filters`; 1, 0 and 0 leave all. allowed_ids: only these tokens; None is all. banned_ids: never
    these. Logprobs are of the whole distribution at the temperature (at 1 where that is 0), whatever was cut.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    allowed_ids: tuple[int, ...] | None = None
    banned_ids: tuple[int, ...] = ()

    @property
    def has_cut(self) -> bool:
        return self != Drawing(temperature=self.temperature)

    @property
    def _is_temperature_right(self) -> bool:
        """Logits divided by less than this may be infinite in float32."""
        return self.temperature == 0 or 1e-4 <= self.temperature < math.inf

    def check(self, vocabulary: int) -> None:
        """RequestError for what has no meaning with so many tokens."""
        ranges = (
            ("temperature", self.temperature, self._is_temperature_right, "0 (greedy) or at least 0.0001"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 is off)"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1) (0 is off)"),
        )
        for name, value, is_right, wanted in ranges:
            if not is_right:
                raise RequestError(f"{name} is {value:g}; it must be {wanted}")
        refuse_strange("allowed_ids", self.allowed_ids or (), vocabulary)
        refuse_strange("banned_ids", self.banned_ids, vocabulary)
        banned = set(self.banned_ids)
        if len(banned) == vocabulary or (self.allowed_ids is not None and not set(self.allowed_ids) - banned):
            raise RequestError("allowed_ids and banned_ids leave no token; allow at least one")


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """Where a completion has not ended its thinking after so many tokens, `interruption` is put in and it goes on.

    The tokens put in are not the policy's and carry no loss. MiniMax-M1 was trained with budgets of 40K and 80K; the
    text is that of ScaleRL (arXiv 2510.13786).
    """

    tokens: int
    end: str = "</think>"
    interruption: str = "Okay, time is up. Let me stop thinking and formulate a final answer now.</think>"


@dataclass(frozen=True, slots=True)
class Repetition:
    """Ends a completion after `tokens` tokens in a row of probability above `probability` (M1 report, section 4.2)."""

    tokens: int = 3000
    probability: float = 0.99


@dataclass(frozen=True, slots=True)
class Stops:
    """What ends a completion besides the policy's end-of-sequence token.

    max_new_tokens: tokens after the prompt, those put in included; None is the engine's limit, which is the most there
    can be. strings: the completion ends where its text holds one of them, and the text is cut before it. token_ids: as
    the end-of-sequence token.
    """

    max_new_tokens: int | None = None
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    thinking: ThinkingBudget | None = None
    repetition: Repetition | None = None

    def check(self, limit: int, vocabulary: int) -> None:
        """RequestError for stops that can never come, or come at once; limit: tokens that the engine has room for."""
        tokens = limit if self.max_new_tokens is None else self.max_new_tokens
        if not 1 <= tokens <= limit:
            raise RequestError(
                f"max_new_tokens is {tokens}; it must be from 1 to {limit}, which this engine has room for"
            )
        if "" in self.strings:
            raise RequestError("stop holds an empty string, which every text contains; leave it out")
        refuse_strange("stop token_ids", self.token_ids, vocabulary)
        if self.thinking is not None and self.thinking.tokens < 1:
            raise RequestError(f"thinking_budget is {self.thinking.tokens}; it must be at least 1")
        if self.thinking is not None and not (self.thinking.end and self.thinking.interruption):
            raise RequestError("the end and the interruption of a thinking_budget must be texts that are not empty")
        if self.repetition is not None and not (self.repetition.tokens >= 1 and 0 < self.repetition.probability < 1):
            raise RequestError(f"{self.repetition}: tokens must be at least 1 and the probability between 0 and 1")


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """A prompt to sample group_size completions of.

    stream: separates the noise of passes over the same prompt. priority: higher goes first. is_open: a completion that
    ends its turn (by end-of-sequence, stop token or stop string) waits for `Engine.extend` or `Engine.close_turn`.
    prompt_ids: the prompt as token ids, where it is not the prompt's text in the chat template. expert_threshold: in
    [0, 1), a token's experts with less of the gate weight are dropped (see `RoutingControl`). log_sequence: the number
    of this group in the engine's routing log.
    """

    prompt: Prompt
    group_size: int
    drawing: Drawing = field(default_factory=Drawing)
    stream: str = ""
    stops: Stops = field(default_factory=Stops)
    priority: int = 0
    is_open: bool = False
    prompt_ids: Sequence[int] | None = None
    expert_threshold: float = 0.0
    log_sequence: int = 0
