"""The test of the example plugin: `pytest recipes/plugins`. A reward is a plain function, and so is its test."""

from pathlib import Path

from cispo.rewards.resolve import resolve_reward

brevity = resolve_reward("brevity.py:brevity", base_path=Path(__file__).parent)


def test_short_programs_are_favoured() -> None:
    assert brevity("", "```python\nx = 1\n```", most_lines=4) == 0.75
    assert brevity("", "```python\n```") == 1.0


def test_long_and_truncated_ones_get_nothing() -> None:
    assert brevity("", "a\nb\nc\nd\ne", most_lines=4) == 0.0
    assert brevity("", "a", is_truncated=True) == 0.0
