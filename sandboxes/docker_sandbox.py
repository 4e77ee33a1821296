"""The backend `docker`: each program in a container of its own that is removed afterwards, through the docker SDK.

A container has no network, a read-only root, no capabilities and no way to gain any, the daemon's seccomp filter, a
user id that owns nothing, and two writable folders of limited size in memory: /task, its working folder, and /tmp.
Memory, processes and output are bounded for the container as a whole. Up to `workers` containers are made in advance
for the sizes that were asked for last, since making one takes longer than starting it.

The first process inside is session_server.py, which starts the program, stops it at its limits and tells how it ended;
the program can neither end it nor speak in its name. A `run` is a session of one command. Time differs from bubblewrap:
`wall_s` is by the clock, whatever else the machine does. Containers carry the mark of the
process that made them; when one dies, the next to open the backend on this machine removes what it left.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from cispo.errors import SandboxClosedError, SandboxError
from cispo.sandboxes.bounds import check_files
from cispo.sandboxes.bubblewrap import ENVIRONMENT
from cispo.sandboxes.docker_client import (
    DEFAULT_IMAGE,
    Sizes,
    connect,
    create_container,
    image_id,
    reap,
    remove,
    sizes_of,
)
from cispo.sandboxes.docker_stream import AttachedChannel
from cispo.sandboxes.session import SERVER_SOURCE, Session
from cispo.sandboxes.types import DEFAULT_LIMITS, NO_FILES, Capabilities, ExecResult, ExecStatus, Limits

COMMAND = ["python3", "-S", "-s", "-c", SERVER_SOURCE]
CONTAINER_ENVIRONMENT = {**ENVIRONMENT, "PATH": "/usr/local/bin:/usr/bin:/bin"}
PROBE_SOURCE = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
EXIT_TIMEOUT_S, END_TIMEOUT_S = 30, 2


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
        self._spares = Spares()
        self._knows_killers = False
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
            knows_killers=self._knows_killers,
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
        with self._permits, daemon_errors():
            if self._is_closed:
                raise SandboxClosedError("the sandbox is closed; open another")
            with self._start_session(self._take(limits), limits) as session:
                session.begin(NO_FILES)
                result = session.run(argv, stdin=stdin, files=files)
                self._knows_killers = session.knows_killers
                return result

    def session(self, *, files: Mapping[str, bytes] = NO_FILES, limits: Limits = DEFAULT_LIMITS) -> Session:
        """See Sandbox.session. Sessions are beside the programs that `workers` counts."""
        check_files(files, limits)
        if os.getpid() != self._owner_pid:
            raise SandboxError(f"the sandbox belongs to process {self._owner_pid}; open one in each process")
        with daemon_errors():
            if self._is_closed:
                raise SandboxClosedError("the sandbox is closed; open another")
            session = self._start_session(self._take(limits), limits)
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
            if session.is_idle:
                wait_for_end(container)
            remove(container)

        def was_out_of_memory() -> bool:
            """While the first process lives, it tells."""
            return channel.has_ended and was_killed_for_memory(container)

        session = Session(channel, limits, is_memory_bounded=True, was_out_of_memory=was_out_of_memory, end=end)
        return session

    def _take(self, limits: Limits) -> Any:
        """A container that was made for such limits, or a new one; orders the next."""
        with self._lock:
            outdated, spare = self._spares.take(sizes_of(limits))
            if not self._is_closed:
                self._maker.submit(self._prepare, limits, outdated)
        return spare if spare is not None else self._create(limits)

    def _prepare(self, limits: Limits, outdated: list[Any]) -> None:
        for container in outdated:
            remove(container)
        spares = self._spares
        with self._lock:
            is_fitting = sizes_of(limits) == spares.sizes
            is_wanted = is_fitting and len(spares.containers) < self._workers and not self._is_closed
        if is_wanted:
            container = self._create(limits)
            with self._lock:
                spares.containers.append(container)

    def _create(self, limits: Limits) -> Any:
        return create_container(
            self._client, self._image, COMMAND, CONTAINER_ENVIRONMENT, limits, runtime=self._runtime
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
        for container in self._spares.containers:
            remove(container)
        with suppress(SandboxError), daemon_errors():
            reap(self._client)  # what owners that were killed since this one opened have left
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
    """Containers that are made but not started, all of the sizes that were asked for last."""

    def __init__(self) -> None:
        self.containers: deque[Any] = deque()
        self.sizes: Sizes | None = None

    def take(self, sizes: Sizes) -> tuple[list[Any], Any]:
        """Those that have other sizes, to be removed, and one that has these or None."""
        outdated = list(self.containers) if sizes != self.sizes else []
        if sizes != self.sizes:
            self.containers.clear()
            self.sizes = sizes
        return outdated, self.containers.popleft() if self.containers else None


def wait_for_end(container: Any) -> None:
    """Its first process ends with the connection. The daemon would start a program of its own to kill it."""
    import docker

    with suppress(docker.errors.DockerException, OSError):
        container.wait(timeout=END_TIMEOUT_S)


def was_killed_for_memory(container: Any) -> bool:
    """Whether a container, whose first process is gone, has ended because it met its limit on memory."""
    import docker

    with suppress(docker.errors.DockerException, OSError):
        container.wait(timeout=EXIT_TIMEOUT_S)
        container.reload()
        return bool(container.attrs["State"]["OOMKilled"])
    return False


@contextmanager
def daemon_errors() -> Iterator[None]:
    """What the daemon or the way to it gets wrong is the sandbox's failure, not the program's."""
    import docker

    try:
        yield
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"the Docker daemon failed: {str(error)[:300]}") from error
