"""From a recipe to a request: what the settings under `rollout` ask of the engine for one prompt."""

from dataclasses import replace

from cispo.errors import RecipeError
from cispo.model.tokenizer import Tokenizer
from cispo.recipe.rollout_schema import RolloutSettings
from cispo.rollout.request import Drawing, GroupRequest, Repetition, Stops, ThinkingBudget
from cispo.types import Prompt


def group_request(
    prompt: Prompt,
    rollout: RolloutSettings,
    *,
    group_size: int,
    temperature: float,
    stream: str,
    max_new_tokens: int | None = None,
) -> GroupRequest:
    """A group of one prompt, drawn from the whole distribution and ended by the recipe's stops.

    group_size, temperature: of training or of an evaluation; stream: separates the noise of passes over one prompt.
    max_new_tokens: of a window below the engine's own limit.
    """
    stops = replace(rollout_stops(rollout), max_new_tokens=max_new_tokens)
    return GroupRequest(prompt, group_size, Drawing(temperature), stream, stops)


def rollout_stops(rollout: RolloutSettings) -> Stops:
    """What ends and interrupts completions by the recipe; their length is the engine's limit."""
    thinking, repetition = rollout.thinking, rollout.repetition
    return Stops(
        strings=rollout.stop_strings,
        thinking=None if thinking is None else ThinkingBudget(thinking.tokens, thinking.end, thinking.interruption),
        repetition=None if repetition is None else Repetition(repetition.tokens, repetition.probability),
    )


def refuse_no_room_for_answers(rollout: RolloutSettings, tokenizer: Tokenizer) -> None:
    """RecipeError where a spent budget of thinking and the tokens that interrupt it leave none for an answer.

    Only the policy's tokenizer can tell, so the schema cannot.
    """
    if rollout.thinking is None:
        return
    forced, (name, limit) = len(tokenizer.encode(rollout.thinking.interruption)), rollout.first_limit
    if rollout.thinking.tokens + forced >= limit:
        raise RecipeError(
            f"rollout.thinking.tokens is {rollout.thinking.tokens}, and the interruption has {forced} tokens: nothing "
            f"of rollout.{name} {limit} is left for an answer; lower the former or raise the latter"
        )
