"""The training loop: sample, score, train, broadcast, log, maybe evaluate, save.

Synchronous: a step samples from the weights that the step before produced. Everything random is a function of the seed
and the step, and a checkpoint holds the learner's whole state, so a killed run that is resumed writes the same numbers
as one left alone.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from cispo.checkpoint import list_checkpoints
from cispo.crew import Crew
from cispo.data import load_prompts
from cispo.errors import RecipeError, RewardError, RunFolderError
from cispo.evaluation import Evaluation, describe_gain, evaluate
from cispo.group_metrics import add_groups
from cispo.metrics import StepMetrics, Sum
from cispo.preflight import check_start
from cispo.prompt_order import prompts_of_step
from cispo.ray_runtime import ray_session
from cispo.recipe.schema import TrainRecipe
from cispo.resources import resolve_policy
from cispo.rewards.statistics import verdict_shares
from cispo.run_folder import RunFolder, plain_settings
from cispo.types import Prompt, Score, ScoredGroup, ScoreStatus
from cispo.views import Views, open_views


def run_training(recipe: TrainRecipe, folder: RunFolder, *, resume: bool) -> None:
    """Train by the recipe and leave everything in the run folder; `resume` goes on from its newest checkpoint."""
    policy_path = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    prompts = load_prompts(recipe.data, base_path=recipe.base_path)
    heldout = load_prompts(recipe.evaluation.data, base_path=recipe.base_path) if recipe.evaluation else []
    check_start(recipe, policy_path, prompts, heldout)
    with (
        ray_session(recipe.ray),
        _views(recipe, folder) as views,
        closing(Crew(recipe, policy_path, cores=_cores(), with_learner=True)) as crew,
    ):
        _report_arithmetic(crew, views)
        run = _Run(recipe, folder, crew, views, prompts, heldout)
        run.start(resume=resume)
        for step in range(run.step + 1, recipe.steps + 1):
            run.take_step(step)
        run.finish()


def run_evaluation(recipe: TrainRecipe) -> None:
    """Measure the recipe's policy on its evaluation prompts and print the result."""
    if recipe.evaluation is None:
        raise RecipeError("evaluation: is null, so there is nothing to measure on; name its data")
    policy_path = resolve_policy(recipe.policy.path, base_path=recipe.base_path)
    heldout = load_prompts(recipe.evaluation.data, base_path=recipe.base_path)
    check_start(recipe, policy_path, None, heldout)
    with ray_session(recipe.ray), closing(Crew(recipe, policy_path, cores=_cores(), with_learner=False)) as crew:
        evaluation = evaluate(crew, heldout, recipe.evaluation, lambda done, total: None)
    if not evaluation.scored_completions:
        raise RewardError(str(evaluation))
    print(evaluation)


class _Run:
    """One run under way. `step` is the last step that is done."""

    def __init__(
        self,
        recipe: TrainRecipe,
        folder: RunFolder,
        crew: Crew,
        views: Views,
        prompts: Sequence[Prompt],
        heldout: Sequence[Prompt],
    ) -> None:
        self.recipe, self.folder, self.crew, self.views = recipe, folder, crew, views
        self.prompts, self.heldout = prompts, heldout
        self.step = 0
        self._before: Evaluation | None = None
        self._latest: Evaluation | None = None

    def start(self, *, resume: bool) -> None:
        """Bring weights and folder to where the run stands, and measure the policy that it started from."""
        checkpoints = list_checkpoints(self.folder.path / "checkpoints")
        if checkpoints:
            if not resume:
                raise RunFolderError(f"{self.folder.path} holds checkpoints; continue it with --resume")
            state = self.crew.load(checkpoints[-1])
            self.step = int(state["step"])
            self.views.message(f"resumed from {checkpoints[-1].name}")
        self.folder.truncate_after(self.step)
        if self.recipe.evaluation:
            # The policy that the run started from is what rollout workers hold until the first broadcast.
            self._before = self._evaluate()
            self.views.message(f"held-out before: {self._before}")
            if not self._before.scored_completions:
                # Before anything is done; later evaluations end no run, as by then there is something to lose.
                raise RewardError(
                    f"the evaluation before the first step: {self._before}; mend the reward, then give the same "
                    "command again"
                )
            if self.folder.last_step() is None:
                self.folder.append_metrics(0, self._before.metrics())
                self.views.step(0, self._before.metrics())
        self.crew.broadcast()
        if not checkpoints:
            self._save()

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
        self._add_reward_statistics(metrics)
        self.step = step
        if self._evaluates_after(step):
            self._latest = self._evaluate()
            metrics.update(self._latest.metrics())
        tokens = sum(rollout.completion_length_tokens for group in groups for rollout in group.rollouts)
        seconds = time.perf_counter() - started
        metrics.update({"time_s/step": seconds, "perf/completion_tokens_per_s": tokens / seconds})
        reduced = metrics.reduce()
        self.folder.append_metrics(step, reduced)
        self.views.step(step, reduced)
        if step % self.recipe.checkpoint.every_steps == 0 or step == self.recipe.steps:
            self._save()

    def finish(self) -> None:
        """Say what the run has gained."""
        if self._before is not None:
            after = self._latest or self._evaluate()
            for line in describe_gain(self._before, after):
                self.views.message(line)
        newest = list_checkpoints(self.folder.path / "checkpoints")[-1]
        self.views.message(f"policy: {newest / 'policy'}")

    def _sample_and_score(self, step: int, metrics: StepMetrics) -> list[ScoredGroup]:
        rollout = self.recipe.rollout
        chosen = prompts_of_step(self.prompts, rollout.prompts_per_step, seed=self.recipe.seed, step=step)
        groups, times = self.crew.sample_and_score(
            chosen.prompts,
            group_size=rollout.group_size,
            temperature=rollout.temperature,
            stream=f"epoch {chosen.epoch}",
            progress=self._progress("rollout"),
        )
        metrics.update(times)
        return groups

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

    def _evaluate(self) -> Evaluation:
        assert self.recipe.evaluation is not None
        return evaluate(self.crew, self.heldout, self.recipe.evaluation, self._progress("evaluation"))

    def _add_reward_statistics(self, metrics: StepMetrics) -> None:
        """Counters of the reward workers; what they hold depends on their caches, so all of them are times or perf."""
        for statistics in self.crew.reward_statistics():
            for name, value in statistics.items():
                metrics.add(name, Sum(value))

    def _save(self) -> None:
        self.crew.save(self.folder.checkpoint_path(self.step), {"step": self.step})

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
