"""The training loop: sample, score, train, broadcast, log, maybe evaluate, save.

With rollout.max_off_policy_steps k = 0 a step samples from the weights that the step before produced. Everything
random is a function of the seed and the step, and a checkpoint holds the learner's whole state, so a killed run that is
resumed writes the same numbers as one left alone.

With k > 0 the prompts of the next k steps are handed out too, and sampled while the learner trains. A step's prompts
are handed out when the learner has done all but k of the steps before it, so no token is older than k policy versions,
and each prompt belongs to its step as with k = 0: none is lost or seen twice, whatever dies.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from cispo.checkpoint import best_step, keep_best, list_checkpoints
from cispo.crew import Crew, Roles
from cispo.data import load_prompts
from cispo.errors import CispoError, LearnerLostError, RecipeError, RewardError, RunFolderError
from cispo.evaluation import Evaluation, HeldoutSet, describe_gain, evaluate, load_heldout
from cispo.group_metrics import add_groups
from cispo.length_windows import LengthWindows
from cispo.metrics import StepMetrics, Sum
from cispo.preflight import check_start
from cispo.prompt_order import StepPrompts, prompts_of_step
from cispo.ray_runtime import ray_session
from cispo.recipe.schema import TrainRecipe
from cispo.resources import resolve_policy
from cispo.rewards.statistics import verdict_shares
from cispo.rollout.recipe_request import group_request
from cispo.rollout.request import GroupRequest
from cispo.run_folder import RunFolder, plain_settings
from cispo.sampler import Collected
from cispo.schedule import write_schedule
from cispo.types import Prompt, Score, ScoredGroup, ScoreStatus
from cispo.unsolved_prompts import UnsolvedPrompts
from cispo.views import Views, open_views

LEARNER_DEATHS_AT_A_STEP = 3
"""Times that a learner may die after the same step before the run ends; it will not get beyond it."""


def run_training(recipe: TrainRecipe, folder: RunFolder, *, resume: bool, roles: Roles | None = None) -> None:
    """Train by the recipe and leave everything in the run folder; `resume` goes on from its newest checkpoint.

    roles: the classes of the actors, for who watches or hinders them.
    """
    policy_path = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    prompts = load_prompts(recipe.data, base_path=recipe.base_path)
    heldout = load_heldout(recipe.evaluation, base_path=recipe.base_path)
    check_start(recipe, policy_path, prompts, heldout)
    roles = roles or Roles()
    with (
        ray_session(recipe.ray),
        _views(recipe, folder) as views,
        closing(Crew(recipe, policy_path, cores=_cores(), with_learner=True, say=views.message, roles=roles)) as crew,
    ):
        _report_arithmetic(crew, views)
        run = _Run(recipe, folder, crew, views, prompts, heldout)
        run.start(resume=resume)
        run.take_steps()
        run.finish()


def run_evaluation(recipe: TrainRecipe) -> None:
    """Measure the recipe's policy on its evaluation prompts and print the result of each set."""
    if recipe.evaluation is None:
        raise RecipeError("evaluation: is null, so there is nothing to measure on; name its data")
    policy_path = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    heldout = load_heldout(recipe.evaluation, base_path=recipe.base_path)
    check_start(recipe, policy_path, None, heldout)
    with ray_session(recipe.ray), closing(Crew(recipe, policy_path, cores=_cores(), with_learner=False)) as crew:
        for each in heldout:
            evaluation = evaluate(crew, each, recipe.rollout, lambda done, total: None)
            text = f"{each.name}: {evaluation}" if len(heldout) > 1 else str(evaluation)
            if not evaluation.scored_completions:
                raise RewardError(text)
            print(text, flush=True)


class _Run:
    """One run under way. `step` is the last step that is done."""

    def __init__(
        self,
        recipe: TrainRecipe,
        folder: RunFolder,
        crew: Crew,
        views: Views,
        prompts: Sequence[Prompt],
        heldout: Sequence[HeldoutSet],
    ) -> None:
        self.recipe, self.folder, self.crew, self.views = recipe, folder, crew, views
        self.prompts, self.heldout = prompts, heldout
        self.step = 0
        self._before: list[Evaluation] = []
        self._latest: list[Evaluation] = []
        self._under_way: dict[int, list[GroupRequest]] = {}
        self._lost_after: list[int] = []
        self._windows: LengthWindows | None = None
        if recipe.rollout.length_windows is not None:
            self._windows = LengthWindows(recipe.rollout.length_windows, recipe.rollout.max_completion_tokens)
        self._unsolved: UnsolvedPrompts | None = None
        if recipe.rollout.drop_solved_at is not None:
            self._unsolved = UnsolvedPrompts(
                prompts, recipe.rollout.prompts_per_step, seed=recipe.seed, solved_at=recipe.rollout.drop_solved_at
            )

    def start(self, *, resume: bool) -> None:
        """Bring weights and folder to where the run stands, and measure the policy that it started from."""
        checkpoints = list_checkpoints(self.folder.path / "checkpoints")
        if checkpoints:
            if not resume:
                raise RunFolderError(f"{self.folder.path} holds checkpoints; continue it with --resume")
            self._restore(self.crew.load(checkpoints[-1]))
            self.views.message(f"resumed from {checkpoints[-1].name}")
        self.folder.truncate_after(self.step)
        self.crew.quarantine(self.folder.read_quarantine())
        if self.heldout:
            self._measure_before()
        self.crew.broadcast()
        if not checkpoints:
            self._save()

    def _measure_before(self) -> None:
        """Evaluate what rollout workers hold until the first broadcast: the policy that the run started from."""
        self._before = self._evaluate()
        for evaluation in self._before:
            self.views.message(f"{evaluation.title} before: {evaluation}")
            if not evaluation.scored_completions:
                # Before anything is done; later evaluations end no run, as by then there is something to lose.
                raise RewardError(
                    f"the evaluation before the first step: {evaluation}; mend the reward, then give the same "
                    "command again"
                )
        if self.folder.last_step() is None:
            metrics = _metrics_of(self._before)
            self.folder.append_metrics(0, metrics)
            self.views.step(0, metrics)

    def take_steps(self) -> None:
        """All steps to the last. A learner that dies is started again from the last checkpoint, some times."""
        while self.step < self.recipe.steps:
            try:
                self.take_step(self.step + 1)
            except LearnerLostError as lost:
                self._recover(lost)

    def take_step(self, step: int) -> None:
        started = time.perf_counter()
        metrics = StepMetrics()
        groups = self._sample_and_score(step, metrics)
        add_groups(metrics, groups, full_reward=sum(max(reward.weight, 0.0) for reward in self.recipe.rewards))
        metrics.update(verdict_shares([score for group in groups for score in group.scores]))
        self.folder.write_rollouts(step, groups)
        self._report_failed_rewards(step, [score for group in groups for score in group.scores])
        self.views.phase("train", 0, 0)
        metrics.update(self.crew.train(groups, step))
        metrics.update(self.crew.broadcast())
        if self.recipe.rollout.max_off_policy_steps:
            write_schedule(self.folder, step, groups, self.crew.weights_checksum)
        self._add_reward_statistics(metrics)
        self.step = step
        if self._unsolved is not None:
            self._unsolved.record(groups)
            metrics.update({"group/left_out_solved": float(self._unsolved.left_out(step))})
        metrics.update(self._record_lengths(self._under_way.pop(step), groups))
        if self._evaluates_after(step):
            self._latest = self._evaluate()
            metrics.update(_metrics_of(self._latest))
        tokens = sum(rollout.completion_length_tokens for group in groups for rollout in group.rollouts)
        seconds = time.perf_counter() - started
        metrics.update({"time_s/step": seconds, "perf/completion_tokens_per_s": tokens / seconds})
        metrics.update(self.crew.counts().metrics(seconds, self.recipe.rollout.workers))
        reduced = metrics.reduce()
        self.folder.append_metrics(step, reduced)
        self.views.step(step, reduced)
        if self._saves_after(step, reduced):
            self._save()

    def finish(self) -> None:
        """Say what the run has gained."""
        if self._before:
            for before, after in zip(self._before, self._latest or self._evaluate(), strict=True):
                for line in describe_gain(before, after):
                    self.views.message(line)
        newest = list_checkpoints(self.folder.path / "checkpoints")[-1]
        self.views.message(f"policy: {newest / 'policy'}")

    def _sample_and_score(self, step: int, metrics: StepMetrics) -> list[ScoredGroup]:
        """The step's groups; those of the steps that may run ahead are handed out first."""
        last = min(step + self.recipe.rollout.max_off_policy_steps, self.recipe.steps)
        for ahead in range(step, last + 1):
            if ahead not in self._under_way:
                self._under_way[ahead] = self._requests(ahead)
                self.crew.submit(self._under_way[ahead])
        collected = self.crew.collect(self._under_way[step], self._progress("rollout"))
        metrics.update(collected.times)
        self._report_unsampled(step, collected)
        if collected.failed:
            metrics.update({"faults/unsampled": float(len(collected.failed))})
        return collected.groups

    def _requests(self, step: int) -> list[GroupRequest]:
        rollout = self.recipe.rollout
        chosen = self._prompts_of(step)
        size, temperature, stream = rollout.group_size, rollout.temperature, f"epoch {chosen.epoch}"
        request = partial(group_request, rollout=rollout, group_size=size, temperature=temperature, stream=stream)
        window = None if self._windows is None else self._windows.tokens
        return [request(prompt, max_new_tokens=window) for prompt in chosen.prompts]

    def _prompts_of(self, step: int) -> StepPrompts:
        if self._unsolved is not None:
            return self._unsolved.prompts_of_step(step)
        return prompts_of_step(self.prompts, self.recipe.rollout.prompts_per_step, seed=self.recipe.seed, step=step)

    def _report_unsampled(self, step: int, collected: Collected) -> None:
        """Say which prompts have no group; CispoError where none has one."""
        self.folder.write_quarantine(self.crew.quarantined)
        if not collected.failed:
            return
        first = next(iter(collected.failed.items()))
        what = f"step {step}: {len(collected.failed)} prompts have no completions, the first {first[0]}: {first[1]}"
        if not collected.groups:
            raise CispoError(f"{what}; none has any: look at log.txt, then continue with --resume")
        self.views.message(f"warning: {what}")

    def _recover(self, lost: LearnerLostError) -> None:
        """Go back to the last checkpoint with a learner started anew; the error itself once that helps no more."""
        self._lost_after.append(self.step)
        if self._lost_after.count(self.step) > LEARNER_DEATHS_AT_A_STEP:
            raise lost
        newest = list_checkpoints(self.folder.path / "checkpoints")[-1]
        self.views.message(f"step {self.step + 1}: {lost}; the learner starts again from {newest.name}")
        self._under_way.clear()
        self.crew.restart_learner()
        self._restore(self.crew.load(newest))
        self.folder.truncate_after(self.step)
        self.crew.broadcast()

    def _record_lengths(self, requests: list[GroupRequest], groups: list[ScoredGroup]) -> dict[str, float]:
        """A step's metrics of its window, the one it was handed out with; nothing without rollout.length_windows."""
        windows, handed_out = self._windows, requests[0].stops.max_new_tokens
        if windows is None or handed_out is None:
            return {}
        before = windows.tokens
        metrics = windows.record(groups, handed_out)
        if windows.tokens != before:
            self.views.message(f"completions asked for from now on may have {windows.tokens:,} tokens, not {before:,}")
        return metrics

    def _report_failed_rewards(self, step: int, scores: Sequence[Score]) -> None:
        """Say what a reward said. Where all failed nothing is left to learn from, so the run stops as it stands.

        Nothing of the step has changed the learner yet: a resumed run samples the same completions and scores them
        anew, so what a mended reward gives is what it would have given the first time.
        """
        failed = [score.message for score in scores if score.status is not ScoreStatus.OK]
        if not failed:
            return
        if len(failed) < len(scores):
            self.views.message(
                f"warning: step {step}: the reward failed for {len(failed)} of {len(scores)} completions, which are "
                f"left out; the first: {failed[0]}"
            )
            return
        if self.step not in self.folder.checkpoint_steps():
            self._save()
        raise RewardError(
            f"step {step}: the reward failed for all {len(failed)} completions, the first: {failed[0]}; the run is "
            "kept as it was before that step: mend the reward, then continue with --resume"
        )

    def _evaluates_after(self, step: int) -> bool:
        evaluation = self.recipe.evaluation
        if evaluation is None:
            return False
        return step == self.recipe.steps or (evaluation.every_steps > 0 and step % evaluation.every_steps == 0)

    def _evaluate(self) -> list[Evaluation]:
        """Of each set, in their order."""
        progress = self._progress("evaluation")
        return [evaluate(self.crew, each, self.recipe.rollout, progress) for each in self.heldout]

    def _add_reward_statistics(self, metrics: StepMetrics) -> None:
        """Counters of the reward workers; what they hold depends on their caches, so all of them are times or perf."""
        for statistics in self.crew.reward_statistics():
            for name, value in statistics.items():
                metrics.add(name, Sum(value))

    def _saves_after(self, step: int, metrics: Mapping[str, float]) -> bool:
        checkpoint = self.recipe.checkpoint
        if step % checkpoint.every_steps == 0 or step == self.recipe.steps:
            return True
        best = checkpoint.keep_best
        return best is not None and best in metrics and best_step(self.folder.read_metrics(), best) == step

    def _save(self) -> None:
        path, best = self.folder.checkpoint_path(self.step), self.recipe.checkpoint.keep_best
        if best is not None:
            # Before the save, which removes older checkpoints.
            keep_best(path.parent, self.folder.read_metrics(), best)
        parts = {"unsolved": self._unsolved, "length_windows": self._windows}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        self.crew.save(path, {"step": self.step, **states})

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take the loop's own state from a checkpoint's."""
        self.step = int(state["step"])
        if self._unsolved is not None:
            self._unsolved.load_state_dict(state.get("unsolved", {}))
        if self._windows is not None:
            self._windows.load_state_dict(state.get("length_windows", {}))

    def _progress(self, phase: str) -> Callable[[int, int], None]:
        return lambda done, total: self.views.phase(phase, done, total)


def _views(recipe: TrainRecipe, folder: RunFolder) -> Views:
    return open_views(
        folder.path,
        name=recipe.name,
        steps=recipe.steps,
        recipe=plain_settings(recipe),
        console=recipe.logging.console,
        wandb=recipe.logging.wandb,
        wandb_project=recipe.logging.wandb_project,
        ray_metrics=True,
    )


def _metrics_of(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    return {name: value for evaluation in evaluations for name, value in evaluation.metrics().items()}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _report_arithmetic(crew: Crew, views: Views) -> None:
    """Where products depend on the rows beside a row, rollout and learner will disagree a little: say so at once."""
    shapes = crew.row_dependent_shapes()
    if shapes:
        views.message(
            f"warning: on this machine products of {', '.join(shapes)} round a row by the rows beside it; "
            "expect mismatch between rollout and learner (policy/mismatch)"
        )
