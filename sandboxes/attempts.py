"""Running a program for a judge: a sandbox that fails is tried again, a program that others killed too."""

import time
from collections.abc import Mapping, Sequence

from cispo.errors import SandboxClosedError, SandboxError, SandboxLostError
from cispo.sandboxes.kill_witness import DEADLY_EXIT_CODES
from cispo.sandboxes.types import (
    NO_FILES,
    ExecResult,
    ExecStatus,
    Limits,
    Sandbox,
    TestStatus,
    Verdict,
    VerdictStatus,
)

# Pauses before the attempts after the first. A machine short of processes or memory has them again within seconds.
RETRY_PAUSES_S = (0.05, 0.2, 1.0, 3.0, 8.0)
# For a sandbox that has just failed at all of those: each program of a step would wait for nothing.
IMPATIENT_PAUSES_S = (0.2,)
# Attempts begin no later than this; one that waits for a core in vain is slow by itself.
RETRY_TIME_S = 120.0
# A program that somebody outside killed is run again at once, so often; where the sandbox cannot tell who killed it,
# a program that is killed each time has done it itself. On a machine that kills half of all programs, one in ten
# million is given up.
LOST_RUNS = 24
LOST_TIME_S = 600.0
LOST_PAUSE_S = 0.05

# How the end of the whole program reads as the status of the test that was running.
END_STATUS = {
    ExecStatus.OK: TestStatus.RUNTIME_ERROR,
    ExecStatus.RUNTIME_ERROR: TestStatus.RUNTIME_ERROR,
    ExecStatus.TIMEOUT: TestStatus.TIMEOUT,
    ExecStatus.MEMORY_LIMIT: TestStatus.MEMORY_LIMIT,
    ExecStatus.OUTPUT_LIMIT: TestStatus.OUTPUT_LIMIT,
    ExecStatus.PROCESS_LIMIT: TestStatus.PROCESS_LIMIT,
    ExecStatus.DISK_LIMIT: TestStatus.DISK_LIMIT,
}


class FailedAttemptsError(SandboxError):
    """The sandbox failed at every attempt; nothing is known of the program."""


def run_patiently(
    sandbox: Sandbox,
    argv: Sequence[str],
    limits: Limits,
    *,
    stdin: bytes = b"",
    files: Mapping[str, bytes] = NO_FILES,
    pauses_s: Sequence[float] = RETRY_PAUSES_S,
) -> ExecResult:
    """Run a program, again after each of the pauses while the sandbox fails; FailedAttemptsError at the last."""
    started, attempts, message = time.monotonic(), 0, ""
    for pause_s in (0.0, *pauses_s):
        if time.monotonic() - started + pause_s > RETRY_TIME_S:
            break
        time.sleep(pause_s)
        attempts += 1
        try:
            return _run(sandbox, argv, stdin, files, limits)
        except (SandboxClosedError, SandboxLostError) as error:
            message = str(error)
            break
        except SandboxError as error:
            message = str(error)
    elapsed_s = time.monotonic() - started
    raise FailedAttemptsError(f"the sandbox failed (attempts: {attempts}, in {elapsed_s:.0f} s): {message}")


def _run(
    sandbox: Sandbox, argv: Sequence[str], stdin: bytes, files: Mapping[str, bytes], limits: Limits
) -> ExecResult:
    """Run a program until nobody outside kills it; SandboxLostError when it was killed to the last.

    The kernel kills for others' want of memory, and who kills by a process number may hit whoever has it by then. A
    program that contrives to be killed in a way that tells nothing of itself (kill_witness.py) gets no verdict.
    """
    started = time.monotonic()
    for runs_left in reversed(range(LOST_RUNS)):
        is_last = not runs_left or time.monotonic() - started > LOST_TIME_S
        try:
            result = sandbox.run(argv, stdin=stdin, files=files, limits=limits)
        except SandboxLostError as error:
            if is_last:
                raise SandboxLostError(f"killed {LOST_RUNS - runs_left} times in a row, at last: {error}") from error
        else:
            was_killed = result.status is ExecStatus.RUNTIME_ERROR and result.exit_code in DEADLY_EXIT_CODES
            if is_last or not was_killed or sandbox.capabilities().knows_killers:
                return result
        time.sleep(LOST_PAUSE_S)
    raise AssertionError("the last run returns or raises")


def unknown_verdict(error: FailedAttemptsError, total: int) -> Verdict:
    """The verdict where the sandbox failed to the last: no reward, the sample is masked."""
    tests = (TestStatus.NOT_RUN,) * total
    return Verdict(VerdictStatus.SANDBOX_ERROR, passed=0, total=total, tests=tests, message=str(error))
