"""Whole reinforcement-learning steps beside TRL's GRPOTrainer, in one process, step by step in turn.

    pip install -e '.[bench]' && python benchmarks/rl_step_vs_trl.py

Both sides train the same MiniMax model (transformers' random weights, copied) on the same prompts with the same reward,
one update a step, CISPO with ratios up to 5. TRL runs at its best: no gradient checkpointing, SDPA, no reference
model, all cores. Completions never end early, so every step has the same tokens. A step is sampling, reward, loss,
backward and AdamW; after each TRL step one of ours is timed. The table gives medians and their ratio.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cispo.model.arithmetic import prepare_products

prepare_products()

import torch
import transformers
import trl
from datasets import Dataset
from policies import write_tokenizer

from cispo.advantage import AdvantageSettings
from cispo.learner import Learner
from cispo.learner_settings import LearnerSettings
from cispo.model.checkpoint import load_policy
from cispo.model.tokenizer import Tokenizer
from cispo.objective_settings import CispoSettings
from cispo.rollout.engine import Engine, SamplingSettings
from cispo.rollout.request import Drawing, GroupRequest
from cispo.types import Prompt, Score, ScoredGroup

GROUP_SIZE = 8
PROMPT_TOKENS = 16
VOCABULARY = 512
NEVER = -1
"""An end-of-sequence id that no sample has."""


@dataclass
class Times:
    """Seconds of each step, and of the sampling in it."""

    steps: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)

    def medians(self, skip: int) -> tuple[float, float, float]:
        """Step, sampling, and the rest of the step, without the first steps, which warm up."""
        rest = [step - sampling for step, sampling in zip(self.steps, self.sampling, strict=True)]
        step, sampling, remainder = (statistics.median(values[skip:]) for values in (self.steps, self.sampling, rest))
        return step, sampling, remainder


def share_of_vowels(completion: str) -> float:
    return sum(character in "aeiou" for character in completion) / max(1, len(completion))


def write_policy(folder: Path) -> transformers.MiniMaxForCausalLM:
    """A random MiniMax of the benchmark's size and a byte tokenizer, as a folder that both sides read."""
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=4096,
        layer_types=["linear_attention"] * 3 + ["full_attention"], full_attn_alpha_factor=1.68,
        linear_attn_alpha_factor=1.68, mlp_alpha_factor=1.68, initializer_range=0.1, block_size=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, bos_token_id=None, eos_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    model = transformers.MiniMaxForCausalLM(config)
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCABULARY)
    return model


class Ours:
    """Engine and learner over one copy of the weights, as on a single device."""

    def __init__(self, folder: Path, completions: int, tokens: int, prompts: list[str]) -> None:
        decoder = load_policy(folder, dtype=torch.float32, device="cpu")
        tokenizer = replace(Tokenizer.load(folder), eos_id=NEVER)
        self._prompts = [Prompt(f"p{i}", text) for i, text in enumerate(prompts[: completions // GROUP_SIZE])]
        self._engine = Engine(
            decoder, tokenizer, SamplingSettings(tokens, seed=0),
            max_concurrent_completions=completions, max_prompt_tokens=PROMPT_TOKENS,
        )  # fmt: skip
        # Four groups of the larger setting, each with its prompt once.
        settings = LearnerSettings(learning_rate=1e-5, tokens_per_micro_batch=4160)
        self._learner = Learner(
            decoder, objective=CispoSettings(name="cispo", reduction="token"), advantage=AdvantageSettings(),
            settings=settings, temperature=1.0, max_completion_tokens=tokens, total_updates=10_000, seed=0,
        )  # fmt: skip
        self.times = Times()
        self.mismatch = 0.0

    def step(self) -> None:
        started = time.perf_counter()
        for prompt in self._prompts:
            self._engine.submit(GroupRequest(prompt, GROUP_SIZE, Drawing(1.0), stream=str(len(self.times.steps))))
        while not self._engine.is_idle:
            self._engine.step()
        groups = self._engine.collect()
        sampled = time.perf_counter()
        scored = [
            ScoredGroup(g.prompt, g.rollouts, tuple(Score(share_of_vowels(r.text)) for r in g.rollouts)) for g in groups
        ]
        metrics = self._learner.train(scored, len(self.times.steps) + 1)
        self._engine.policy_version = self._learner.policy_version
        self.mismatch = max(self.mismatch, metrics.get("policy/mismatch/max", 0.0))
        self.times.steps.append(time.perf_counter() - started)
        self.times.sampling.append(sampled - started)


class InTurn(transformers.TrainerCallback):
    """Times each step of TRL, then lets the other side take one."""

    def __init__(self, ours: Ours) -> None:
        self._ours = ours
        self.times = Times()
        self.sampling_s = 0.0
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started, self.sampling_s = time.perf_counter(), 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.steps.append(time.perf_counter() - self._started)
        self.times.sampling.append(self.sampling_s)
        self._ours.step()


def compare(completions: int, tokens: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_policy(folder)
        prompts = [f"{i:02d} say something"[:PROMPT_TOKENS] for i in range(64)]
        ours = Ours(folder, completions, tokens, prompts)
        turns = InTurn(ours)
        generate = model.generate

        def timed_generate(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = generate(*arguments, **options)
            turns.sampling_s += time.perf_counter() - started
            return result

        model.generate = timed_generate
        config = trl.GRPOConfig(
            output_dir=name, loss_type="cispo", epsilon_high=5.0, beta=0.0, learning_rate=1e-5, max_steps=rounds,
            per_device_train_batch_size=completions, gradient_accumulation_steps=1, num_generations=GROUP_SIZE,
            max_completion_length=tokens, generation_kwargs={"eos_token_id": None}, gradient_checkpointing=False,
            use_cpu=True, bf16=False, report_to=[], logging_steps=10_000, save_strategy="no", disable_tqdm=True,
            adam_beta2=0.95, adam_epsilon=1e-15, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=model, args=config, reward_funcs=lambda completions, **_: [share_of_vowels(c) for c in completions],
            train_dataset=Dataset.from_dict({"prompt": prompts}), callbacks=[turns],
            processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        )  # fmt: skip
        trainer.train()
    report(completions, tokens, turns.times, ours)


def report(completions: int, tokens: int, peer: Times, ours: Ours) -> None:
    sides = (peer.medians(2), ours.times.medians(2))
    print(f"\n{completions} completions x {tokens} tokens, {len(peer.steps) - 2} steps each, in turn")
    print(f"{'':14}{'TRL ms':>10}{'cispo ms':>10}{'ratio':>8}")
    for row, (theirs, own) in zip(("whole step", "sampling", "rest of step"), zip(*sides, strict=True), strict=True):
        print(f"{row:14}{theirs * 1e3:10.1f}{own * 1e3:10.1f}{theirs / own:8.2f}")
    rates = [completions * tokens / side[0] for side in sides]
    print(f"{'tokens/s':14}{rates[0]:10.0f}{rates[1]:10.0f}{rates[1] / rates[0]:8.2f}")
    print(f"largest mismatch of a logprob between sampling and learner: {ours.mismatch:g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="steps of each side; the first two are not counted")
    rounds = parser.parse_args().rounds
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"torch {torch.__version__}, trl {trl.__version__}, {torch.get_num_threads()} threads")
    compare(16, 48, rounds)
    compare(64, 128, max(6, rounds // 2))


if __name__ == "__main__":
    main()
