"""What the backends that run programs on this machine share: a number of slots, and how an end becomes a result."""

import math
import os
import queue
import resource
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from types import TracebackType
from typing import Self

from cispo.errors import SandboxClosedError, SandboxError
from cispo.sandboxes.supervisor import Ended, Supervisor
from cispo.sandboxes.told import told_limit
from cispo.sandboxes.types import DEFAULT_LIMITS, NO_FILES, Capabilities, ExecResult, ExecStatus, Limits

MAX_OPEN_FILES = 256
# Address space of an interpreter that has done nothing yet, libraries included.
BASE_ADDRESS_SPACE_MIB = 64


class SlottedSandbox(ABC):
    """A sandbox with `workers` slots; `run` waits for a free one. A slot that fails is closed and later made anew."""

    def __init__(self, workers: int, *, own_user: bool = False) -> None:
        self._own_user = own_user
        self._owner_pid = os.getpid()
        self._idle: queue.LifoQueue[Supervisor | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._workers = workers
        self._made = 0
        self._lock = threading.Lock()
        self._is_closed = False

    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @abstractmethod
    def _run_in(
        self, supervisor: Supervisor, argv: Sequence[str], stdin: bytes, files: Mapping[str, bytes], limits: Limits
    ) -> ExecResult: ...

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] = NO_FILES,
        limits: Limits = DEFAULT_LIMITS,
    ) -> ExecResult:
        """See Sandbox.run."""
        check_files(files, limits)
        if os.getpid() != self._owner_pid:
            raise SandboxError(f"the sandbox belongs to process {self._owner_pid}; open one in each process")
        supervisor = self._idle.get()
        try:
            if self._is_closed:
                raise SandboxClosedError("the sandbox is closed; open another")
            if supervisor is None:
                supervisor = Supervisor(self._next_index(), own_user=self._own_user)
            result = self._run_in(supervisor, argv, stdin, files, limits)
        except BaseException as error:
            if supervisor is not None:
                supervisor.close()
            self._idle.put(None)
            if isinstance(error, OSError):
                raise SandboxError(f"the machine refused what a sandbox needs: {error}") from error
            raise
        self._idle.put(supervisor)
        return result

    def _next_index(self) -> int:
        with self._lock:
            self._made += 1
            return self._made

    def close(self) -> None:
        """See Sandbox.close. Waits for programs that run; calling it again does nothing."""
        if self._is_closed or os.getpid() != self._owner_pid:
            return
        self._is_closed = True
        for _ in range(self._workers):
            supervisor = self._idle.get()
            if supervisor is not None:
                supervisor.close()
        self._idle.put(None)  # wakes a late caller, who then finds the sandbox closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_files(files: Mapping[str, bytes], limits: Limits) -> None:
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise ValueError(f"file name {name!r} leaves the working folder; use a relative name without '..'")
    size = sum(map(len, files.values()))
    if size > limits.files_mib << 20:
        raise ValueError(f"the files hold {size} bytes; the limit files_mib is {limits.files_mib}")


def resource_limits(limits: Limits) -> list[tuple[int, tuple[int, int]]]:
    """Limits that every process inherits: the only ones without control groups, the gentler ones with them."""
    cpu_s = math.ceil(limits.cpu_s) + 1  # counted in ticks and for each process: only for when nobody watches
    address_space = (limits.memory_mib + BASE_ADDRESS_SPACE_MIB) << 20
    file_size = limits.files_mib << 20
    return [
        (resource.RLIMIT_CPU, (cpu_s, cpu_s + 1)),
        (resource.RLIMIT_AS, (address_space, address_space)),
        (resource.RLIMIT_FSIZE, (file_size, file_size)),
        (resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES)),
        (resource.RLIMIT_CORE, (1, 1)),  # 0 would still hand the dump to a program of the host; 1 does not
    ]


def conclude(ended: Ended, exit_code: int, limits: Limits) -> ExecResult:
    """`exit_code` is the program's own, as a shell reports it."""
    return ExecResult(
        status=_status(ended, exit_code, limits),
        exit_code=None if ended.stopped else exit_code,
        signal=None if ended.stopped else signal_of(exit_code),
        stdout=bytes(ended.stdout),
        stderr=bytes(ended.stderr),
        truncated=ended.stopped is ExecStatus.OUTPUT_LIMIT,
        wall_s=ended.wall_s,
        cpu_s=ended.cpu_s,
        peak_mib=ended.peak_mib,
    )


def signal_of(exit_code: int) -> int | None:
    """The number of the signal that an exit code of a shell's kind stands for."""
    number = exit_code - 128
    return number if number in signal.valid_signals() else None


def _status(ended: Ended, exit_code: int, limits: Limits) -> ExecStatus:
    if ended.stopped is not None:
        return ended.stopped
    if exit_code == 0:
        return ExecStatus.OK
    if ended.was_out_of_memory:
        return ExecStatus.MEMORY_LIMIT
    # The kernel ends a process by SIGXCPU at RLIMIT_CPU, and by SIGKILL a second later if it goes on.
    was_killed_late = exit_code == 128 + signal.SIGKILL and ended.cpu_s >= limits.cpu_s
    if exit_code == 128 + signal.SIGXCPU or was_killed_late:
        return ExecStatus.TIMEOUT
    return ExecStatus.DISK_LIMIT if exit_code == 128 + signal.SIGXFSZ else told_limit(bytes(ended.stderr))
