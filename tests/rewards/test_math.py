"""The reward `math`: a hand-verified set of pairs, the statuses, and a pool that nothing brings down."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.errors import RewardError
from cispo.rewards.math_extract import extract_answer
from cispo.rewards.math_pool import MathPool
from cispo.rewards.math_reward import MathStatus, is_equal, math_reward
from cispo.types import ScoreStatus

HUGE = "10^{10^{10}}"
PAIRS = Path(__file__).with_name("math_pairs.txt")


def all_pairs() -> list[tuple[str, str, bool]]:
    """Gold, prediction, and whether they are equal."""
    lines = [line.split("  ~  ") for line in PAIRS.read_text(encoding="utf-8").splitlines() if line[:2] != "# "]
    return [(gold, prediction, sign == "=") for gold, prediction, sign in lines]


@pytest.fixture(scope="module")
def pool() -> Iterator[MathPool]:
    pool = MathPool(1)
    pool.compare("1", "2")
    yield pool
    pool.close()


def test_hand_verified_pairs(pool: MathPool) -> None:
    pairs = all_pairs()
    assert len(pairs) >= 300 and len(set(pairs)) == len(pairs)
    wrong, slow = [], []
    for gold, prediction, is_right in pairs:
        verdict = is_equal(gold, prediction, pool=pool)
        assert verdict.status is MathStatus.OK or not verdict.equal
        assert not verdict.equal or is_right, f"false positive: {gold} and {prediction}"
        wrong += [(gold, prediction)] if verdict.equal != is_right else []
        slow += [(gold, prediction)] if verdict.status is MathStatus.TIMEOUT else []
    assert len(wrong) <= 0.03 * len(pairs), wrong
    assert not slow


def test_equality_has_no_direction(pool: MathPool) -> None:
    for gold, prediction, _ in all_pairs():
        if "boxed" in gold + prediction or "#" in gold + prediction:
            continue
        there, back = is_equal(gold, prediction, pool=pool), is_equal(prediction, gold, pool=pool)
        if there.status is back.status is MathStatus.OK:
            assert there.equal == back.equal, (gold, prediction)


@pytest.mark.parametrize(
    ("gold", "prediction", "status", "method"),
    [
        ("1/2", "0.5", MathStatus.OK, "exact"),
        (r"\sqrt8", r"2\sqrt2", MathStatus.OK, "symbolic"),
        ("x^2", "x^{2}", MathStatus.OK, "exact"),
        ("5", "5.", MathStatus.OK, "text"),
        ("1/2x", "1/2x", MathStatus.OK, "text"),
        ("1/2x", "3", MathStatus.UNPARSED_GOLD, ""),
        ("", "3", MathStatus.UNPARSED_GOLD, ""),
        ("nan", "nan", MathStatus.UNPARSED_GOLD, ""),
        (HUGE, "3", MathStatus.UNPARSED_GOLD, ""),
        ("3", HUGE, MathStatus.UNPARSED_PREDICTION, ""),
        ("3", "?", MathStatus.UNPARSED_PREDICTION, ""),
        ("3", "3" * 3000, MathStatus.UNPARSED_PREDICTION, ""),
        ("3", "\x00", MathStatus.UNPARSED_PREDICTION, ""),
    ],
)
def test_statuses(pool: MathPool, gold: str, prediction: str, status: MathStatus, method: str) -> None:
    verdict = is_equal(gold, prediction, pool=pool)
    assert (verdict.status, verdict.method) == (status, method)
    assert bool(verdict.message) == (status is not MathStatus.OK)


FACTORIALS = [f"{5000 - place}!" for place in range(100)]
COSTLY = {
    "a sum of factorials": ("1", "x+" + "+".join(FACTORIALS)),
    "a set of factorials": (r"\{1,2\}", r"\{" + ",".join(FACTORIALS) + r"\}"),
    "an irrational root of a large number": ("1", r"\sqrt[3]{3^{49000}+1}"),
    "roots of a large number": ("1", "+".join(rf"\sqrt[{degree}]{{3^{{49000}}}}" for degree in range(40, 65))),
    "white space without an answer": ("1", "the answer is" + "\n" * 50_000),
}


@pytest.mark.parametrize("name", COSTLY)
def test_no_answer_takes_long_outside_of_the_pool(name: str) -> None:
    """Here nothing can stop a comparison, and a reward's time-out would mask the sample."""
    started = time.process_time()
    verdict = is_equal(*COSTLY[name], pool=DeadPool({"equal": ""}))
    assert not verdict.equal and time.process_time() - started < 2.0


def test_the_pool_survives_what_the_filters_would_refuse(pool: MathPool) -> None:
    for _ in range(2):
        assert "limit" in pool.compare(rf"\sqrt{{2}}\cdot{HUGE}", "1")
        assert pool.compare(r"\sqrt{8}", r"2\sqrt{2}") == {"equal": True}


def test_a_worker_that_is_killed_is_replaced(pool: MathPool) -> None:
    pool.compare("1", "2")
    (before,) = pool.process_ids()
    os.kill(before, signal.SIGKILL)
    assert pool.compare(r"\sqrt{8}", r"2\sqrt{2}") == {"equal": True}
    assert pool.process_ids() != [before] and not Path(f"/proc/{before}").exists()


def test_a_pool_that_is_closed_leaves_no_process() -> None:
    pool = MathPool(2)
    threads = [threading.Thread(target=pool.compare, args=(r"\sqrt{2}", "1")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = pool.process_ids()
    pool.close()
    assert 1 <= len(ids) <= 2 and not [found for found in ids if Path(f"/proc/{found}").exists()]


class DeadPool(MathPool):
    def __init__(self, reply: dict[str, str]) -> None:
        self.reply = reply

    def compare(self, gold: str, found: str | None) -> dict[str, str]:
        return {"equal": "yes"} if found is None and "limit" in self.reply else self.reply


def test_a_limit_is_the_predictions_and_a_failure_is_an_error() -> None:
    limit = is_equal(r"\sqrt2", "1.4", pool=DeadPool({"limit": "slow"}))
    assert (limit.equal, limit.status) == (False, MathStatus.TIMEOUT)
    error = is_equal(r"\sqrt2", "1.4", pool=DeadPool({"error": "broken"}))
    assert (error.equal, error.status, error.message) == (False, MathStatus.ERROR, "broken")


@pytest.mark.parametrize(
    ("completion", "value", "parsed"),
    [(r"\boxed{0.5}", 1.0, 1.0), (r"\boxed{2}", 0.0, 1.0), ("no answer", 0.0, 0.0), (r"\boxed{?}", 0.0, 0.0)],
)
def test_the_reward(completion: str, value: float, parsed: float) -> None:
    score = math_reward("", completion, answer=r"\frac{1}{2}")
    assert (score.value, score.status) == (value, ScoreStatus.OK)
    assert score.parts == {"correct": value, "parsed": parsed}


def test_an_answer_of_the_data_set_that_cannot_be_read_masks_the_sample() -> None:
    for completion in (r"\boxed{1}", "no answer"):
        score = math_reward("", completion, answer="%%")
        assert score.status is ScoreStatus.ERROR and "unparsed_gold" in score.message and "\n" not in score.message


@pytest.mark.parametrize("answer", [None, True, "", "  ", ["1"]])
def test_an_answer_of_another_kind_is_a_mistake(answer: object) -> None:
    with pytest.raises(RewardError, match="the column answer"):
        math_reward("", r"\boxed{1}", answer=answer)


@pytest.mark.parametrize(
    ("completion", "value"), [("156", 1.0), ("156.0", 1.0), ("312/2", 1.0), ("12*13", 0.0), ("100+56", 0.0)]
)
def test_plain_numbers_must_be_worked_out(completion: str, value: float) -> None:
    assert math_reward("", rf"\boxed{{{completion}}}", answer=156, plain_numbers=True).value == value
    assert math_reward("", rf"\boxed{{{completion}}}", answer=156).value == 1.0


@pytest.mark.parametrize(
    ("answer", "found", "value"),
    [
        (r"50\%", "50", 1.0),
        ("50", r"50\%", 1.0),
        ("50", "50 percent.", 1.0),
        (r"50\%", "5", 0.0),
        (r"50\%", "0.5", 1.0),
    ],
)
def test_a_percent_sign_may_be_optional(answer: str, found: str, value: float) -> None:
    assert math_reward("", rf"\boxed{{{found}}}", answer=answer, optional_percent=True).value == value
    assert math_reward("", rf"\boxed{{{found}}}", answer=answer).value == float(found == "0.5")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed 5", "5"),
        (r"\boxed{1", None),
        (r"\boxed{\boxed{3}}", "3"),
        (r"{ } } \boxed{1} {", "1"),
        (r"\{\boxed{2}\}", "2"),
        (r"\boxed{" * 50_000, None),
        (r"\boxed{4}" + "{" * 50_000, "4"),
        (". A" * 50_000 + r"\boxed{5}", "5"),
        (r"\boxed{}", None),
        ("x\n#### 12\n", "12"),
        ("The answer is 3. Well done.", "3"),
        ("Answer: 2.5", "2.5"),
        ("the answer is 1\nthe answer is 2", "2"),
        ("the answer is\n\n 3 \nthe answer is \n", "3"),
        ("<think>the answer is 4</think>", None),
        ("4", None),
    ],
)
def test_the_final_answer(completion: str, answer: str | None) -> None:
    assert extract_answer(completion) == answer


@given(st.text(alphabet=r"0123456789xye+-*/^_(){}[]|<>=,.\ !%&frac", max_size=40))
def test_no_text_breaks_the_reader(text: str) -> None:
    verdict = is_equal("17/19", text, pool=DeadPool({"equal": ""}))
    assert not verdict.equal or verdict.status is MathStatus.OK


@given(st.fractions(max_denominator=10**6))
def test_numbers_equal_themselves_alone(value: object) -> None:
    assert is_equal(str(value), f"\\boxed{{{value}}}").equal
    assert not is_equal(str(value), f"{value}+1/10^{{30}}").equal


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("3 + 4 = 7\nAnswer: 7", "7"),
        ("Answer: 5\nno, Answer: **7**.", "7"),
        ("Answer: 7\nor 8", "7"),
        ("the answer is 7", None),
        (r"\boxed{7}", None),
        (r"\boxed{8} Answer: 7", "7"),
        ("answer: 7", None),
        ("Answer:", None),
        ("Answer:\n7", None),
        ("<think>Answer: 7</think>", None),
    ],
)
def test_an_answer_after_a_marker_of_ones_own(completion: str, answer: str | None) -> None:
    assert extract_answer(completion, "Answer:") == answer
    assert math_reward("", completion, answer=7, marker="Answer:").value == float(answer == "7")
