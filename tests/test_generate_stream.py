"""Answers in pieces, stops, conversations, usage, and prompts that cannot be answered beside others that can."""

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import cispo
from cispo.generate import Generation, GenerationError, GenerationStream, Policy, Repetition, ThinkingBudget
from cispo.generation_stream import held_characters
from cispo.types import StopReason

PROMPTS = ["a", "what is 3 + 4?", "x" * 70]


@pytest.fixture(scope="module")
def policy(small_policy_folder: Path) -> Policy:
    return cispo.load_policy(small_policy_folder, device="cpu")


@pytest.fixture(scope="module")
def tiny() -> Policy:
    return cispo.load_policy("bundled:tiny", device="cpu")


def assert_pieces_make_the_answers(stream: GenerationStream) -> list[Generation]:
    """What the stream's last pieces carry, each equal to the pieces before it."""
    texts: dict[tuple[int, int], str] = defaultdict(str)
    ended: dict[tuple[int, int], Generation] = {}
    for piece in stream:
        key = piece.prompt_number, piece.completion_index
        assert key not in ended
        texts[key] += piece.text
        if piece.generation is not None:
            ended[key] = piece.generation
            assert texts[key] == piece.generation.text
    assert texts.keys() == ended.keys()
    return [ended[key] for key in sorted(ended)]


def test_pieces_are_the_answers_and_split_no_character(policy: Policy) -> None:
    """Bytes drawn at random: some make characters of several bytes, most make none."""
    options: dict[str, Any] = {"max_new_tokens": 60, "completions": 4, "seed": 2}
    whole = policy.generate(PROMPTS, **options)
    assert any("\x7f" < character < "\ufffd" for generation in whole for character in generation.text)
    streamed = assert_pieces_make_the_answers(policy.generate(PROMPTS, stream=True, **options))
    assert streamed == whole


def test_text_comes_while_it_is_sampled(tiny: Policy) -> None:
    stream = tiny.generate("Write a function f(x) that returns x + 1.", stream=True, temperature=0.0, max_new_tokens=40)
    first = next(stream)
    assert first.generation is None and first.text
    assert stream.usage.completion_tokens <= 3
    assert len(list(stream)) > 5
    assert stream.usage.completion_tokens > 10


@pytest.mark.parametrize("text", ["return", "(x)", "d", "n f", "never in it"])
def test_a_stop_string_cuts_the_text_and_nothing_of_it_is_streamed(tiny: Policy, text: str) -> None:
    """`d` begins a token and `n f` lies across two."""
    options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 40}
    prompt = "Write a function f(x) that returns x + 1."
    plain = tiny.generate(prompt, **options)[0].text
    (stopped,) = assert_pieces_make_the_answers(tiny.generate(prompt, stream=True, stop=["\x00", text], **options))
    before, found, _ = plain.partition(text)
    assert (stopped.stop_reason is StopReason.STOP_STRING) == bool(found)
    assert stopped.text == before
    assert tiny.tokenizer.decode(stopped.token_ids).startswith(before + found)


def test_a_token_that_goes_on_after_a_stop_string_is_cut_where_the_string_begins(tiny: Policy) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 40}
    plain = tiny.generate("Write a function f(x) that returns x + 1.", **options)[0]
    words = [tiny.tokenizer.decode([token]) for token in plain.token_ids]
    place = next(i for i, word in enumerate(words) if len(word) > 3 and word[0] not in "".join(words[:i]))
    (stopped,) = tiny.generate("Write a function f(x) that returns x + 1.", stop=words[place][0], **options)
    assert stopped.text == "".join(words[:place])


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    assert held_characters("abc", ()) == 0
    assert held_characters("abc", ("cab",)) == 1
    assert held_characters("abca", ("cab", "x")) == 2
    assert held_characters("aa", ("aaaa",)) == 2
    assert held_characters("", ("a",)) == 0


def test_a_stop_token_ends_and_a_strange_one_is_refused(policy: Policy) -> None:
    plain = policy.generate("a", max_new_tokens=30)[0]
    token = plain.token_ids[4]
    stopped = policy.generate("a", max_new_tokens=30, stop=token)[0]
    assert stopped.token_ids == plain.token_ids[: plain.token_ids.index(token) + 1]
    assert stopped.stop_reason is StopReason.STOP_TOKEN
    with pytest.raises(GenerationError, match="stop token_ids holds 260; the policy's token ids go from 0 to 259"):
        policy.generate("a", stop=[260])


def test_thinking_is_interrupted_and_the_mask_says_by_which_tokens(policy: Policy) -> None:
    budget = ThinkingBudget(5, interruption="Enough.</think>")
    answers = assert_pieces_make_the_answers(
        policy.generate(PROMPTS, stream=True, max_new_tokens=30, thinking_budget=budget)
    )
    given = policy.tokenizer.encode(budget.interruption)
    interrupted = [answer for answer in answers if len(answer.token_ids) > 5]
    assert interrupted
    for answer in interrupted:
        assert answer.is_sampled == (True,) * 5 + (False,) * len(given) + (True,) * (len(answer.token_ids) - 20)
        assert list(answer.token_ids[5:20]) == given
        assert set(answer.logprobs[5:20]) == {0.0} and all(logprob < 0 for logprob in answer.logprobs[:5])
        assert "Enough.</think>" in answer.text
    with pytest.raises(GenerationError, match="leave no room for an answer in 30 new tokens"):
        policy.generate("a", max_new_tokens=30, thinking_budget=5)


def test_repetition_ends_a_completion_that_is_too_sure(tiny: Policy) -> None:
    prompt, sure = "Write a function f(x) that returns x + 1.", Repetition(tokens=3, probability=0.9)
    plain = tiny.generate(prompt, temperature=0.0, max_new_tokens=40)[0]
    ended = tiny.generate(prompt, temperature=0.0, max_new_tokens=40, repetition=sure)[0]
    assert ended.stop_reason is StopReason.REPETITION
    assert ended.token_ids == plain.token_ids[: len(ended.token_ids)]
    assert min(ended.logprobs[-3:]) > -0.1054


def test_cuts_keep_the_likeliest_and_the_logprob_of_the_whole(policy: Policy) -> None:
    greedy = policy.generate(PROMPTS, max_new_tokens=12, temperature=0.0)
    cuts: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}]
    for cut in cuts:
        cut_answers = policy.generate(PROMPTS, max_new_tokens=12, **cut)
        assert [answer.token_ids for answer in cut_answers] == [answer.token_ids for answer in greedy]
        assert [answer.logprobs for answer in cut_answers] == [answer.logprobs for answer in greedy]


def test_messages_and_token_ids_are_prompts_too(policy: Policy) -> None:
    text = policy.generate("what?", max_new_tokens=12)[0]
    conversation = [{"role": "user", "content": "what?"}]
    ids = policy.tokenizer.render_prompt("what?")
    for one in (policy.generate(conversation, max_new_tokens=12), policy.generate(ids, max_new_tokens=12)):
        assert [answer.token_ids for answer in one] == [text.token_ids]
    longer = [*conversation, {"role": "assistant", "content": "that"}, {"role": "user", "content": "why?"}]
    both = policy.generate([longer, ids, "what?"], max_new_tokens=12)
    assert both[0].prompt == longer
    assert both[0].prompt_tokens == len(policy.tokenizer.encode(policy.tokenizer.render_messages(longer)))
    assert [answer.prompt_number for answer in both] == [0, 1, 2]


def test_usage_counts_what_was_read_and_what_was_forked(policy: Policy) -> None:
    answers = policy.generate(PROMPTS, max_new_tokens=12, completions=3)
    prompt_tokens = sum(answer.prompt_tokens for answer in answers if answer.completion_index == 0)
    usage = answers.usage
    assert (usage.prompt_tokens, usage.forked_prompt_tokens) == (prompt_tokens, 2 * prompt_tokens)
    assert usage.completion_tokens == sum(answer.completion_tokens for answer in answers)
    assert usage.tokens_per_s == pytest.approx(usage.completion_tokens / usage.seconds)
    assert policy.generate([]).usage.tokens_per_s == 0.0


BAD_PROMPTS: list[tuple[Any, str]] = [
    ("  ", "prompt 1 is empty; give it some text"),
    ([], "prompt 1 is empty"),
    ("x" * 5000, r"prompt 1 has 5\d* tokens, which with 12 new ones are more than the policy's context of 4096"),
    ([1, 999], "prompt 1: token id 999 is none of the policy's 320"),
    ([{"role": "user"}], "prompt 1 has a message without role or content"),
    ([300, 7], "prompt 1: the policy's logits are not finite numbers"),
]


@pytest.mark.parametrize(("bad", "said"), BAD_PROMPTS)
def test_a_prompt_that_fails_is_told_of_last_and_leaves_the_others(policy: Policy, bad: Any, said: str) -> None:
    damaged = Policy(copy.deepcopy(policy.decoder), policy.tokenizer)
    with torch.no_grad():
        # No id above the tokenizer's is ever sampled; as part of a prompt this one spoils what comes after it.
        damaged.decoder.embedding[300] = float("nan")
    expected = policy.generate(["a", "b", "c"], max_new_tokens=12, completions=2)
    with pytest.raises(GenerationError, match=said) as caught:
        damaged.generate(["a", bad, "c"], max_new_tokens=12, completions=2)
    assert [failure.prompt_number for failure in caught.value.failures] == [1]
    answered = [answer for answer in expected if answer.prompt_number != 1]
    assert list(caught.value.generations) == answered
    stream = damaged.generate(["a", bad, "c"], max_new_tokens=12, completions=2, stream=True)
    streamed: list[Generation] = []
    with pytest.raises(GenerationError, match=said):
        streamed += [piece.generation for piece in stream if piece.generation is not None]
    assert stream.generations == answered


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_p": 0.0}, "top_p is 0; it must be above 0"),
        ({"min_p": 1.0}, "min_p is 1; it must be in"),
        ({"top_k": -1}, "top_k is -1"),
        ({"stop": ["a", ""]}, "stop holds an empty string"),
        ({"thinking_budget": 0}, "thinking_budget is 0"),
        ({"repetition": Repetition(3, 1.0)}, "the probability between 0 and 1"),
        ({"seed": -1}, "seed is -1"),
        ({"max_concurrent_completions": 0}, "max_concurrent_completions is 0"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_runs(
    policy: Policy, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(GenerationError, match=said):
        policy.generate("a", stream=True, **options)


def test_few_slots_and_a_long_prompt_among_short_ones_change_no_answer(policy: Policy) -> None:
    prompts = ["a", "x" * 700, "b", "c"]
    expected = policy.generate(prompts, max_new_tokens=12, completions=2)
    assert policy.generate(prompts, max_new_tokens=12, completions=2, max_concurrent_completions=2) == expected
