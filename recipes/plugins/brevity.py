"""An example of a reward of your own: it favours short programs. Name it in a recipe, by its path from the recipe, as

    rewards:
      - name: code
      - name: plugins/brevity.py:brevity
        weight: 0.1
        args: {most_lines: 20}

A reward gets the prompt and the completion, and by name the columns of the data set and the args that it asks for.
"""

from cispo.rewards.extract import extract_code


def brevity(prompt: str, completion: str, *, most_lines: int = 12, is_truncated: bool = False) -> float:
    """From 1.0 for an empty program down to 0.0 at `most_lines` lines that are not blank, or more."""
    if is_truncated:
        return 0.0
    lines = [line for line in extract_code(completion).splitlines() if line.strip()]
    return max(0.0, 1.0 - len(lines) / most_lines)
