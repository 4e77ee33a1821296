"""What a run needs and only reading it can tell, found before any actor starts.

The recipe's own checks (cispo.recipe.check) look at names and first rows, so that a dry run is instant; here every
prompt is rendered, the weights' headers are compared with config.json, and the machine is asked for device and sandbox.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cispo.devices import resolve_device
from cispo.errors import CheckpointError, DataError
from cispo.evaluation import HeldoutSet
from cispo.kernels.cpu_library import prepare
from cispo.model.checkpoint import check_weights, read_config
from cispo.model.tokenizer import Tokenizer
from cispo.recipe.schema import TrainRecipe
from cispo.rewards.loaded import load_rewards
from cispo.rollout.recipe_request import refuse_no_room_for_answers
from cispo.sandboxes.backends import check_backend
from cispo.types import Prompt


def check_start(
    recipe: TrainRecipe, policy_path: Path, prompts: Sequence[Prompt] | None, heldout: Sequence[HeldoutSet]
) -> None:
    """Raise the CispoError that an actor would meet later. prompts: those trained on, None for an evaluation alone."""
    check_weights(policy_path)
    tokenizer = Tokenizer.load(policy_path)
    tokens, known = tokenizer.vocabulary_size, read_config(policy_path).vocabulary_size
    if tokens > known:
        raise CheckpointError(
            f"the tokenizer of {policy_path} has {tokens} tokens, but vocab_size in its config.json is {known}; "
            "use the policy's own tokenizer"
        )
    needed = recipe.rollout.prompts_per_step
    if prompts is not None and len(prompts) < needed:
        raise DataError(f"data.path has {len(prompts)} prompts, rollout.prompts_per_step is {needed}; lower the latter")
    refuse_no_room_for_answers(recipe.rollout, tokenizer)
    measured = [prompt for each in heldout for prompt in each.prompts]
    _refuse_long_prompts(tokenizer, (*(prompts or ()), *measured), recipe.rollout.max_prompt_tokens)
    if recipe.ray.address is None:
        # The actors will run on this machine; of another cluster's machines nothing can be told from here.
        device = resolve_device(recipe.policy.device)
        if device.type == "cpu" and recipe.policy.dtype == "float32":
            prepare()
        if any(reward.needs_sandbox for reward in load_rewards(recipe.rewards, recipe.base_path)):
            check_backend(recipe.sandbox.backend)


def _refuse_long_prompts(tokenizer: Tokenizer, prompts: Iterable[Prompt], limit: int) -> None:
    for prompt in prompts:
        length = len(tokenizer.render_prompt(prompt.text, prompt.earlier))
        if length > limit:
            raise DataError(
                f"prompt {prompt.id} has {length} tokens, rollout.max_prompt_tokens is {limit}; raise it, "
                "or leave the prompt out"
            )
