"""Who killed a program: itself, or somebody outside of the sandbox?

A wait status names the signal and not the sender. So the program runs under a seccomp filter that allows everything,
but tells a witness, the process that started it, of each call by which a process can come to die of SIGKILL or SIGTERM
or look as if it had: the kill family, signals ordered for later, its own limit on CPU seconds, and exits with the code
of such a death. The caller waits until the witness has noted it. A program that dies so without a word of it was killed
from outside: by the kernel for want of the machine's memory, by an operator, by who signals a wrong process number.

Also run as a script of the standard library alone, beside warden.py and in front of session_server.py (Python 3.9 or
later). Where the kernel gives no listener (before 5.5, gVisor, another listener above), `begin` says so.
"""

import array
import contextlib
import ctypes
import fcntl
import os
import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLY_SIGNALS = (9, 15)
DEADLY_EXIT_CODES = tuple(128 + number for number in DEADLY_SIGNALS)
# machine: AUDIT_ARCH, then the numbers of the calls below and of seccomp itself.
MACHINES = {"x86_64": (0xC000003E, 0, 317), "aarch64": (0xC00000B7, 1, 277)}
# name: (numbers, place of the argument that is a signal).
SENDERS = {
    "kill": ((62, 129), 1),
    "tkill": ((200, 130), 1),
    "tgkill": ((234, 131), 2),
    "rt_sigqueueinfo": ((129, 138), 1),
    "rt_tgsigqueueinfo": ((297, 240), 2),
    "pidfd_send_signal": ((424, 424), 1),
}
# A signal at the end of a timer, for a message, or by who traces: none of them in an argument. Honest programs hardly
# use these, and whoever does is only taken for its own killer if it is killed besides.
ORDERERS = {"timer_create": (222, 107), "mq_notify": (244, 184), "ptrace": (101, 117)}
EXITS = {"exit": (60, 93), "exit_group": (231, 94)}
CLONE, FCNTL, SETRLIMIT, PRLIMIT = (56, 220), (72, 25), (160, 164), (302, 261)
F_SETSIG, RLIMIT_CPU = 10, 0

LOAD, EQUAL, AND, RETURN = 0x20, 0x15, 0x54, 0x06
ALLOW, NOTIFY = 0x7FFF0000, 0x7FC00000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
SET_MODE_FILTER, NEW_LISTENER = 1, 8
RECEIVE, SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND
NOTICE = struct.Struct("<QIIi60x")
ANSWER = struct.Struct("<QqiI")
CONTINUE = 1


def witness_filter(machine: str) -> "bytes | None":
    """The filter as an array of struct sock_filter; None for an unknown machine."""
    if machine not in MACHINES:
        return None
    return b"".join(struct.pack("<HBBI", *step) for step in _steps(*MACHINES[machine][:2]))


def _steps(architecture: int, column: int) -> "Iterator[tuple[int, int, int, int]]":
    """Yields (operation, steps to skip if true, steps to skip if false, operand)."""
    yield LOAD, 0, 0, ARCHITECTURE
    yield EQUAL, 1, 0, architecture
    yield RETURN, 0, 0, ALLOW
    yield LOAD, 0, 0, NUMBER
    for numbers in ORDERERS.values():
        yield EQUAL, 0, 1, numbers[column]
        yield RETURN, 0, 0, NOTIFY
    for numbers, place in SENDERS.values():
        yield from _notify_where(numbers[column], place, 0xFFFFFFFF, DEADLY_SIGNALS)
    for numbers in EXITS.values():
        yield from _notify_where(numbers[column], 0, 0xFF, DEADLY_EXIT_CODES)
    yield from _notify_where(CLONE[column], 0, 0xFF, DEADLY_SIGNALS)  # what the parent gets when the child ends
    yield from _notify_where(SETRLIMIT[column], 0, 0xFFFFFFFF, (RLIMIT_CPU,))
    yield from _notify_where(PRLIMIT[column], 1, 0xFFFFFFFF, (RLIMIT_CPU,))
    yield from _notify_where(FCNTL[column], 1, 0xFFFFFFFF, (F_SETSIG,))
    yield RETURN, 0, 0, ALLOW


def _notify_where(
    number: int, place: int, mask: int, values: "tuple[int, ...]"
) -> "Iterator[tuple[int, int, int, int]]":
    """Notify of a call whose argument, under the mask, is one of the values; allow the call with others."""
    yield EQUAL, 0, 4 + len(values), number
    yield LOAD, 0, 0, ARGUMENTS + 8 * place
    yield AND, 0, 0, mask
    for index, value in enumerate(values):
        yield EQUAL, len(values) - index, 0, value
    yield RETURN, 0, 0, ALLOW
    yield RETURN, 0, 0, NOTIFY


class Testimony:
    """What the processes under one filter tell. Made before the fork; `close` it in the end.

    In the child: `keep_above`, and `begin` last before it executes the program. In the parent: `listen`; from then on,
    whenever `fileno` can be read, `next_caller` and then `let_go`, since the caller waits for that.

    is_available: the kernel gives a listener, or the child died before it could say that there is none.
    """

    def __init__(self) -> None:
        self.is_available = True
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener = -1
        self._notice = 0

    def keep_above(self, lowest_fd: int) -> None:
        """Move what `begin` needs out of the way of descriptors below."""
        fd = fcntl.fcntl(self._theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, lowest_fd)
        self._theirs.close()
        self._theirs = socket.socket(fileno=fd)

    def begin(self) -> None:
        """Put this process under the filter and hand its listener to the parent, where that is possible."""
        machine = os.uname().machine
        steps = witness_filter(machine)
        listener = -1
        if steps is not None:
            buffer = ctypes.create_string_buffer(steps, len(steps))
            program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(buffer))
            number = ctypes.c_long(MACHINES[machine][2])
            listener = ctypes.CDLL(None).syscall(number, SET_MODE_FILTER, NEW_LISTENER, program)
        if listener >= 0:
            socket.send_fds(self._theirs, [b"+"], [listener])
        else:
            self._theirs.send(b"-")

    def listen(self) -> bool:
        """Wait until the child has begun. Whether there is a listener."""
        self._theirs.close()
        word, messages, _, _ = self._ours.recvmsg(1, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
        self.is_available = word != b"-"
        for _, _, data in messages:
            self._listener = array.array("i", data[:4])[0]
        return self._listener >= 0

    def fileno(self) -> int:
        return self._listener

    def next_caller(self) -> "int | None":
        """The thread that waits to do what it told; None when it has been killed in the meantime."""
        notice = bytearray(NOTICE.size)
        try:
            fcntl.ioctl(self._listener, RECEIVE, notice)
        except OSError:
            return None
        self._notice, caller, _, _ = NOTICE.unpack(notice)
        return int(caller)

    def let_go(self) -> None:
        with contextlib.suppress(OSError):  # it has been killed in the meantime
            fcntl.ioctl(self._listener, SEND, ANSWER.pack(self._notice, 0, 0, CONTINUE))

    def close(self) -> None:
        for end in (self._ours, self._theirs):
            end.close()
        if self._listener >= 0:
            os.close(self._listener)
            self._listener = -1
