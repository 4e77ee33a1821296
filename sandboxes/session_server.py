"""The first program of a session's sandbox: runs one command after the other, each with limits of its own.

A script like driver.py (standard library alone, Python 3.9 or later), run behind the text of kill_witness.py. It is
process 1 of the sandbox, which protects it from the commands, though they have its user id: they cannot kill it, and as
it is not dumpable they can neither read its memory nor use its descriptors. It also makes an end of each command
simple: what process 1 kills is all there is.

A request on descriptor 0 is a line with a length, then marshalled (argv, files, stdin, limits). The reply on 1 is one
line of JSON, which says how much of stdout and stderr follows it. Without argv a request only writes files.
"""

import contextlib
import ctypes
import json
import marshal
import os
import resource
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from cispo.sandboxes.kill_witness import DEADLY_SIGNALS, Testimony

TICK_S = 0.05
READ_BYTES = 1 << 16
PR_SET_DUMPABLE = 4
FIRST_OWN_FD = 100
OOM_COUNTS = ("/sys/fs/cgroup/memory/memory.oom_control", "/sys/fs/cgroup/memory.events")
TICKS_PER_S, PAGE_BYTES = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    if os.getpid() != 1:
        raise SystemExit("this script kills every process that it may; it must be the first of a sandbox")
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    requests, replies, wakes = own_descriptors()
    write_all(replies, b'{"ready": true}\n')
    while True:
        size = read_line(requests)
        if not size:
            return
        command = Command(*marshal.loads(read_exactly(requests, int(size))))
        command.run(wakes)
        header = json.dumps({**command.summary, "stdout": len(command.output[0]), "stderr": len(command.output[1])})
        write_all(replies, header.encode() + b"\n" + bytes(command.output[0]) + bytes(command.output[1]))


def own_descriptors() -> "tuple[int, int, int]":
    """Requests, replies and a pipe that wakes when a child ends, none of which a command inherits."""
    import fcntl

    requests, replies = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_OWN_FD) for fd in (0, 1))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    wakes, wake = os.pipe()
    for fd in (wakes, wake):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *rest: None)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own handler would let a command interrupt process 1
    return requests, replies, wakes


class Command:
    """One command from its start to its end; `summary` and `output` are then complete.

    limits: wall_s, cpu_s, memory_bytes (0 where the kernel holds that limit), output_bytes.
    """

    def __init__(self, argv: "list[str]", files: "dict[str, bytes]", stdin: bytes, limits: "dict[str, Any]") -> None:
        self.argv, self.files, self.unsent, self.limits = argv, files, memoryview(stdin), limits
        self.output = (bytearray(), bytearray())
        self.summary: dict[str, Any] = {}
        self.stopped = ""
        self.testimony = Testimony()
        self.has_own_doing = False

    def run(self, wakes: int) -> None:
        started, cpu_s_before, kills_before = time.monotonic(), reaped_cpu_s(), oom_kills()
        in_read, in_write = os.pipe()
        pipes = [os.pipe(), os.pipe()]
        pid = os.fork()
        if pid == 0:
            self.become([in_read, pipes[0][1], pipes[1][1]])
        for fd in (in_read, pipes[0][1], pipes[1][1]):
            os.close(fd)
        os.set_blocking(in_write, False)
        streams = {pipes[0][0]: self.output[0], pipes[1][0]: self.output[1]}
        wait_status = self.watch(pid, in_write, streams, wakes, started, cpu_s_before)
        end_all()
        self.testimony.close()
        for fd, target in streams.items():
            while not self.take(fd, target):
                pass
            os.close(fd)
        cpu_s = reaped_cpu_s() - cpu_s_before
        if not self.stopped and cpu_s > self.limits["cpu_s"]:
            self.stopped = "timeout"
        exit_code = os.waitstatus_to_exitcode(wait_status) if wait_status is not None else -signal.SIGKILL
        self.summary = {
            "stopped": self.stopped,
            "exit_code": exit_code if exit_code >= 0 else 128 - exit_code,
            "was_out_of_memory": oom_kills() > kills_before,
            "knows_killers": self.testimony.is_available,
            "was_killed": -exit_code in DEADLY_SIGNALS and self.testimony.is_available and not self.has_own_doing,
            "wall_s": time.monotonic() - started,
            "cpu_s": cpu_s,
        }

    def watch(
        self, pid: int, stdin: int, streams: "dict[int, bytearray]", wakes: int, started: float, cpu_s_before: float
    ) -> "int | None":
        """Feed and read the command until it ends or meets a limit; its wait status if it ended by itself."""
        poll = select.poll()
        for fd in (*streams, wakes):
            poll.register(fd, select.POLLIN)
        poll.register(stdin, select.POLLOUT)
        if self.testimony.listen():
            poll.register(self.testimony, select.POLLIN)
        open_fds, wait_status, next_look = {*streams, stdin}, None, started + TICK_S
        while wait_status is None and not self.stopped:
            for fd, events in poll.poll(max(0.0, next_look - time.monotonic()) * 1000):
                if fd == wakes:
                    os.read(wakes, READ_BYTES)
                elif fd == self.testimony.fileno():
                    if not events & select.POLLIN:  # nobody is under its filter any more
                        poll.unregister(fd)
                    elif self.testimony.next_caller() is not None:
                        self.has_own_doing = True
                        self.testimony.let_go()
                elif fd == stdin:
                    if self.feed(stdin):
                        poll.unregister(stdin)
                        os.close(stdin)
                        open_fds.discard(stdin)
                elif self.take(fd, streams[fd]):
                    poll.unregister(fd)
            wait_status = reap(pid)
            now = time.monotonic()
            if now >= next_look and wait_status is None:
                self.stopped = self.stopped or self.limit_met(now - started, cpu_s_before)
                next_look = now + TICK_S
        if stdin in open_fds:
            os.close(stdin)
        return wait_status

    def limit_met(self, elapsed_s: float, cpu_s_before: float) -> str:
        cpu_s, resident_bytes = usage_of_all()
        if elapsed_s > self.limits["wall_s"] or cpu_s + reaped_cpu_s() - cpu_s_before > self.limits["cpu_s"]:
            return "timeout"
        return "memory_limit" if 0 < self.limits["memory_bytes"] < resident_bytes else ""

    def feed(self, fd: int) -> bool:
        """Whether all of stdin is sent, or nobody reads it any more."""
        try:
            self.unsent = self.unsent[os.write(fd, self.unsent[:READ_BYTES]) :]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            return True
        return not self.unsent

    def take(self, fd: int, target: bytearray) -> bool:
        """Whether the stream is at its end. What is more than the limit is lost, and the command stopped."""
        data = os.read(fd, READ_BYTES)
        room = self.limits["output_bytes"] - len(target)
        target += data[:room]
        if len(data) > room:
            self.stopped = self.stopped or "output_limit"
        return not data

    def become(self, fds: "list[int]") -> "NoReturn":
        """In the forked child."""
        try:
            os.setsid()
            for number, fd in enumerate(fds):
                os.dup2(fd, number)
            for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            ceiling_s = int(self.limits["cpu_s"]) + 2  # of each process, for when nobody watches
            resource.setrlimit(resource.RLIMIT_CPU, (ceiling_s, ceiling_s))
            try:
                with open("/proc/self/oom_score_adj", "w") as file:
                    file.write("1000")
            except OSError:  # read-only, and then set for all
                pass
            for name, content in self.files.items():
                os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
                with open(name, "wb") as file:
                    file.write(content)
            self.testimony.begin()
            if self.argv:
                os.execvp(self.argv[0], self.argv)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{self.argv[:1]}: {error}\n".encode(errors="replace"))
        os._exit(127)


def reap(wanted: int) -> "int | None":
    """Reap whatever has ended; the status of `wanted` if it is among that."""
    found = None
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == wanted:
            found = wait_status


def end_all() -> None:
    """Kill and reap until nothing is left but this process."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def usage_of_all() -> "tuple[float, int]":
    """CPU seconds and resident bytes of all processes but this one."""
    ticks = pages = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            ticks += sum(map(int, fields[11:15]))
            pages += int(fields[21])
    return ticks / TICKS_PER_S, pages * PAGE_BYTES


def reaped_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def oom_kills() -> int:
    """How often the kernel has killed in this sandbox for memory, where that can be seen from inside."""
    for path in OOM_COUNTS:
        try:
            with open(path) as file:
                return int(dict(line.split() for line in file).get("oom_kill", 0))
        except OSError:
            continue
    return 0


def read_line(fd: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(fd, 1)
        if not part:
            return b""
        line += part
    return line


def read_exactly(fd: int, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(fd, min(size - len(parts), 1 << 20))
        if not part:
            sys.exit(0)
        parts += part
    return bytes(parts)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


if __name__ == "__main__":
    main()
