"""Supervised training: `cispo sft`. Prompts in the chat template, the loss on the completion and its eos only.

One step is one update on a batch of packed examples; the loss is the mean over the batch's completion tokens. Nothing
here waits for the device within a step: losses and norms stay there until a line of metrics is due. A run is a folder
like any other (`runs/<name>/`) and resumes exactly; its result is a policy folder in Hugging Face layout.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cispo.checkpoint import load_newest_checkpoint, save_checkpoint
from cispo.devices import resolve_device, resolve_dtype
from cispo.errors import CispoError, RunFolderError
from cispo.kernels.head_loss import head_logprobs, head_policy_loss
from cispo.learner_settings import scheduled_learning_rate
from cispo.model.checkpoint import initialise_policy, load_policy, save_policy
from cispo.model.decoder import Decoder
from cispo.model.router_sums import RouterSums
from cispo.model.routing import RoutingControl
from cispo.model.tokenizer import Tokenizer
from cispo.optimizer import MasterAdamW
from cispo.recipe.sft_schema import SftRecipe
from cispo.resources import resolve_policy
from cispo.router_balance import RouterBalance, RouterTotals
from cispo.run_folder import RunFolder, plain_settings
from cispo.sft_data import SftMicroBatch, batches, load_examples, micro_batches
from cispo.views import Views, open_views

STEPS_PER_LINE = 20
"""Steps between two lines of metrics; one is also due at each evaluation, each checkpoint and the end."""


def run_sft(recipe: SftRecipe, *, resume: bool = False) -> Path:
    """Train by a recipe and return the policy folder that it names as output.

    The run folder is `runs/<name>` in the working directory. Raises RunFolderError if it or the output exists already.
    """
    output = Path(os.path.abspath(recipe.output))
    if output.exists():
        raise RunFolderError(f"the output {output} exists already; remove it, or name another with output=PATH")
    policy_path = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    tokenizer = Tokenizer.load(policy_path)
    trainer = SftTrainer(recipe, policy_path, tokenizer)
    use = RunFolder.open_for_resume if resume else RunFolder.create
    folder = use(Path("runs") / recipe.name, recipe)
    views = open_views(
        folder.path,
        name=recipe.name,
        steps=recipe.steps,
        recipe=plain_settings(recipe),
        console="lines",
        wandb=recipe.logging.wandb,
        wandb_project=recipe.logging.wandb_project,
        advice_every_steps=0,
    )
    try:
        with views, _repeatable():
            views.message(trainer.description())
            trainer.run(folder, views)
            _write_output(trainer.decoder, tokenizer, output)
            views.message(f"wrote the policy to {output}")
    finally:
        folder.close()
    return output


class SftTrainer:
    """The policy, its optimiser and its data; `run` takes all steps that are left."""

    def __init__(self, recipe: SftRecipe, policy_path: Path, tokenizer: Tokenizer) -> None:
        dtype, self._device = resolve_dtype(recipe.policy.dtype), resolve_device(recipe.policy.device)
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._examples = load_examples(recipe.data, tokenizer, base_path=recipe.base_path)
        self._held_out = self._load_held_out()
        if recipe.policy.init == "random":
            self.decoder = initialise_policy(policy_path, seed=recipe.seed, dtype=dtype, device=self._device)
        else:
            self.decoder = load_policy(policy_path, dtype=dtype, device=self._device)
        settings = recipe.learner
        self._optimizer = MasterAdamW(
            self.decoder, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        self._losses = LossSums(self._device)

    def description(self) -> str:
        """One line on what is trained on what."""
        tokens = sum(len(example.token_ids_T) for example in self._examples)
        epochs = self._recipe.steps * self._recipe.tokens_per_batch / tokens
        parameters = sum(parameter.numel() for parameter in self.decoder.parameters())
        return (
            f"{len(self._examples)} examples of {tokens / len(self._examples):.0f} tokens on average, "
            f"about {epochs:.1f} epochs; {parameters:,} parameters in {self._recipe.policy.dtype} on {self._device}"
        )

    def run(self, folder: RunFolder, views: Views) -> None:
        """Take the steps after the folder's newest checkpoint, with metrics, evaluations and checkpoints."""
        recipe = self._recipe
        started = self._restore(folder, views)
        lengths = [example.inputs for example in self._examples]
        plan = batches(lengths, recipe.tokens_per_batch, seed=recipe.seed, first=started)
        self._losses.start()
        for step in range(started + 1, recipe.steps + 1):
            self._step(next(plan))
            is_last = step == recipe.steps
            evaluates = bool(self._held_out) and (is_last or step % self._evaluation_steps == 0)
            saves = is_last or step % recipe.checkpoint.every_steps == 0
            if evaluates or saves or step % STEPS_PER_LINE == 0:
                metrics = self._losses.take(step) | {"sft/lr": self._learning_rate(step - 1)}
                if evaluates:
                    metrics["sft/heldout_loss"] = self._held_out_loss()
                _report(step, recipe.steps, metrics, folder, views)
            if saves:
                self._save(folder, step)
            if evaluates or saves:
                self._losses.start()

    def _step(self, members: Sequence[int]) -> None:
        examples = [self._examples[i] for i in members]
        tokens = sum(example.loss_tokens for example in examples)
        packed = micro_batches(examples, self._recipe.learner.tokens_per_micro_batch)
        balance = self._balance(packed) if self._recipe.learner.router_aux_loss_coef else None
        for micro in packed:
            self._losses.add(self._forward_backward(micro.to(self._device), 1 / tokens, balance), len(micro.ids_N))
        self._losses.add_norm(self._optimizer.clip(self._recipe.learner.max_grad_norm))
        self._optimizer.update(self._learning_rate(self._optimizer.updates))

    def _balance(self, packed: Sequence[SftMicroBatch]) -> RouterBalance:
        def route(micro: SftMicroBatch, sums: RouterSums) -> None:
            self._hidden(micro.to(self._device), sums)

        return RouterBalance.of(packed, self.decoder.config, self._device, route)

    def _hidden(self, micro: SftMicroBatch, sums: RouterSums | None = None) -> Tensor:
        routing = RoutingControl(sums=sums) if sums else None
        hidden_MD: Tensor = self.decoder(
            micro.ids_N, micro.positions_N, micro.cu_seqlens, rows_M=micro.rows_M, routing=routing
        )
        return hidden_MD

    def _forward_backward(self, micro: SftMicroBatch, weight: float, balance: RouterBalance | None) -> Tensor:
        """Log-likelihood as a policy gradient whose coefficient is the same for all tokens; returns logprob_M."""
        sums = RouterSums(self.decoder.config, self._device, for_loss=True) if balance else None
        head = head_policy_loss(
            self._hidden(micro, sums),
            self.decoder.head_weight,
            micro.targets_M,
            lambda logprob_C, rows: torch.full_like(logprob_C, weight),
            temperature=1.0,
        )
        if balance is None or sums is None:
            torch.autograd.backward(head.loss)
        else:
            router_loss = balance.loss(sums)
            torch.autograd.backward((head.loss, self._recipe.learner.router_aux_loss_coef * router_loss))
            self._losses.routers.add(sums, router_loss)
        self._optimizer.collect()
        return head.logprob_N

    def _learning_rate(self, update: int) -> float:
        settings = self._recipe.learner
        return scheduled_learning_rate(
            settings.learning_rate,
            update,
            warmup_updates=settings.warmup_updates,
            schedule=settings.schedule,
            total_updates=self._recipe.steps,
        )

    @property
    def _evaluation_steps(self) -> int:
        return self._recipe.evaluation.every_steps if self._recipe.evaluation else 0

    def _load_held_out(self) -> list[SftMicroBatch]:
        evaluation = self._recipe.evaluation
        if evaluation is None:
            return []
        examples = load_examples(evaluation.data, self._tokenizer, base_path=self._recipe.base_path)
        packed = micro_batches(examples, self._recipe.learner.tokens_per_micro_batch)
        return [micro.to(self._device) for micro in packed]

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Mean over all held-out completion tokens of -log pi, in nats."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for micro in self._held_out:
            hidden_MD = self._hidden(micro)
            logprob_M, _ = head_logprobs(hidden_MD, self.decoder.head_weight, micro.targets_M, temperature=1.0)
            total -= logprob_M.sum(dtype=torch.float64)
        return float(total) / sum(len(micro.rows_M) for micro in self._held_out)

    def _save(self, folder: RunFolder, step: int) -> None:
        save_checkpoint(
            folder.checkpoint_path(step),
            decoder=self.decoder,
            tokenizer=self._tokenizer,
            learner_state=self._optimizer.state_dict(),
            loop_state={"step": step},
            keep=2,
        )

    def _restore(self, folder: RunFolder, views: Views) -> int:
        """Go on from the newest checkpoint, if there is one; returns the steps that are done."""
        checkpoint = load_newest_checkpoint(folder.path / "checkpoints")
        done = checkpoint.step if checkpoint else 0
        if checkpoint:
            self._optimizer.load_state_dict(checkpoint.learner_state)
            views.message(f"resumed from {checkpoint.path.name}")
        folder.truncate_after(done)
        return done


class LossSums:
    """Sums of losses, and what the routers did, since the last line of metrics, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def start(self) -> None:
        """Forget everything and start the clock."""
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._norm = torch.zeros((), dtype=torch.float32, device=self._device)
        self._loss_tokens = 0
        self._tokens = 0
        self._updates = 0
        self.routers = RouterTotals()
        self._started = time.perf_counter()

    def add(self, logprob_M: Tensor, tokens: int) -> None:
        self._loss -= logprob_M.sum(dtype=torch.float64)
        self._loss_tokens += len(logprob_M)
        self._tokens += tokens

    def add_norm(self, norm: Tensor) -> None:
        # torch.maximum hands a NaN on, so that it is seen when the line is due.
        self._norm = torch.maximum(self._norm, norm)
        self._updates += 1

    def take(self, step: int) -> dict[str, float]:
        """Metrics since the last call, which are then forgotten; CispoError when a loss or gradient was not finite."""
        loss, norm = torch.stack((self._loss, self._norm.double())).tolist()
        seconds = time.perf_counter() - self._started
        metrics = {
            "sft/loss": loss / self._loss_tokens,
            "sft/grad_norm": norm,
            "perf/learner_tokens_per_s": self._tokens / seconds,
        }
        if not abs(metrics["sft/loss"] + norm) < float("inf"):
            raise CispoError(
                f"step {step}: loss {metrics['sft/loss']:g} and gradient norm {norm:g} since the last line are not "
                "finite; the last checkpoint is good: lower learner.learning_rate or raise learner.warmup_updates"
            )
        metrics |= self.routers.metrics(self._updates)
        self.start()
        return metrics


def _report(step: int, steps: int, metrics: dict[str, float], folder: RunFolder, views: Views) -> None:
    folder.append_metrics(step, metrics)
    views.step(step, metrics)
    cells = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {metrics['sft/loss']:.4f}",
        f"grad norm {metrics['sft/grad_norm']:.3g}",
        f"lr {metrics['sft/lr']:.2e}",
        f"tokens/s {metrics['perf/learner_tokens_per_s']:.0f}",
    ]
    if "sft/heldout_loss" in metrics:
        cells.append(f"held-out loss {metrics['sft/heldout_loss']:.4f}")
    views.message("  ".join(cells))


def _write_output(decoder: Decoder, tokenizer: Tokenizer, output: Path) -> None:
    """The policy folder appears whole, by rename."""
    draft = output.with_name(f".{output.name}.writing-{os.getpid()}")
    save_policy(decoder, draft)
    tokenizer.save(draft)
    draft.rename(output)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Only algorithms that give the same bits each time, so that a resumed run equals one left alone."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic  # its settings exist at run time only
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor, which the mode does to make reads of unwritten memory repeat, costs a tenth of a step.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
