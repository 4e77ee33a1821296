"""The rewards `answer_format` and `language`, and the monitor of length bias."""

import logging
from random import Random

import pytest

from cispo.rewards.answer_format import answer_format
from cispo.rewards.language import language
from cispo.rewards.length_bias import LengthBias

THOUGHT = r"<think>so</think> \boxed{1}"


@pytest.mark.parametrize(
    ("completion", "thinking", "answer", "value"),
    [
        (THOUGHT, True, True, 1.0),
        (r"\boxed{1}", True, True, 0.0),
        (r"\boxed{1}", False, True, 1.0),
        ("<think>so</think> one", True, False, 1.0),
        ("<think>so</think> one", True, True, 0.0),
        ("<think> </think> one", True, False, 0.0),
        (r"<think>\boxed{1}</think>", True, False, 0.0),
        (r"<think>so \boxed{1}", False, True, 0.0),
        (r"<think>a</think><think>b</think>\boxed{1}", True, True, 0.0),
        ("", False, False, 0.0),
    ],
)
def test_answer_format(completion: str, thinking: bool, answer: bool, value: float) -> None:
    assert answer_format("", completion, is_truncated=False, thinking=thinking, answer=answer) == value
    assert answer_format("", completion, is_truncated=True, thinking=thinking, answer=answer) == 0.0


@pytest.mark.parametrize(
    ("completion", "equations"),
    [
        ("Answer: 62", 0),
        ("23 + 45 = 68\n68 - 6 = 62\nAnswer: 62", 2),
        ("23+45=68, then 68 - 6 = 61. Answer: 61", 2),
        ("23 + 45 = 68\n23 +  45 = 68\nAnswer: 68", 1),
        ("Answer: 62 since 23 + 45 = 68 and 68 - 6 = 62", 0),
        ("23 + 45 - 6 = 62. Answer: 62", 1),
        ("a + b = c\nAnswer: 62", 0),
    ],
)
def test_answer_format_counts_different_worked_steps_before_the_answer(completion: str, equations: int) -> None:
    for asked in range(4):
        value = answer_format("", completion, is_truncated=False, marker="Answer:", equations=asked)
        assert value == float(asked <= equations)


def test_answer_format_with_a_marker_of_ones_own() -> None:
    for completion, value in (("Answer: 7", 1.0), ("the answer is 7", 0.0), (r"\boxed{7}", 0.0)):
        assert answer_format("", completion, is_truncated=False, marker="Answer:") == value


@pytest.mark.parametrize(
    ("completion", "script", "value"),
    [
        ("Let x be the number of apples.", "latin", 1.0),
        ("Let x be 数字", "latin", 0.6),
        ("数字", "chinese", 1.0),
        ("ひらがなと漢字", "japanese", 1.0),
        ("привет мир", "cyrillic", 1.0),
        ("привет world", "cyrillic", 0.5),
        ("한국어", "korean", 1.0),
        ("", "latin", 1.0),
        ("12 + 3", "latin", 1.0),
        (r"число \frac{1}{2}", "cyrillic", 1.0),
        ("```python\nprint('hello')\n```\n мир", "cyrillic", 1.0),
        ("the angle θ", "latin", 1.0),
        ("naïve café", "latin", 1.0),
    ],
)
def test_language(completion: str, script: str, value: float) -> None:
    assert language("", completion, script=script) == pytest.approx(value)  # type: ignore[arg-type]


def biased(slope: float, seed: int = 0, groups: int = 60) -> LengthBias:
    """Hard prompts have long answers and low scores; within a prompt the score follows the length by `slope`."""
    rng = Random(seed)
    bias = LengthBias("judge")
    for hardness in range(groups):
        lengths = [100 * hardness + rng.gauss(0, 50) for _ in range(8)]
        bias.add(("p", x, -hardness + slope * (x - 100 * hardness) / 50 + rng.gauss(0, 1)) for x in lengths)
    return bias


def test_a_grader_that_likes_length_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cispo.rewards"):
        found = biased(1.0).correlation
    assert found is not None and found > 0.5
    assert "favours longer completions" in caplog.text and 1 <= len(caplog.records) <= 2


def test_hard_prompts_are_no_bias(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cispo.rewards"):
        found = biased(0.0).correlation
    assert found is not None and abs(found) < 0.2 and not caplog.records


def test_unequal_correctness_is_no_bias() -> None:
    bias = LengthBias("judge")
    bias.add([(1.0, 10, 1.0), (1.0, 12, 1.0), (0.0, 100, 0.0), (0.0, 110, 0.0)])
    assert bias.correlation is None
