"""All rewards of a recipe together: a group of completions goes in, one Score each comes out.

The value is the sum of weight * value over the rewards. Each reward's own value is a part by its name, and the parts
and info that it gives are kept; where two rewards give the same name, the later one's is `reward.name`. A reward that
raises, takes too long, or returns no finite number makes the Score an error, which masks the sample; it never counts as
0 and never ends the run. Functions of the user's run in this process; text of the policy's is never run here.
"""

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cispo.errors import SandboxError
from cispo.rewards.code_schemas import CallTask, CodeTask
from cispo.rewards.code_tasks import run_task
from cispo.rewards.length_bias import LengthBias
from cispo.rewards.loaded import LoadedReward, load_rewards
from cispo.rewards.outcome import add_scores, as_score
from cispo.rewards.plugin_thread import PluginThread
from cispo.rewards.settings import RewardSettings
from cispo.rewards.statistics import Counters
from cispo.sandboxes.backends import open_sandbox
from cispo.sandboxes.judge import IMPATIENT_PAUSES_S, RETRY_PAUSES_S
from cispo.sandboxes.settings import SandboxSettings
from cispo.sandboxes.types import Sandbox, Verdict, VerdictStatus
from cispo.sandboxes.verdict_cache import VerdictCache, verdict_key
from cispo.types import Group, Rollout, Score, ScoreStatus


class RewardSet:
    """Opens a sandbox if a reward takes a `judge`; `close` it. One thread at a time may score.

    Raises RewardError when a reward cannot be found or called with its args, SandboxError when there is no sandbox.
    """

    def __init__(
        self,
        rewards: Sequence[RewardSettings],
        sandbox: SandboxSettings,
        *,
        base_path: Path,
        max_completion_tokens: int,
    ) -> None:
        self._rewards = load_rewards(rewards, base_path)
        self._max_completion_tokens = max_completion_tokens
        self._limits = sandbox.limits()
        self._cache = VerdictCache()
        self._counters = Counters()
        self._sandbox = _open(sandbox) if any(reward.needs_sandbox for reward in self._rewards) else None
        self._has_sandbox_failed = False
        self._length_bias = {
            reward.label: LengthBias(reward.label) for reward in self._rewards if reward.settings.name == "judge"
        }
        self._pool = ThreadPoolExecutor(sandbox.workers, thread_name_prefix="reward")
        self._plugins = PluginThread()

    def score(self, group: Group) -> tuple[Score, ...]:
        """One score for each rollout of the group, in order. Raises nothing for what a reward or a sandbox does."""
        columns = [self._run(reward, group) for reward in self._rewards]
        self._watch_lengths(group, columns)
        rows = [[column[index] for column in columns] for index in range(len(group.rollouts))]
        return tuple(add_scores(self._rewards, row) for row in rows)

    def judge(self, code: str, entry_point: str, tests: Sequence[Mapping[str, Any]]) -> Verdict:
        """The verdict on a program, from memory where it is known. A failing sandbox gives the status sandbox_error."""
        key = verdict_key(code, entry_point, tests, self._limits)
        verdict = self._cache.get_or_judge(key, partial(self._execute, code, entry_point, tests))
        self._counters.count_verdict()
        return verdict

    def judge_task(self, code: str, files: Mapping[str, str], task: CodeTask) -> Verdict:
        """As judge, for a task of any kind; `files` are what a repository gets in place of `code`."""
        if isinstance(task, CallTask):
            return self.judge(code, task.entry_point, task.tests)
        text = repr((type(task).__name__, task, code, sorted(files.items()), self._limits))
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        verdict = self._cache.get_or_judge(key, partial(self._execute_task, code, files, task))
        self._counters.count_verdict()
        return verdict

    def _execute(self, code: str, entry_point: str, tests: Sequence[Mapping[str, Any]]) -> Verdict:
        return self._execute_task(code, {}, CallTask(entry_point, [dict(test) for test in tests]))

    def _execute_task(self, code: str, files: Mapping[str, str], task: CodeTask) -> Verdict:
        if self._sandbox is None:
            raise SandboxError("no reward of the recipe takes `judge`, so no sandbox was opened")
        # A broken sandbox is given all the time it may need once, and not again by every program of the step.
        pauses_s = IMPATIENT_PAUSES_S if self._has_sandbox_failed else RETRY_PAUSES_S
        verdict = run_task(self._sandbox, code, files, task, self._limits, pauses_s)
        self._has_sandbox_failed = verdict.status is VerdictStatus.SANDBOX_ERROR
        self._counters.count_execution(verdict)
        return verdict

    def _run(self, reward: LoadedReward, group: Group) -> list[Score]:
        """The scores of one reward. Built-ins run side by side, the user's functions in turn unless they are async."""
        calls = [partial(self._call, reward, group, rollout) for rollout in group.rollouts]
        if reward.scores_groups:
            whole = _outcome(partial(self._call_for_group, reward, group))
            outcomes = whole if isinstance(whole, list) else [whole] * len(calls)
        elif reward.is_built_in and not inspect.iscoroutinefunction(reward.function):
            outcomes = list(self._pool.map(_outcome, calls))
        else:
            outcomes = self._plugins.run_all(calls, reward.settings.timeout_s)
        pairs = zip(group.rollouts, outcomes, strict=True)
        return [as_score(reward, group.prompt.id, rollout, outcome) for rollout, outcome in pairs]

    def _call(self, reward: LoadedReward, group: Group, rollout: Rollout) -> Any:
        supplied = {
            "completion_length_tokens": rollout.completion_length_tokens,
            "max_completion_tokens": self._max_completion_tokens,
            "is_truncated": rollout.is_truncated,
            "judge": self.judge,
            "judge_task": self.judge_task,
        }
        # A function that changes a list of its row must not change it for the next completion or reward.
        row = group.prompt.row if reward.is_built_in else copy.deepcopy(dict(group.prompt.row))
        return reward.function(group.prompt.text, rollout.text, **reward.keywords(row, supplied))

    def _call_for_group(self, reward: LoadedReward, group: Group) -> Any:
        supplied = {"sandbox": self._sandbox, "limits": self._limits}
        texts = [rollout.text for rollout in group.rollouts]
        return reward.function(group.prompt.text, texts, **reward.keywords(group.prompt.row, supplied))

    def _watch_lengths(self, group: Group, columns: Sequence[Sequence[Score]]) -> None:
        """Show the scores of a model that grades to its LengthBias, by what other rewards say is correct."""
        correct = [
            tuple(column[index].parts["correct"] for column in columns if "correct" in column[index].parts)
            for index in range(len(group.rollouts))
        ]
        for reward, column in zip(self._rewards, columns, strict=True):
            if reward.label in self._length_bias:
                self._length_bias[reward.label].add(
                    (correct[index], rollout.completion_length_tokens, column[index].value)
                    for index, rollout in enumerate(group.rollouts)
                    if column[index].status is ScoreStatus.OK
                )

    def statistics(self) -> dict[str, float]:
        """Counts since the last call, by metric name, to be added up over reward workers; empty without verdicts."""
        return self._counters.take()

    def close(self) -> None:
        """End the sandbox and the threads; calling it again does nothing."""
        self._pool.shutdown(cancel_futures=True)
        self._plugins.close()
        if self._sandbox is not None:
            self._sandbox.close()


def _open(settings: SandboxSettings) -> Sandbox:
    return open_sandbox(
        settings.backend, workers=settings.workers, image=settings.image, runtime=settings.runtime
    )


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # becomes a score with status error
        return error
