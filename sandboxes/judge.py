"""The judges, each of which turns a program and its tests into a verdict computed outside of the program's process."""

from cispo.sandboxes.attempts import IMPATIENT_PAUSES_S, RETRY_PAUSES_S
from cispo.sandboxes.judge_asserts import judge_asserts
from cispo.sandboxes.judge_calls import judge_calls
from cispo.sandboxes.judge_repo import judge_repo
from cispo.sandboxes.judge_stdin import judge_stdin

__all__ = ["IMPATIENT_PAUSES_S", "RETRY_PAUSES_S", "judge_asserts", "judge_calls", "judge_repo", "judge_stdin"]
