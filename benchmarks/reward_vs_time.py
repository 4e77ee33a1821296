"""Held-out accuracy against seconds of training: this project beside TRL's GRPOTrainer, same model, task and rewards.

    pip install -e '.[bench]' && python -m cispo.smollm2 smollm2
    python benchmarks/reward_vs_time.py --policy smollm2 --seconds 150 --csv curves.csv
    python benchmarks/reward_vs_time.py --seconds 30 --every 10      # on a CPU: the bundled policy, to see it run

Both train on what `recipes/smollm2_math.yaml` says: its prompts, rewards, group size, completions and updates a step,
learning rate with its warm-up, CISPO with ratios up to 5, AdamW as MiniMax-M1's. In the same process, one after the
other; rewards are computed by the same worker processes. TRL: bfloat16 autocast over float32 weights, SDPA, no gradient
checkpointing, no reference model, its loss in micro batches of --peer-batch completions. Seconds are those of sampling,
rewards and updates; the clock stands still while held-out questions are answered, one completion each at temperature 1.
"""

import argparse
import csv
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from cispo.actors import load_decoder, new_learner, prepare_process
from cispo.data import load_prompts
from cispo.prompt_order import prompts_of_step
from cispo.recipe.load import read_recipe
from cispo.recipe.schema import EvaluationSettings, TrainRecipe
from cispo.resources import resolve_policy
from cispo.rewards.reward_set import RewardSet
from cispo.rollout.recipe_request import group_request
from cispo.types import Group, Prompt, Rollout, Score, ScoredGroup, StopReason, Turn

SCORING_PROCESSES = 4
ON_CPU = (
    "policy.path=bundled:tiny", "policy.dtype=float32", "rollout.prompts_per_step=4", "rollout.group_size=4",
    "rollout.max_completion_tokens=24", "rollout.max_concurrent_completions=16", "learner.updates_per_step=2",
    "learner.tokens_per_micro_batch=2048", "evaluation.data.limit=8", "evaluation.completions_per_prompt=1",
)  # fmt: skip
"""Settings of the trial on a CPU, before those of the command line."""


@dataclass(frozen=True)
class Point:
    """One line of the CSV file: a step that ended; heldout where it was measured after it."""

    side: str
    seconds: float
    steps: int
    completions: int
    train_reward: float | None
    heldout: float | None


class Curve:
    """One side's clock and what it found; seconds do not run in `paused`."""

    def __init__(self, side: str, seconds: float, every: float, file: TextIO) -> None:
        self._side, self._limit, self._every, self._file = side, seconds, every, file
        self._writer = csv.DictWriter(file, list(Point.__dataclass_fields__))
        self._paused = 0.0
        self._began = time.perf_counter()
        self._next = every
        self.points: list[Point] = []

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began - self._paused

    @property
    def is_over(self) -> bool:
        return self.seconds >= self._limit

    @contextmanager
    def paused(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started

    def start(self, measure: Callable[[], float]) -> None:
        """Measure the untouched policy, then set the clock to zero."""
        self._add(0, 0, None, measure())
        self._began, self._paused = time.perf_counter(), 0.0

    def step(self, steps: int, completions: int, train_reward: float, measure: Callable[[], float]) -> None:
        """Note a step; where it is time, and after the last one, measure too."""
        heldout = None
        at = self.seconds
        if at >= self._next or self.is_over:
            with self.paused():
                heldout = measure()
            self._next = (at // self._every + 1) * self._every
        self._add(steps, completions, train_reward, heldout, at)

    def _add(self, steps: int, completions: int, reward: float | None, heldout: float | None, at: float = 0.0) -> None:
        point = Point(self._side, round(at, 2), steps, completions, reward, heldout)
        self.points.append(point)
        self._writer.writerow(asdict(point))
        self._file.flush()
        if heldout is not None:
            trained = "" if reward is None else f"  reward {reward:.3f}"
            print(f"{self._side:6} {at:6.1f} s  step {steps:3}  held out {heldout:.3f}{trained}", flush=True)


_REWARDS: RewardSet | None = None


def _open_rewards(recipe: TrainRecipe) -> None:
    global _REWARDS
    os.environ["OMP_NUM_THREADS"] = "1"
    _REWARDS = RewardSet(
        recipe.rewards, recipe.sandbox.model_copy(update={"workers": 1}), base_path=recipe.base_path,
        max_completion_tokens=recipe.rollout.max_completion_tokens,
    )  # fmt: skip


def _score(group: Group) -> tuple[Score, ...]:
    assert _REWARDS is not None
    return _REWARDS.score(group)


class Scorers:
    """The recipe's rewards in processes of their own, for both sides."""

    def __init__(self, recipe: TrainRecipe) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(SCORING_PROCESSES, context, _open_rewards, (recipe,))

    def submit(self, group: Group) -> "Future[tuple[Score, ...]]":
        return self._pool.submit(_score, group)

    def score(self, groups: Sequence[Group]) -> list[Score]:
        return [score for future in [self.submit(group) for group in groups] for score in future.result()]

    def close(self) -> None:
        self._pool.shutdown()


def accuracy(scores: Sequence[Score]) -> float:
    return statistics.mean(score.is_correct for score in scores)


def train_ours(recipe: TrainRecipe, policy: Path, heldout: Sequence[Prompt], scorers: Scorers, curve: Curve) -> None:
    """The loop of a run on one device, without its actors and files."""
    import torch

    from cispo.model.tokenizer import Tokenizer
    from cispo.rollout.engine import Engine, SamplingSettings

    prepare_process(len(os.sched_getaffinity(0)))
    rollout, evaluation = recipe.rollout, recipe.evaluation
    assert evaluation is not None
    prompts = load_prompts(recipe.data, base_path=recipe.base_path)
    decoder = load_decoder(recipe, policy)
    engine = Engine(
        decoder, Tokenizer.load(policy), SamplingSettings(rollout.max_completion_tokens, recipe.seed),
        max_concurrent_completions=rollout.max_concurrent_completions, max_prompt_tokens=rollout.max_prompt_tokens,
    )  # fmt: skip
    learner = new_learner(recipe, policy, decoder)

    def sample_and_score(chosen: Sequence[Prompt], settings: tuple[int, float, str]) -> list[ScoredGroup]:
        size, temperature, stream = settings
        for prompt in chosen:
            engine.submit(group_request(prompt, rollout, group_size=size, temperature=temperature, stream=stream))
        under_way = []
        while not engine.is_idle:
            engine.step()
            # Scored while others are sampled, as in a run.
            under_way += [(group, scorers.submit(group)) for group in engine.collect()]
        return [ScoredGroup(group.prompt, group.rollouts, future.result()) for group, future in under_way]

    def measure() -> float:
        found = sample_and_score(heldout, (evaluation.completions_per_prompt, evaluation.temperature, "evaluation"))
        return accuracy([score for group in found for score in group.scores])

    curve.start(measure)
    for step in itertools.count(1):
        chosen = prompts_of_step(prompts, rollout.prompts_per_step, seed=recipe.seed, step=step)
        groups = sample_and_score(chosen.prompts, (rollout.group_size, rollout.temperature, f"epoch {chosen.epoch}"))
        learner.train(groups, step)
        engine.update_weights(learner.policy_version, learner.policy_tensors())
        rewards = [score.value for group in groups for score in group.scores]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        curve.step(step, step * len(rewards), statistics.mean(rewards), measure)
        if curve.is_over:
            break


def train_theirs(
    recipe: TrainRecipe, policy: Path, heldout: Sequence[Prompt], scorers: Scorers, curve: Curve, batch: int
) -> None:
    """TRL with the same settings, by its own names."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.use_deterministic_algorithms(False)
    rollout, learner, objective, evaluation = recipe.rollout, recipe.learner, recipe.objective, recipe.evaluation
    assert evaluation is not None and objective.name == "cispo"
    on_gpu = recipe.policy.device != "cpu" and torch.cuda.is_available()
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    prompts = {prompt.id: prompt for prompt in load_prompts(recipe.data, base_path=recipe.base_path)}
    completions = rollout.prompts_per_step * rollout.group_size
    an_update = completions // learner.updates_per_step
    batch = min(batch, an_update)
    step_rewards: list[float] = []

    def groups_of(asked: Sequence[Prompt], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[Group]:
        """As our engine hands them out, one for each run of completions of one prompt."""
        groups = []
        rows = zip(asked, texts, ids, strict=True)
        for prompt, run in itertools.groupby(rows, key=lambda row: row[0]):
            rollouts = tuple(
                rollout_of(prompt, index, text, len(own), ends=own[-1] == tokenizer.eos_token_id)
                for index, (_, text, own) in enumerate(run)
            )
            groups.append(Group(prompt, rollouts))
        return groups

    def reward(completions: Any, completion_ids: Any, id: list[str], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        scores = scorers.score(groups_of([prompts[name] for name in id], texts, completion_ids))
        values = [score.value for score in scores]
        step_rewards.append(statistics.mean(values))
        return values

    def measure() -> float:
        scores: list[Score] = []
        model.eval()
        for start in range(0, len(heldout), 512):
            asked = heldout[start : start + 512]
            messages = [messages_of(prompt) for prompt in asked]
            given = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            width = given["input_ids"].shape[1]
            with torch.no_grad():
                out = model.generate(
                    input_ids=given["input_ids"], attention_mask=given["attention_mask"], do_sample=True, top_k=0,
                    top_p=1.0, temperature=evaluation.temperature, max_new_tokens=rollout.max_completion_tokens,
                    pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                )[:, width:].tolist()  # fmt: skip
            end = tokenizer.eos_token_id
            own = [row[: row.index(end) + 1] if end in row else row for row in out]
            texts = tokenizer.batch_decode(own, skip_special_tokens=True)
            scores += scorers.score(groups_of(asked, texts, own))
        model.train()
        return accuracy(scores)

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            curve.start(measure)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % learner.updates_per_step:
                return
            if on_gpu:
                torch.cuda.synchronize()
            step = state.global_step // learner.updates_per_step
            curve.step(step, step * completions, step_rewards[-1], measure)
            control.should_training_stop = curve.is_over

    with tempfile.TemporaryDirectory() as scratch:
        config = trl.GRPOConfig(
            output_dir=scratch, loss_type="cispo", epsilon_high=objective.ratio_max, beta=0.0, seed=recipe.seed,
            learning_rate=learner.learning_rate, warmup_steps=learner.warmup_updates,
            lr_scheduler_type="constant_with_warmup", max_steps=100_000, max_grad_norm=learner.max_grad_norm,
            adam_beta1=learner.betas[0], adam_beta2=learner.betas[1], adam_epsilon=learner.eps,
            weight_decay=learner.weight_decay, per_device_train_batch_size=batch,
            gradient_accumulation_steps=an_update // batch, steps_per_generation=completions // batch,
            num_generations=rollout.group_size, max_completion_length=rollout.max_completion_tokens,
            temperature=rollout.temperature, gradient_checkpointing=False, use_cpu=not on_gpu, bf16=on_gpu,
            report_to=[], logging_steps=100_000, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = [{"prompt": messages_of(prompt), "id": prompt.id} for prompt in prompts.values()]
        trainer = trl.GRPOTrainer(
            model=model, args=config, reward_funcs=reward, train_dataset=Dataset.from_list(rows), callbacks=[Watch()],
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in [*prompt.earlier, ("user", prompt.text)]]


def rollout_of(prompt: Prompt, index: int, text: str, tokens: int, *, ends: bool) -> Rollout:
    """What rewards see of a completion."""
    import numpy as np

    turn = Turn(
        np.zeros(tokens, np.int32), np.ones(tokens, np.bool_), np.zeros(tokens, np.float32), np.zeros(tokens, np.int32)
    )
    reason = StopReason.EOS if ends else StopReason.LENGTH
    return Rollout(prompt.id, index, np.zeros(0, np.int32), (turn,), reason, text)


def folder_for_transformers(policy: Path, scratch: Path) -> Path:
    """The policy where transformers can load it: MiniMax-M1's own names it does not know, MiniMax's it does."""
    import torch

    from cispo.model.checkpoint import load_policy, save_policy

    if json.loads((policy / "config.json").read_text(encoding="utf-8"))["model_type"] != "minimax_m1":
        return policy
    decoder = load_policy(policy, dtype=torch.float32, device="cpu")
    decoder.config = replace(decoder.config, family="minimax")
    save_policy(decoder, scratch)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(policy / name, scratch / name)
    return scratch


def table(points: Sequence[Point], seconds: float, every: float) -> str:
    """Held-out accuracy of both at the last measurement before each time, and what each did in all."""
    sides = list(dict.fromkeys(point.side for point in points))
    lines = ["held-out accuracy", f"{'seconds':>8}" + "".join(f"{side:>10}" for side in sides)]
    measured = [point for point in points if point.heldout is not None]
    # A step that ends after the time is up was measured too.
    for at in [*(every * index for index in range(int(seconds // every) + 1)), float("inf")]:
        cells = []
        for side in sides:
            found = [point.heldout for point in measured if point.side == side and point.seconds <= at + every / 2]
            cells.append(f"{found[-1]:10.3f}")
        lines.append(f"{'end' if at == float('inf') else f'{at:.0f}':>8}" + "".join(cells))
    for side in sides:
        last = [point for point in points if point.side == side][-1]
        rate = last.completions / max(last.seconds, 1e-9)
        done = f"{last.steps} steps, {last.completions} completions in {last.seconds:.0f} s"
        lines.append(f"{side}: {done}, {rate:.0f} a second")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="policy folder (default: bundled:tiny with a small step, on a CPU)")
    parser.add_argument("--seconds", type=float, default=150.0, help="of training, on each side")
    parser.add_argument("--every", type=float, default=25.0, help="seconds of training between two measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-batch", type=int, default=128, help="completions of one of TRL's micro batches")
    parser.add_argument("--sides", nargs="+", choices=["cispo", "trl"], default=["cispo", "trl"])
    parser.add_argument("--csv", type=Path, default=Path("reward_vs_time.csv"))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="in place of the recipe's, for both sides")
    options = parser.parse_args()
    given = [f"policy.path={Path(options.policy).resolve()}"] if options.policy else list(ON_CPU)
    recipe = read_recipe("smollm2_math", [*given, f"seed={options.seed}", *options.settings], TrainRecipe).recipe
    policy = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    assert isinstance(recipe.evaluation, EvaluationSettings)
    heldout = load_prompts(recipe.evaluation.data, base_path=recipe.base_path)
    scorers = Scorers(recipe)
    points: list[Point] = []
    try:
        with options.csv.open("w", encoding="utf-8", newline="") as file, tempfile.TemporaryDirectory() as scratch:
            csv.DictWriter(file, list(Point.__dataclass_fields__)).writeheader()
            for side in options.sides:
                curve = Curve(side, options.seconds, options.every, file)
                if side == "cispo":
                    train_ours(recipe, policy, heldout, scorers, curve)
                else:
                    theirs = folder_for_transformers(policy, Path(scratch))
                    train_theirs(recipe, theirs, heldout, scorers, curve, options.peer_batch)
                points += curve.points
                free_device()
    finally:
        scorers.close()
    print(f"\n{versions()}\n{table(points, options.seconds, options.every)}\ncurves: {options.csv}")


def free_device() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def versions() -> str:
    import torch
    import transformers
    import trl

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}"


if __name__ == "__main__":
    main()
