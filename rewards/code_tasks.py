"""A code task and a program, to the judge that the task is for."""

from collections.abc import Mapping, Sequence

from cispo.rewards.code_schemas import AssertTask, CallTask, CodeTask, StdinTask
from cispo.sandboxes.judge import judge_asserts, judge_calls, judge_repo, judge_stdin
from cispo.sandboxes.types import Limits, Sandbox, Verdict


def run_task(
    sandbox: Sandbox,
    code: str,
    files: Mapping[str, str],
    task: CodeTask,
    limits: Limits,
    pauses_s: Sequence[float],
) -> Verdict:
    """The verdict on `code`, or on `files` for a repository. Raises ValueError when the task itself is at fault."""
    if isinstance(task, CallTask):
        return judge_calls(sandbox, code, task.entry_point, task.tests, limits, pauses_s=pauses_s)
    if isinstance(task, StdinTask):
        return judge_stdin(sandbox, code, task.tests, limits, pauses_s=pauses_s)
    if isinstance(task, AssertTask):
        # Python wants imports from __future__ first.
        source = code if "__future__" in code else f"{task.prelude}\n\n{code}"
        return judge_asserts(sandbox, source, task.test_source, task.entry_point, limits, pauses_s=pauses_s)
    return judge_repo(sandbox, task.base_files, files, task.hidden_tests, task.must_pass, limits, pauses_s=pauses_s)
