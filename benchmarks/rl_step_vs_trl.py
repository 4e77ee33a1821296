"""Whole reinforcement-learning steps beside TRL's GRPOTrainer, in one process, step by step in turn.

    pip install -e '.[bench]' && python benchmarks/rl_step_vs_trl.py [--device cuda]

Both sides train the same MiniMax model (transformers' random weights) on the same prompts with the same reward, one
update a step, CISPO with ratios up to 5: of 2.0 million parameters on a CPU, the hybrid of 0.68 billion on a GPU
(`benchmarks/policies.py`). TRL runs at its best: no gradient checkpointing, SDPA, no reference model, all cores; on a
GPU all of it in bfloat16, where our side keeps float32 masters and the repeatable kernels that a run has. A batch that
does not fit it is trained on in halves. Completions never end early, so every step has the same tokens; the table says
whether that is what happened. A step is sampling, reward, loss, backward and AdamW; after each of TRL's one of ours is
timed. The table gives medians and their ratio.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cispo.model.arithmetic import prepare_products

prepare_products()
# As in a run, where kernels repeat.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import transformers
import trl
from datasets import Dataset
from policies import SIZES, write_minimax

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
WARM_UP = 2
"""Steps of each side that are not counted."""
NEVER = -1
"""An end-of-sequence id that no sample has."""
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
DEFAULT_STEPS = {"tiny": ["16x48", "64x128"], "hybrid": ["64x256"]}


@dataclass
class Times:
    """Seconds of each step, and of the sampling in it; completion tokens of a step, and of its mean completion."""

    steps: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)
    mean_lengths: list[float] = field(default_factory=list)

    def medians(self) -> tuple[float, float, float]:
        """Step, sampling, and the rest of the step, without the first steps, which warm up."""
        rest = [step - sampling for step, sampling in zip(self.steps, self.sampling, strict=True)]
        columns = (self.steps, self.sampling, rest)
        step, sampling, remainder = (statistics.median(values[WARM_UP:]) for values in columns)
        return step, sampling, remainder

    @property
    def mean_length(self) -> float:
        return statistics.mean(self.mean_lengths[WARM_UP:])


def marked_share(completion: str) -> float:
    """Differs between completions of both vocabularies: one has letters alone, one mostly numbered tokens."""
    return sum(character in "aeiou02468" for character in completion) / max(1, len(completion))


def clock_s() -> float:
    """The time once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def repeatable_kernels() -> Iterator[None]:
    """What every process of a run is set to on a GPU (`cispo.actors.prepare_process`); TRL goes without."""
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Ours:
    """Engine and learner over one copy of the weights, as on a single device."""

    def __init__(self, folder: Path, device: str, completions: int, tokens: int, prompts: list[str]) -> None:
        decoder = load_policy(folder, dtype=DTYPES[device], device=device)
        tokenizer = replace(Tokenizer.load(folder), eos_id=NEVER)
        self._prompts = [Prompt(f"p{i}", text) for i, text in enumerate(prompts[: completions // GROUP_SIZE])]
        self._engine = Engine(
            decoder, tokenizer, SamplingSettings(tokens, seed=0),
            max_concurrent_completions=completions, max_prompt_tokens=PROMPT_TOKENS,
        )  # fmt: skip
        # On a CPU four groups of the larger step, each with its prompt once; on a GPU the whole step.
        settings = LearnerSettings(learning_rate=1e-5, tokens_per_micro_batch=4160 if device == "cpu" else 20480)
        self._learner = Learner(
            decoder, objective=CispoSettings(name="cispo", reduction="token"), advantage=AdvantageSettings(),
            settings=settings, temperature=1.0, max_completion_tokens=tokens, total_updates=10_000, seed=0,
        )  # fmt: skip
        self.times = Times()
        self.mismatch = 0.0
        self.dropped_groups = 0.0

    def step(self) -> None:
        with repeatable_kernels():
            self._step()

    def _step(self) -> None:
        started = clock_s()
        for prompt in self._prompts:
            self._engine.submit(GroupRequest(prompt, GROUP_SIZE, Drawing(1.0), stream=str(len(self.times.steps))))
        while not self._engine.is_idle:
            self._engine.step()
        groups = self._engine.collect()
        sampled = clock_s()
        scored = [
            ScoredGroup(g.prompt, g.rollouts, tuple(Score(marked_share(r.text)) for r in g.rollouts)) for g in groups
        ]
        metrics = self._learner.train(scored, len(self.times.steps) + 1)
        self._engine.update_weights(self._learner.policy_version, self._learner.policy_tensors())
        self.times.steps.append(clock_s() - started)
        self.times.sampling.append(sampled - started)
        lengths = [rollout.completion_length_tokens for group in groups for rollout in group.rollouts]
        self.times.mean_lengths.append(statistics.mean(lengths))
        self.mismatch = max(self.mismatch, metrics.get("policy/mismatch/max", 0.0))
        self.dropped_groups += metrics.get("group/dropped", 0.0)


class InTurn(transformers.TrainerCallback):
    """Times each step of TRL, then lets the other side take one, until the time is up."""

    def __init__(self, ours: Ours, ends_at_s: float) -> None:
        self._ours, self._ends_at_s = ours, ends_at_s
        self.times = Times()
        self.sampling_s = 0.0
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started, self.sampling_s = clock_s(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times.steps.append(clock_s() - self._started)
        self.times.sampling.append(self.sampling_s)
        self._ours.step()
        number = len(self.times.steps)
        print(
            f"step {number}: TRL {self.times.steps[-1]:.2f} s, cispo {self._ours.times.steps[-1]:.2f} s"
            + (" (not counted)" if number <= WARM_UP else ""), flush=True,
        )  # fmt: skip
        if number > WARM_UP and time.perf_counter() + self.times.steps[-1] > self._ends_at_s:
            control.should_training_stop = True


def peer_trainer(
    model: transformers.PreTrainedModel, folder: Path, options: argparse.Namespace, completions: int, tokens: int,
    prompts: list[str], turns: InTurn, pieces: int,
) -> trl.GRPOTrainer:  # fmt: skip
    """TRL's trainer of the same steps, the loss in so many pieces."""
    config = trl.GRPOConfig(
        output_dir=str(folder), loss_type="cispo", epsilon_high=5.0, beta=0.0, learning_rate=1e-5,
        max_steps=options.rounds, per_device_train_batch_size=completions // pieces, num_generations=GROUP_SIZE,
        gradient_accumulation_steps=pieces, max_completion_length=tokens, gradient_checkpointing=False,
        generation_kwargs={"eos_token_id": None}, use_cpu=options.device == "cpu", bf16=False, report_to=[],
        logging_steps=10_000, save_strategy="no", disable_tqdm=True, adam_beta2=0.95, adam_epsilon=1e-15,
        lr_scheduler_type="constant",
    )  # fmt: skip

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        turns.times.mean_lengths.append(statistics.mean(map(len, completion_ids)))
        return [marked_share(completion) for completion in completions]

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    # TRL cuts completions at the first such token, so it is one that no sample has: its id is past the vocabulary.
    tokenizer.add_special_tokens({"eos_token": "<never sampled>"})
    assert tokenizer.eos_token_id >= model.config.vocab_size
    return trl.GRPOTrainer(
        model=model, args=config, reward_funcs=reward, train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[turns], processing_class=tokenizer,
    )  # fmt: skip


def compare(options: argparse.Namespace, completions: int, tokens: int) -> None:
    ends_at_s = time.perf_counter() + options.seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_minimax(folder, **SIZES[options.size])
        prompts = [f"{i:02d} say something"[:PROMPT_TOKENS] for i in range(64)]
        ours = Ours(folder, options.device, completions, tokens, prompts)
        pieces = 1
        while True:
            # Anew, as a step that did not fit may have left half an update.
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.device])
            turns = InTurn(ours, ends_at_s)
            generate = model.generate

            def timed_generate(*arguments: Any, turns: InTurn = turns, generate: Any = generate, **given: Any) -> Any:
                started = clock_s()
                result = generate(*arguments, **given)
                turns.sampling_s += clock_s() - started
                return result

            model.generate = timed_generate
            trainer = peer_trainer(model, folder, options, completions, tokens, prompts, turns, pieces)
            try:
                trainer.train()
                break
            except torch.OutOfMemoryError:
                if completions // pieces == GROUP_SIZE:
                    raise
                pieces *= 2
                print(f"TRL's loss does not fit; in {pieces} pieces of {completions // pieces} completions", flush=True)
            del trainer, model, generate, timed_generate
            torch.cuda.empty_cache()
        report(completions, tokens, turns.times, ours, sum(p.numel() for p in model.parameters()))


def report(completions: int, tokens: int, peer: Times, ours: Ours, parameters: int) -> None:
    sides = (peer.medians(), ours.times.medians())
    counted = len(peer.steps) - WARM_UP
    print(f"\n{parameters / 1e6:.1f} M parameters, {completions} completions x {tokens} tokens, {counted} steps each")
    print(f"{'':14}{'TRL ms':>10}{'cispo ms':>10}{'ratio':>8}")
    for row, (theirs, own) in zip(("whole step", "sampling", "rest of step"), zip(*sides, strict=True), strict=True):
        print(f"{row:14}{theirs * 1e3:10.1f}{own * 1e3:10.1f}{theirs / own:8.2f}")
    lengths = (peer.mean_length, ours.times.mean_length)
    rates = [completions * length / side[0] for length, side in zip(lengths, sides, strict=True)]
    print(f"{'tokens/s':14}{rates[0]:10.0f}{rates[1]:10.0f}{rates[1] / rates[0]:8.2f}")
    is_fair = lengths == (tokens, tokens) and not ours.dropped_groups
    print(f"mean completion, tokens: TRL {lengths[0]:.2f}, cispo {lengths[1]:.2f} of {tokens}")
    print(f"groups that cispo left out of an update, as their rewards were equal: {ours.dropped_groups:g}")
    print("both sides had the same work" if is_fair else "NOT FAIR: the sides had different work")
    print(f"largest mismatch of a logprob between sampling and learner: {ours.mismatch:g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="steps of each side; the first two are not counted")
    parser.add_argument("--device", choices=list(DTYPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=list(SIZES), help="default: tiny on a CPU, hybrid on a GPU")
    parser.add_argument("--steps", nargs="+", metavar="COMPLETIONSxTOKENS", help="what a step samples")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no step that would go on after this")
    options = parser.parse_args()
    options.size = options.size or ("tiny" if options.device == "cpu" else "hybrid")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, {machine}")
    for step in options.steps or DEFAULT_STEPS[options.size]:
        completions, tokens = map(int, step.split("x"))
        compare(options, completions, tokens)


if __name__ == "__main__":
    main()
