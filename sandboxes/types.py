"""The vocabulary of sandboxes: limits go in; an execution result or a verdict comes out.

All records are plain, frozen and picklable. None of them ever holds an expected value or the text of a test, so that
any of them may reach logs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from types import MappingProxyType, TracebackType
from typing import Protocol, Self

NO_FILES: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. Time-outs are decided by CPU seconds, so that a busy machine changes no verdict.

    wall_s: seconds by the clock, less those in which the program waited for a core; bounds programs that sleep.
    cpu_s: CPU seconds of the program and all its children.
    memory_mib: memory of the program and all its children, files in memory included.
    pids: processes and threads at one time.
    output_kib: bytes kept of stdout, and the same again of stderr; a program that writes more is stopped.
    files_mib: size of the writable folder, and of any one file.
    """

    wall_s: float = 10.0
    cpu_s: float = 5.0
    memory_mib: int = 256
    pids: int = 64
    output_kib: int = 1024
    files_mib: int = 64

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name) > 0:
                raise ValueError(f"limit {item.name} must be > 0, got {getattr(self, item.name)}")


DEFAULT_LIMITS = Limits()


class ExecStatus(StrEnum):
    """How an execution ended. A sandbox that fails itself raises SandboxError instead."""

    OK = "ok"
    RUNTIME_ERROR = "runtime_error"
    """It ended with an exit code other than 0, or by a signal."""
    TIMEOUT = "timeout"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    PROCESS_LIMIT = "process_limit"
    DISK_LIMIT = "disk_limit"
    """This one and the one before: it failed, and said that it was refused processes or space (told.py)."""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What one program did.

    exit_code: as a shell reports it (128 + signal number when a signal ended it); None when the sandbox ended it.
    signal: the number that an exit code above 128 stands for, else None. A program may also exit with such a code.
    stdout, stderr: the first `output_kib` of each; truncated says that there was more.
    cpu_s: CPU seconds of the program and its children, the start of the sandbox included.
    peak_mib: the most memory that the program and its children had together; None where the kernel does not tell.
    """

    status: ExecStatus
    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool
    wall_s: float
    cpu_s: float
    peak_mib: float | None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a sandbox enforces on this machine, as found when it was opened; False means: not enforced.

    memory_total and pids_total say that the kernel holds the limit for all processes of a program together. Without
    memory_total it holds for each process, and for their sum as sampled every 50 ms. knows_killers: a program that
    somebody outside killed raises SandboxLostError; else it cannot be told from one that killed itself.
    """

    backend: str
    is_isolated: bool
    seccomp: bool
    memory_total: bool
    pids_total: bool
    separate_user: bool
    python: str
    python_version: str
    knows_killers: bool = False


class Session(Protocol):
    """See session.Session."""

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] = NO_FILES,
        limits: Limits | None = None,
    ) -> ExecResult:
        """Run one command in /task with the files that earlier ones have left there."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class VerdictStatus(StrEnum):
    """What became of a program under its tests: the status of the first test that failed, or ok."""

    OK = "ok"
    WRONG_ANSWER = "wrong_answer"
    RUNTIME_ERROR = "runtime_error"
    TIMEOUT = "timeout"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    PROCESS_LIMIT = "process_limit"
    DISK_LIMIT = "disk_limit"
    REJECTED = "rejected"
    """The source does not compile, or does not define the entry point."""
    SANDBOX_ERROR = "sandbox_error"
    """The sandbox failed again and again: nothing is known of the program, and its sample must be masked."""


class TestStatus(StrEnum):
    """What became of one test."""

    __test__ = False

    PASSED = "passed"
    WRONG_ANSWER = "wrong_answer"
    RUNTIME_ERROR = "runtime_error"
    TIMEOUT = "timeout"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    PROCESS_LIMIT = "process_limit"
    DISK_LIMIT = "disk_limit"
    NOT_RUN = "not_run"
    """The program ended before this test's turn."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of judging one program.

    tests: one status a test, in their order.
    flags: what an auditor may want to see, such as `malformed_frames`; never a reason for the reward.
    is_well_formed: the source compiles, runs to its end as a module and defines the entry point as a callable.
    message: one line on why, without test text; empty when the status says it all.
    """

    status: VerdictStatus
    passed: int
    total: int
    tests: tuple[TestStatus, ...] = ()
    flags: tuple[str, ...] = ()
    is_well_formed: bool = False
    message: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0


class Sandbox(Protocol):
    """One kind of isolation, with slots for a number of programs at a time; `run` may be called from many threads."""

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] = NO_FILES,
        limits: Limits = DEFAULT_LIMITS,
    ) -> ExecResult:
        """Run one program in a fresh world whose working folder holds `files` (relative names); nothing outlives it.

        Raises SandboxError when the sandbox itself fails, of the kind SandboxLostError when somebody outside killed the
        program or what watches over it; ValueError when a file name leaves the folder.
        """

    def session(self, *, files: Mapping[str, bytes] = NO_FILES, limits: Limits = DEFAULT_LIMITS) -> "Session":
        """A warm sandbox in which several commands run one after the other, and files stay; close it.

        Raises as `run`; UnsupportedError where a backend has none.
        """

    def capabilities(self) -> Capabilities: ...

    def close(self) -> None:
        """End the helper processes and give back user ids and control groups; the sandbox cannot be used again."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
