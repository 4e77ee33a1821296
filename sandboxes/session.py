"""Sessions: a warm sandbox in which several commands run one after the other, with files that stay between them.

The sandbox of a session is as closed as one of `run`; session_server.py is its first process and starts the commands.
Between two commands nothing runs: what a command leaves behind is killed at its end. Files, and nothing else, stay. As
the commands of one session can spoil its files for the next, a verdict is never computed in a policy's own session:
hand what it made to a judge, which uses fresh ones.
"""

import json
import marshal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from cispo.errors import SandboxClosedError, SandboxError, SandboxLostError
from cispo.sandboxes import kill_witness, session_server
from cispo.sandboxes.bounds import check_files, signal_of
from cispo.sandboxes.told import told_limit
from cispo.sandboxes.types import NO_FILES, ExecResult, ExecStatus, Limits

SERVER_SOURCE = "".join(
    Path(file).read_text(encoding="utf-8") for file in (kill_witness.__file__, session_server.__file__)
)
START_TIMEOUT_S = 60.0
# A reply is late when it comes so much after the command's time by the clock: the machine may be busy.
REPLY_GRACE_S = 30.0
MAX_HEADER_BYTES = 4096
READ_BYTES = 1 << 16


class Channel(Protocol):
    """A byte stream to session_server.py and back; both raise SandboxError when it is broken or the time is over."""

    def send(self, data: bytes) -> None: ...

    def receive(self, deadline: float) -> bytes:
        """Some bytes, at least one."""

    def close(self) -> None: ...


class SocketChannel:
    """A socket whose other end is the first process of a sandbox."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, data: bytes) -> None:
        self._connection.settimeout(START_TIMEOUT_S)
        try:
            self._connection.sendall(data)
        except OSError as error:
            raise SandboxLostError(f"somebody outside killed a session's sandbox ({error})") from error

    def receive(self, deadline: float) -> bytes:
        self._connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self._connection.recv(READ_BYTES)
        except OSError as error:
            raise SandboxError(f"a session's sandbox does not answer ({error})") from error
        if not data:
            raise SandboxLostError("somebody outside killed a session's sandbox")
        return data

    def close(self) -> None:
        self._connection.close()


class Session:
    """One warm sandbox, used by one thread at a time; `close` it, or use it in a `with` statement."""

    def __init__(
        self,
        channel: Channel,
        limits: Limits,
        *,
        is_memory_bounded: bool,
        was_out_of_memory: Callable[[], bool],
        end: Callable[[], None],
    ) -> None:
        """is_memory_bounded: by the kernel, for all processes together; else their sum is looked at every 50 ms.
        was_out_of_memory: whether the kernel has killed for the session's memory since it was asked last.
        end: gives back what the session holds.

        knows_killers: as in Capabilities, as the last command was seen. is_idle: the last reply came whole.
        """
        self._is_memory_bounded = is_memory_bounded
        self._channel = channel
        self._limits = limits
        self._was_out_of_memory = was_out_of_memory
        self._end = end
        self._pending = bytearray()
        self._lock = threading.Lock()
        self._is_closed = False
        self.knows_killers = self.is_idle = False

    def begin(self, files: Mapping[str, bytes]) -> None:
        """Wait until the sandbox is there, and write files; the session is closed when that does not succeed."""
        try:
            self._read_header(time.monotonic() + START_TIMEOUT_S)
            if files and (result := self.run([], files=files)).status is not ExecStatus.OK:
                message = result.stderr.decode(errors="replace").strip()
                raise SandboxError(f"a session's files could not be written ({result.status}: {message})")
        except BaseException:
            self.close()
            raise

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        files: Mapping[str, bytes] = NO_FILES,
        limits: Limits | None = None,
    ) -> ExecResult:
        """Run one command in the folder /task, after writing `files` there. An empty `argv` only writes.

        Of `limits` (by default the session's) count wall_s, by the clock, cpu_s and output_kib; memory, processes and
        files are bounded for the session as a whole. Raises SandboxError when the sandbox fails, SandboxLostError when
        somebody outside killed it or the command; the session is then closed. ValueError when a file name leaves the
        folder.
        """
        limits = limits or self._limits
        check_files(files, self._limits)
        request = marshal.dumps((list(argv), dict(files), stdin, self._wire_limits(limits)), 2)
        with self._lock:
            if self._is_closed:
                raise SandboxClosedError("the session is closed; open another")
            started, self.is_idle = time.monotonic(), False
            try:
                self._channel.send(b"%d\n" % len(request) + request)
                header = self._read_header(started + limits.wall_s + REPLY_GRACE_S)
                self.knows_killers = bool(header.get("knows_killers"))
                sizes = [_size_in(header, name, limits) for name in ("stdout", "stderr")]
                stdout, stderr = (self._read(size, time.monotonic() + REPLY_GRACE_S) for size in sizes)
                self.is_idle = True
            except SandboxError:
                was_out_of_memory = self._was_out_of_memory()
                self._close()
                if was_out_of_memory:
                    wall_s = time.monotonic() - started
                    return ExecResult(ExecStatus.MEMORY_LIMIT, None, None, b"", b"", False, wall_s, 0.0, None)
                raise
            try:
                return _result(header, stdout, stderr, self._was_out_of_memory())
            except SandboxLostError:
                self._close()
                raise
            except (KeyError, TypeError, ValueError) as error:
                self._close()
                raise SandboxError("a session's sandbox answers with something else than a reply") from error

    def _wire_limits(self, limits: Limits) -> dict[str, Any]:
        return {
            "wall_s": limits.wall_s,
            "cpu_s": limits.cpu_s,
            "memory_bytes": 0 if self._is_memory_bounded else self._limits.memory_mib << 20,
            "output_bytes": limits.output_kib << 10,
        }

    def _read_header(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._pending:
            if len(self._pending) > MAX_HEADER_BYTES:
                raise SandboxError("a session's sandbox answers with something else than a reply; it was closed")
            self._pending += self._channel.receive(deadline)
        line, _, rest = self._pending.partition(b"\n")
        self._pending = rest
        try:
            header = json.loads(line)
        except ValueError as error:
            raise SandboxError("a session's sandbox answers with something else than a reply; it was closed") from error
        return header if isinstance(header, dict) else {}

    def _read(self, size: int, deadline: float) -> bytes:
        while len(self._pending) < size:
            self._pending += self._channel.receive(deadline)
        data = bytes(self._pending[:size])
        del self._pending[:size]
        return data

    def close(self) -> None:
        """End the sandbox with all that is in it; calling it again does nothing."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._channel.close()
            self._end()  # the sandbox ends when the channel does; this waits for it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _size_in(header: Mapping[str, Any], name: str, limits: Limits) -> int:
    size = header.get(name)
    if type(size) is not int or not 0 <= size <= limits.output_kib << 10:
        raise SandboxError("a session's sandbox announces more output than its limit; it was closed")
    return size


def _result(header: Mapping[str, Any], stdout: bytes, stderr: bytes, was_out_of_memory: bool) -> ExecResult:
    stopped, exit_code = str(header["stopped"]), int(header["exit_code"])
    was_out_of_memory = was_out_of_memory or bool(header["was_out_of_memory"])
    if header["was_killed"] and not stopped and not was_out_of_memory:
        raise SandboxLostError(f"somebody outside of the sandbox killed the command (signal {exit_code - 128})")
    if stopped:
        status = ExecStatus(stopped)
    elif exit_code == 0:
        status = ExecStatus.OK
    else:
        status = ExecStatus.MEMORY_LIMIT if was_out_of_memory else told_limit(stderr)
    return ExecResult(
        status=status,
        exit_code=None if stopped else exit_code,
        signal=None if stopped else signal_of(exit_code),
        stdout=stdout,
        stderr=stderr,
        truncated=status is ExecStatus.OUTPUT_LIMIT,
        wall_s=float(header["wall_s"]),
        cpu_s=float(header["cpu_s"]),
        peak_mib=None,
    )
