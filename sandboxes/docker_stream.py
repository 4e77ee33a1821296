"""The attached streams of a container: one socket that takes stdin and gives stdout and stderr in frames."""

import contextlib
import socket
import struct
import time
from typing import Any

from cispo.errors import SandboxError, SandboxLostError

READ_BYTES = 1 << 16
HEADER = struct.Struct(">BxxxI")
STDOUT = 1
SEND_TIMEOUT_S = 60.0


def raw_socket(attached: Any) -> socket.socket:
    """The socket inside of what the docker SDK returns."""
    found = getattr(attached, "_sock", attached)
    assert isinstance(found, socket.socket), "the daemon is reached through a socket"
    return found


class AttachedChannel:
    """The stdin and stdout of a container that is about to start; what it writes to stderr is left out.

    has_ended: the container has closed its stdout, so its first process is gone.
    """

    def __init__(self, container: Any) -> None:
        self._attached = container.attach_socket(params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        self._connection = raw_socket(self._attached)
        self._pending = bytearray()
        self.has_ended = False

    def send(self, data: bytes) -> None:
        self._connection.settimeout(SEND_TIMEOUT_S)
        try:
            self._connection.sendall(data)
        except TimeoutError as error:
            raise SandboxError("a container does not read what it is sent") from error
        except OSError as error:
            self.has_ended = True
            raise SandboxLostError(f"somebody outside killed the container ({error})") from error

    def receive(self, deadline: float) -> bytes:
        while not (data := self._take_frames()):
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                received = self._connection.recv(READ_BYTES)
            except ConnectionError:
                received = b""
            except OSError as error:
                raise SandboxError(f"a container does not answer ({error})") from error
            if not received:
                self.has_ended = True
                raise SandboxLostError("somebody outside killed the container")
            self._pending += received
        return data

    def _take_frames(self) -> bytes:
        """What of stdout has come whole."""
        stdout = bytearray()
        while len(self._pending) >= HEADER.size:
            kind, size = HEADER.unpack_from(self._pending)
            if len(self._pending) < HEADER.size + size:
                break
            stdout += self._pending[HEADER.size : HEADER.size + size] if kind == STDOUT else b""
            del self._pending[: HEADER.size + size]
        return bytes(stdout)

    def close(self) -> None:
        # The daemon waits long for who stays attached and does not read, and the SDK's own object leaves it open.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._attached.close()
