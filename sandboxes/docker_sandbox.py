"""The backend `docker`: each program in a container of its own that is removed afterwards, through the docker SDK.

A container has no network, a read-only root, no capabilities and no way to gain any, the daemon's seccomp filter, a
user id that owns nothing, and two writable folders of limited size in memory: /task, its working folder, and /tmp.
Memory, processes and output are bounded for the container as a whole. Up to `workers` containers are made in advance
for the limits that were asked for last, since making one takes longer than starting it.

Time differs from bubblewrap: `wall_s` is by the clock, whatever else the machine does, and CPU seconds are looked at
four times a second, so that `cpu_s` in a result is what was seen last, a lower bound. Containers carry the mark of the
process that made them; when one dies, the next to open the backend on this machine removes what it left.
"""

import marshal
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cispo.errors import SandboxClosedError, SandboxError
from cispo.sandboxes import docker_boot
from cispo.sandboxes.bounds import check_files, signal_of
from cispo.sandboxes.bubblewrap import ENVIRONMENT
from cispo.sandboxes.docker_client import (
    DEFAULT_IMAGE,
    connect,
    create_container,
    image_id,
    reap,
    remove,
)
from cispo.sandboxes.docker_stream import AttachedChannel, Streams, exchange, raw_socket
from cispo.sandboxes.session import SERVER_SOURCE, Session
from cispo.sandboxes.told import told_limit
from cispo.sandboxes.types import DEFAULT_LIMITS, NO_FILES, Capabilities, ExecResult, ExecStatus, Limits

BOOT_COMMAND = ["python3", "-S", "-s", "-c", Path(docker_boot.__file__).read_text(encoding="utf-8")]
SESSION_COMMAND = ["python3", "-S", "-s", "-c", SERVER_SOURCE]
CONTAINER_ENVIRONMENT = {**ENVIRONMENT, "PATH": "/usr/local/bin:/usr/bin:/bin"}
PROBE_SOURCE = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
EXIT_TIMEOUT_S = 30


class DockerSandbox:
    """Opens after one trial program has run; raises SandboxError with the remedy when that is not possible.

    image: any image with a `python3` >= 3.9; build_image.py makes the default. runtime: as the daemon knows it, such as
    `runsc` (gVisor); None takes the daemon's default.
    """

    def __init__(self, workers: int, *, image: str = DEFAULT_IMAGE, runtime: str | None = None) -> None:
        self._client = connect()
        reap(self._client)
        self._image = image_id(self._client, image)
        self._runtime = runtime
        self._owner_pid = os.getpid()
        self._workers = workers
        self._permits = threading.BoundedSemaphore(workers)
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="sandbox-containers")
        self._lock = threading.Lock()
        self._spares = {is_session: Spares() for is_session in (False, True)}
        self._sessions: set[Session] = set()
        self._is_closed = False
        try:
            probe = self.run(["python3", "-S", "-s", "-c", PROBE_SOURCE])
            if probe.status is not ExecStatus.OK:
                message = probe.stderr.decode(errors="replace").strip()[-300:]
                raise SandboxError(f"the image {image} cannot run python3 ({probe.status}: {message}); name another")
        except BaseException:
            self.close()
            raise
        self._python_version = probe.stdout.decode().strip()

    def capabilities(self) -> Capabilities:
        return Capabilities(
            backend="docker",
            is_isolated=True,
            seccomp=True,
            memory_total=True,
            pids_total=True,
            separate_user=True,
            python="python3",
            python_version=self._python_version,
        )

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
        request = marshal.dumps((list(argv), dict(files), stdin), 2)
        with self._permits, daemon_errors():
            if self._is_closed:
                raise SandboxClosedError("the sandbox is closed; open another")
            container = self._take(limits)
            try:
                return self._run_in(container, b"%d\n" % len(request) + request, limits)
            finally:
                remove(container)

    def _run_in(self, container: Any, request: bytes, limits: Limits) -> ExecResult:
        attached = container.attach_socket(params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        connection = raw_socket(attached)
        try:
            started = time.monotonic()
            container.start()
            usage = Usage(container, limits)
            streams = exchange(connection, request, limits, started + limits.wall_s, usage.look)
            wall_s = time.monotonic() - started
        finally:
            # The daemon waits long for who stays attached and does not read, and the SDK's own object leaves it open.
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
            attached.close()
        if streams.stopped is not None:
            return _result(streams, streams.stopped, None, wall_s, usage)
        exit_code = int(container.wait(timeout=EXIT_TIMEOUT_S)["StatusCode"])
        container.reload()
        was_out_of_memory = bool(container.attrs["State"]["OOMKilled"])
        status = _status(exit_code, was_out_of_memory, bytes(streams.stderr))
        return _result(streams, status, exit_code, wall_s, usage)

    def session(self, *, files: Mapping[str, bytes] = NO_FILES, limits: Limits = DEFAULT_LIMITS) -> Session:
        """See Sandbox.session. Sessions are beside the programs that `workers` counts."""
        check_files(files, limits)
        if os.getpid() != self._owner_pid:
            raise SandboxError(f"the sandbox belongs to process {self._owner_pid}; open one in each process")
        with daemon_errors():
            if self._is_closed:
                raise SandboxClosedError("the sandbox is closed; open another")
            session = self._start_session(self._take(limits, is_session=True), limits)
        session.begin(files)
        with self._lock:
            is_late = self._is_closed
            self._sessions |= set() if is_late else {session}
        if is_late:
            session.close()
            raise SandboxClosedError("the sandbox is closed; open another")
        return session

    def _start_session(self, container: Any, limits: Limits) -> Session:
        channel: AttachedChannel | None = None
        try:
            channel = AttachedChannel(container)
            container.start()
        except BaseException:
            if channel is not None:
                channel.close()
            remove(container)
            raise

        def end() -> None:
            with self._lock:
                self._sessions.discard(session)
            remove(container)

        session = Session(
            channel, limits, is_memory_bounded=True, was_out_of_memory=lambda: was_killed_for_memory(container), end=end
        )
        return session

    def _take(self, limits: Limits, *, is_session: bool = False) -> Any:
        """A container that was made for these limits, or a new one; orders the next."""
        with self._lock:
            outdated, spare = self._spares[is_session].take(limits)
            if not self._is_closed:
                self._maker.submit(self._prepare, limits, outdated, is_session)
        return spare if spare is not None else self._create(limits, is_session)

    def _prepare(self, limits: Limits, outdated: list[Any], is_session: bool) -> None:
        for container in outdated:
            remove(container)
        spares = self._spares[is_session]
        with self._lock:
            is_wanted = limits == spares.limits and len(spares.containers) < self._workers and not self._is_closed
        if is_wanted:
            container = self._create(limits, is_session)
            with self._lock:
                spares.containers.append(container)

    def _create(self, limits: Limits, is_session: bool) -> Any:
        return create_container(
            self._client,
            self._image,
            SESSION_COMMAND if is_session else BOOT_COMMAND,
            CONTAINER_ENVIRONMENT,
            limits,
            runtime=self._runtime,
            is_session=is_session,
        )

    def close(self) -> None:
        """See Sandbox.close. Waits for programs that run; calling it again does nothing."""
        if self._is_closed or os.getpid() != self._owner_pid:
            return
        with self._lock:
            self._is_closed = True
            sessions = list(self._sessions)
        for session in sessions:
            session.close()
        for _ in range(self._workers):
            self._permits.acquire()
        self._maker.shutdown()
        for container in [*self._spares[False].containers, *self._spares[True].containers]:
            remove(container)
        self._client.close()
        for _ in range(self._workers):
            self._permits.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Spares:
    """Containers that are made but not started, all for the limits that were asked for last."""

    def __init__(self) -> None:
        self.containers: deque[Any] = deque()
        self.limits: Limits | None = None

    def take(self, limits: Limits) -> tuple[list[Any], Any]:
        """Those that have other limits, to be removed, and one that has these or None."""
        outdated = list(self.containers) if limits != self.limits else []
        if limits != self.limits:
            self.containers.clear()
            self.limits = limits
        return outdated, self.containers.popleft() if self.containers else None


class Usage:
    """What a container has used, as far as the daemon was asked."""

    def __init__(self, container: Any, limits: Limits) -> None:
        self._container = container
        self._limits = limits
        self.cpu_s = 0.0

    def look(self) -> ExecStatus | None:
        stats = self._container.client.api.stats(self._container.id, stream=False, one_shot=True)
        used_ns = stats.get("cpu_stats", {}).get("cpu_usage", {}).get("total_usage", 0)
        self.cpu_s = max(self.cpu_s, used_ns / 1e9)
        return ExecStatus.TIMEOUT if self.cpu_s > self._limits.cpu_s else None


def was_killed_for_memory(container: Any) -> bool:
    """Whether a container has ended because it met its limit on memory."""
    import docker

    with suppress(docker.errors.DockerException, OSError):
        container.reload()
        return bool(container.attrs["State"]["OOMKilled"]) and not container.attrs["State"]["Running"]
    return False


@contextmanager
def daemon_errors() -> Iterator[None]:
    """What the daemon or the way to it gets wrong is the sandbox's failure, not the program's."""
    import docker

    try:
        yield
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"the Docker daemon failed: {str(error)[:300]}") from error


def _status(exit_code: int, was_out_of_memory: bool, stderr: bytes) -> ExecStatus:
    if exit_code == 0:
        return ExecStatus.OK
    if was_out_of_memory:
        return ExecStatus.MEMORY_LIMIT
    by_signal = {128 + signal.SIGXCPU: ExecStatus.TIMEOUT, 128 + signal.SIGXFSZ: ExecStatus.DISK_LIMIT}
    return by_signal.get(exit_code) or told_limit(stderr)


def _result(
    streams: Streams, status: ExecStatus, exit_code: int | None, wall_s: float, usage: Usage
) -> ExecResult:
    return ExecResult(
        status=status,
        exit_code=exit_code,
        signal=None if exit_code is None else signal_of(exit_code),
        stdout=bytes(streams.stdout),
        stderr=bytes(streams.stderr),
        truncated=status is ExecStatus.OUTPUT_LIMIT,
        wall_s=wall_s,
        cpu_s=usage.cpu_s,
        peak_mib=None,
    )
