"""What the backends that run programs on this machine share: a number of slots, and how an end becomes a result."""

import os
import queue
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from cispo.errors import SandboxClosedError, SandboxError, SandboxLostError, UnsupportedError
from cispo.sandboxes.bounds import check_files, signal_of
from cispo.sandboxes.kill_witness import DEADLY_EXIT_CODES
from cispo.sandboxes.session import Session, SocketChannel
from cispo.sandboxes.supervisor import Ended, Job, Supervisor
from cispo.sandboxes.told import told_limit
from cispo.sandboxes.types import DEFAULT_LIMITS, NO_FILES, Capabilities, ExecResult, ExecStatus, Limits


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
        self._resting: list[Supervisor] = []
        self._sessions: set[Session] = set()
        self._is_closed = False

    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @abstractmethod
    def _run_in(
        self, supervisor: Supervisor, argv: Sequence[str], stdin: bytes, files: Mapping[str, bytes], limits: Limits
    ) -> Ended: ...

    @abstractmethod
    def _result(self, ended: Ended, limits: Limits) -> ExecResult: ...

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
            ended = self._run_in(supervisor, argv, stdin, files, limits)
        except BaseException as error:
            if supervisor is not None:
                supervisor.close()
            self._idle.put(None)
            if isinstance(error, OSError):
                raise SandboxError(f"the machine refused what a sandbox needs: {error}") from error
            raise
        self._idle.put(supervisor)
        return self._result(ended, limits)

    def session(self, *, files: Mapping[str, bytes] = NO_FILES, limits: Limits = DEFAULT_LIMITS) -> Session:
        """See Sandbox.session. Sessions have slots of their own, beside those of `workers`."""
        check_files(files, limits)
        if os.getpid() != self._owner_pid:
            raise SandboxError(f"the sandbox belongs to process {self._owner_pid}; open one in each process")
        with self._lock:
            if self._is_closed:
                raise SandboxClosedError("the sandbox is closed; open another")
            supervisor = self._resting.pop() if self._resting else None
        try:
            supervisor = supervisor or Supervisor(self._next_index(), own_user=self._own_user)
            session = self._start_session(supervisor, limits)
        except BaseException as error:
            if supervisor is not None:
                supervisor.close()
            if isinstance(error, OSError):
                raise SandboxError(f"the machine refused what a sandbox needs: {error}") from error
            raise
        session.begin(files)
        with self._lock:
            is_late = self._is_closed
            self._sessions |= set() if is_late else {session}
        if is_late:
            session.close()
            raise SandboxClosedError("the sandbox is closed; open another")
        return session

    def _session_job(self, supervisor: Supervisor, limits: Limits) -> Job:
        """What starts session_server.py as the first process of a sandbox."""
        raise UnsupportedError("this backend has no sessions; use bubblewrap or docker")

    def _start_session(self, supervisor: Supervisor, limits: Limits) -> Session:
        job = self._session_job(supervisor, limits)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                watch = supervisor.start(job, theirs.fileno())
        except BaseException:
            ours.close()
            raise

        def end() -> None:
            self._end_session(session, supervisor)

        session = Session(
            SocketChannel(ours),
            limits,
            is_memory_bounded=supervisor.cgroup is not None and supervisor.cgroup.memory is not None,
            was_out_of_memory=watch.has_run_out_of_memory_since,
            end=end,
        )
        return session

    def _end_session(self, session: Session, supervisor: Supervisor) -> None:
        """Keep the slot for the next session, unless there are enough or something is wrong with it."""
        is_kept = False
        try:
            supervisor.stop()
            with self._lock:
                is_kept = not self._is_closed and len(self._resting) < self._workers
                self._resting += [supervisor] if is_kept else []
        finally:
            with self._lock:
                self._sessions.discard(session)
            if not is_kept:
                supervisor.close()

    def _next_index(self) -> int:
        with self._lock:
            self._made += 1
            return self._made

    def close(self) -> None:
        """See Sandbox.close. Waits for programs that run; calling it again does nothing."""
        if self._is_closed or os.getpid() != self._owner_pid:
            return
        with self._lock:
            self._is_closed = True
            sessions, resting = list(self._sessions), self._resting
        for session in sessions:
            session.close()
        for supervisor in [*resting, *(self._idle.get() for _ in range(self._workers))]:
            if supervisor is not None:
                supervisor.close()
        self._idle.put(None)  # wakes a late caller, who then finds the sandbox closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def conclude(ended: Ended, exit_code: int, limits: Limits) -> ExecResult:
    """`exit_code` is the program's own, as a shell reports it. SandboxLostError where somebody outside killed it."""
    testimony = ended.testimony
    is_explained = ended.stopped is not None or ended.was_out_of_memory or ended.cpu_s >= limits.cpu_s
    if exit_code in DEADLY_EXIT_CODES and testimony.is_available and not (is_explained or testimony.has_own_doing):
        raise SandboxLostError(f"somebody outside of the sandbox killed the program (signal {exit_code - 128})")
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
