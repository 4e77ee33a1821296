"""From a recipe to a request: what the settings under `rollout` ask of the engine for one prompt."""

from cispo.recipe.schema import RolloutSettings
from cispo.rollout.request import Drawing, GroupRequest
from cispo.types import Prompt


def group_request(
    prompt: Prompt, rollout: RolloutSettings, *, group_size: int, temperature: float, stream: str
) -> GroupRequest:
    """A group of one prompt, drawn from the whole distribution.

    group_size, temperature: of training or of an evaluation. stream: separates the noise of passes over the prompt.
    """
    return GroupRequest(prompt, group_size, Drawing(temperature), stream)
