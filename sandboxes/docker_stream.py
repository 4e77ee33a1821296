"""The attached streams of a container: one socket that takes stdin and gives stdout and stderr in frames."""

import contextlib
import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cispo.errors import SandboxError
from cispo.sandboxes.types import ExecStatus, Limits

READ_BYTES = 1 << 16
HEADER = struct.Struct(">BxxxI")
STDOUT, STDERR = 1, 2
LOOK_S = 0.25
SEND_TIMEOUT_S = 60.0
# More than this in one frame is never sent; it bounds what is kept of a frame before it is whole.
MAX_PENDING_BYTES = 1 << 20


@dataclass
class Streams:
    """What has been read so far; `stopped` says why reading ended early."""

    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    stopped: ExecStatus | None = None


def raw_socket(attached: Any) -> socket.socket:
    """The socket inside of what the docker SDK returns."""
    found = getattr(attached, "_sock", attached)
    assert isinstance(found, socket.socket), "the daemon is reached through a socket"
    return found


class AttachedChannel:
    """The stdin and stdout of a container that is about to start; what it writes to stderr is left out."""

    def __init__(self, container: Any) -> None:
        self._attached = container.attach_socket(params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        self._connection = raw_socket(self._attached)
        self._pending = bytearray()

    def send(self, data: bytes) -> None:
        self._connection.settimeout(SEND_TIMEOUT_S)
        try:
            self._connection.sendall(data)
        except OSError as error:
            raise SandboxError(f"a session's container has ended ({error})") from error

    def receive(self, deadline: float) -> bytes:
        while True:
            streams = Streams()
            _take_frames(self._pending, streams, MAX_PENDING_BYTES)
            if streams.stdout:
                return bytes(streams.stdout)
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._connection.recv(READ_BYTES)
            except OSError as error:
                raise SandboxError(f"a session's container does not answer ({error})") from error
            if not data:
                raise SandboxError("a session's container has ended")
            self._pending += data

    def close(self) -> None:
        # The daemon waits long for who stays attached and does not read, and the SDK's own object leaves it open.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._attached.close()


def exchange(
    connection: socket.socket, stdin: bytes, limits: Limits, deadline: float, look: Callable[[], ExecStatus | None]
) -> Streams:
    """Send stdin and collect output until the container closes it, a limit is met, or `look` (every LOOK_S) says so."""
    streams, pending, unsent = Streams(), bytearray(), memoryview(stdin)
    connection.setblocking(False)
    next_look = time.monotonic() + LOOK_S
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while streams.stopped is None:
            now = time.monotonic()
            if now >= deadline:
                streams.stopped = ExecStatus.TIMEOUT
            elif now >= next_look:
                streams.stopped, next_look = look(), time.monotonic() + LOOK_S
            for _, events in selector.select(max(0.0, min(deadline, next_look) - time.monotonic())):
                if events & selectors.EVENT_WRITE:
                    unsent = _send(connection, unsent)
                    if not unsent:
                        with contextlib.suppress(OSError):  # the program ended without reading it
                            connection.shutdown(socket.SHUT_WR)
                        selector.modify(connection, selectors.EVENT_READ)
                if events & selectors.EVENT_READ:
                    data = _receive(connection)
                    if data == b"":
                        return streams
                    pending += data or b""
                    _take_frames(pending, streams, limits.output_kib << 10)
    return streams


def _send(connection: socket.socket, unsent: memoryview) -> memoryview:
    try:
        return unsent[connection.send(unsent) :]
    except BlockingIOError:
        return unsent
    except OSError:  # nobody reads any more: the output says how it ended
        return unsent[len(unsent) :]


def _receive(connection: socket.socket) -> bytes | None:
    try:
        return connection.recv(READ_BYTES)
    except BlockingIOError:
        return None
    except ConnectionError:
        return b""


def _take_frames(pending: bytearray, streams: Streams, limit_bytes: int) -> None:
    while len(pending) >= HEADER.size:
        kind, size = HEADER.unpack_from(pending)
        if len(pending) < HEADER.size + size and size <= MAX_PENDING_BYTES:
            return
        target = streams.stderr if kind == STDERR else streams.stdout
        content = pending[HEADER.size : HEADER.size + size]
        room = limit_bytes - len(target)
        target += content[:room]
        if len(content) > room:
            streams.stopped = streams.stopped or ExecStatus.OUTPUT_LIMIT
        del pending[: HEADER.size + size]
