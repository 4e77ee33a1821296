"""Running a program for a judge: a sandbox that fails is tried again, a program that was shot by mistake too."""

import signal
import time
from collections.abc import Mapping, Sequence

from cispo.errors import SandboxClosedError, SandboxError
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
# Signals by which processes end each other, as exit codes: a program does not come by them through its own mistakes.
KILLED_EXIT_CODES = frozenset(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM))
KILLED_RUNS = 8

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
        except SandboxError as error:
            message = str(error)
            if isinstance(error, SandboxClosedError):
                break
    elapsed_s = time.monotonic() - started
    raise FailedAttemptsError(f"the sandbox failed (attempts: {attempts}, in {elapsed_s:.0f} s): {message}")


def _run(
    sandbox: Sandbox, argv: Sequence[str], stdin: bytes, files: Mapping[str, bytes], limits: Limits
) -> ExecResult:
    """Run a program; one that was killed though it met no limit is run again, since the shot may have been a stray one.

    The kernel kills for others' want of memory, and who kills by a process number may hit whoever has it by then; on a
    busy machine numbers come round within seconds. Who kills itself does so every time, and that is then its result.
    """
    for _ in range(KILLED_RUNS - 1):
        result = sandbox.run(argv, stdin=stdin, files=files, limits=limits)
        if result.status is not ExecStatus.RUNTIME_ERROR or result.exit_code not in KILLED_EXIT_CODES:
            return result
    return sandbox.run(argv, stdin=stdin, files=files, limits=limits)


def unknown_verdict(error: FailedAttemptsError, total: int) -> Verdict:
    """The verdict where the sandbox failed to the last: no reward, the sample is masked."""
    tests = (TestStatus.NOT_RUN,) * total
    return Verdict(VerdictStatus.SANDBOX_ERROR, passed=0, total=total, tests=tests, message=str(error))
