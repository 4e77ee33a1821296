"""The rollout engine: prompts go in, groups of completions come out."""
