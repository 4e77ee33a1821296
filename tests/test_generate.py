"""`load_policy(path).generate(...)`: greedy and sampled answers, thresholds, routing logs, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cispo
from cispo.generate import GenerationError, Policy
from cispo.types import StopReason

PROMPTS = ["a", "what is 3 + 4?", "x" * 70]


@pytest.fixture(scope="module")
def policy(small_policy_folder: Path) -> Policy:
    return cispo.load_policy(small_policy_folder, device="cpu")


def greedy_by_forward(policy: Policy, prompt: str, tokens: int) -> tuple[list[int], list[float]]:
    """The likeliest token after a whole forward, again and again."""
    ids, logprobs = policy.tokenizer.render_prompt(prompt), []
    start = len(ids)
    for _ in range(tokens):
        n = len(ids)
        with torch.inference_mode():
            hidden = policy.decoder(torch.tensor(ids), torch.arange(n), torch.tensor([0, n]).int())[-1:]
            logprob = policy.decoder.logits(hidden)[0].log_softmax(-1)
        ids.append(int(logprob.argmax()))
        logprobs.append(float(logprob.max()))
        if ids[-1] == policy.tokenizer.eos_id:
            break
    return ids[start:], logprobs


def test_greedy_answers_are_the_likeliest_tokens(policy: Policy) -> None:
    for generation in policy.generate(PROMPTS, max_new_tokens=20, temperature=0.0):
        ids, logprobs = greedy_by_forward(policy, generation.prompt, 20)
        assert list(generation.token_ids) == ids
        assert generation.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert generation.text == policy.tokenizer.decode(ids)
        assert generation.prompt_tokens == len(policy.tokenizer.render_prompt(generation.prompt))
        assert generation.stop_reason is (StopReason.LENGTH if len(ids) == 20 else StopReason.EOS)
        assert generation.routing is None


def test_answers_come_prompt_by_prompt_and_repeat_by_seed(policy: Policy) -> None:
    first = policy.generate(PROMPTS, max_new_tokens=12, completions=3)
    assert [generation.prompt for generation in first] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert first == policy.generate(PROMPTS, max_new_tokens=12, completions=3)
    assert first != policy.generate(PROMPTS, max_new_tokens=12, completions=3, seed=1)
    assert len({generation.token_ids for generation in first}) > 6
    same = policy.generate(["a", "a"], max_new_tokens=12)
    assert same[0].token_ids != same[1].token_ids
    assert policy.generate("a", max_new_tokens=12)[0] == first[0]


def test_a_threshold_drops_experts_and_the_log_counts_every_token(policy: Policy) -> None:
    plain, spared = (
        policy.generate(PROMPTS, max_new_tokens=16, temperature=0.0, expert_threshold=threshold, log_routing=True)
        for threshold in (0.0, 0.98)
    )
    choices = policy.decoder.config.experts_per_token
    for generation, sparse in zip(plain, spared, strict=True):
        # The last token was sampled and never read.
        routed = generation.prompt_tokens + generation.completion_tokens - 1
        assert generation.routing is not None and sparse.routing is not None
        assert [sum(tokens_E) for tokens_E in generation.routing.tokens_LE] == [choices * routed] * 4
        assert all(0 < entropy < 1.4 for entropy in generation.routing.mean_entropy_L)
        kept = sparse.prompt_tokens + sparse.completion_tokens - 1
        assert all(kept <= sum(tokens_E) < 1.2 * kept for tokens_E in sparse.routing.tokens_LE)
    assert [g.token_ids for g in plain] != [g.token_ids for g in spared]
    unlogged = policy.generate(PROMPTS, max_new_tokens=16, temperature=0.0)
    assert [g.token_ids for g in plain] == [g.token_ids for g in unlogged]


def test_a_threshold_of_one_request_leaves_others_as_they_are(policy: Policy) -> None:
    alone = policy.generate(PROMPTS[:1], max_new_tokens=16, temperature=0.0, expert_threshold=0.9)
    beside = policy.generate(PROMPTS, max_new_tokens=16, temperature=0.0, expert_threshold=0.9)
    assert alone[0].token_ids == beside[0].token_ids and alone[0].logprobs == beside[0].logprobs


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"completions": 0}, "completions is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"expert_threshold": 1.0}, r"expert_threshold is 1; it must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_done_is_refused(policy: Policy, settings: dict[str, float], said: str) -> None:
    with pytest.raises(GenerationError, match=said):
        policy.generate("a", **settings)  # type: ignore[arg-type]  # a value of each kind
    assert policy.generate([]) == []


def test_the_bundled_policy_answers_from_any_folder(tmp_path: Path) -> None:
    program = (
        "import sys, cispo\n"
        "assert 'torch' not in sys.modules\n"
        "policy = cispo.load_policy('bundled:tiny', device='cpu')\n"
        "prompt = 'Write a function f(x) that returns x + 1.'\n"
        "print(policy.generate(prompt, max_new_tokens=40, temperature=0.0)[0].text)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "def " in done.stdout
