"""The owner's side of one slot: starts its warden, hands it programs, reads their output and decides when to stop them.

Output is read while the program runs and never kept beyond its limit. Time is decided by CPU seconds, of all that the
program used and not of what was seen in time; the clock counts only while the program was not waiting for a core, so
that a busy machine neither turns a right program into a time-out nor the other way round.
"""

import contextlib
import fcntl
import json
import marshal
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cispo.errors import SandboxError, SandboxLostError
from cispo.sandboxes import warden
from cispo.sandboxes.cgroups import Cgroup, open_cgroup
from cispo.sandboxes.process_tree import TreeUsage, tree_usage
from cispo.sandboxes.slots import take_slot
from cispo.sandboxes.types import ExecStatus, Limits

TICK_S = 0.05
READ_BYTES = 1 << 16
WARDEN_TIMEOUT_S = 30.0
# A program that gets no core is waited for so many times its limit by the clock: it decides nothing but patience.
STARVED_WALL_FACTOR = 30
# One that waits as for a disk is waited for so many times: a program can seem to, by vfork, as long as it likes.
DISK_WALL_FACTOR = 3
# bubblewrap and its first process inside.
OVERHEAD_PIDS = 2
# The warden, and one more: where both hold, the limit of the user id is met first. It refuses at once, while the
# group's takes a process number for every refusal, and a bomb of threads would use up the machine's numbers in a
# second: then they come round, and who kills by number may hit somebody else.
GROUP_SPARE_PIDS = 2
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class Job:
    """One program for a warden: what to execute, and the contents of its descriptors.

    inputs: contents of the read-only descriptors from 4 on; 0 is stdin, 1 and 2 are output, and 3 is for reports.
    wrapped: what is executed is bubblewrap, which starts the program. For the witness; None goes without.
    """

    argv: Sequence[str]
    environment: dict[str, str]
    folder: str
    limits: Limits
    rlimits: Sequence[tuple[int, tuple[int, int]]]
    stdin: bytes = b""
    inputs: Sequence[bytes] = ()
    wrapped: bool | None = False


@dataclass(frozen=True)
class Testimony:
    """What was seen of a program's own doing (kill_witness.py).

    is_available: anything was to be seen. has_own_doing: by its own doing a process of it may have been killed.
    has_first_outlived: bubblewrap's first process inside was there when the program had died of a signal.
    """

    is_available: bool = False
    has_own_doing: bool = False
    has_first_outlived: bool = False


@dataclass
class Ended:
    """What is left of a program. `stopped` says why the supervisor ended it, None when it ended by itself.

    exit_code: negative for a signal. report: what was written to descriptor 3.
    """

    exit_code: int = 0
    testimony: Testimony = Testimony()
    cpu_s: float = 0.0
    wall_s: float = 0.0
    stopped: ExecStatus | None = None
    was_out_of_memory: bool = False
    peak_mib: float | None = None
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    report: bytearray = field(default_factory=bytearray)


class Supervisor:
    """One slot: a user id, control groups and a warden. Used by one thread at a time; broken after a SandboxError."""

    def __init__(self, index: int, *, own_user: bool = False) -> None:
        self.slot = take_slot(index, own_user=own_user)
        self.cgroup: Cgroup | None = None
        self._warden: subprocess.Popen[bytes] | None = None
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self.cgroup = open_cgroup(self.slot.name)
                self._start_warden(theirs)
        except BaseException:
            self.close()
            raise

    def _start_warden(self, theirs: socket.socket) -> None:
        fds = [theirs.fileno()] if self.slot.lock_fd is None else [theirs.fileno(), self.slot.lock_fd]
        command = [sys.executable, "-I", "-S", "-B", str(Path(warden.__file__).resolve()), *map(str, fds)]
        quiet = subprocess.DEVNULL
        self._warden = subprocess.Popen(
            command, pass_fds=fds, env={}, cwd="/", stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
        )
        folders = list(map(str, self.cgroup.folders)) if self.cgroup else []
        homes = list(map(str, self.cgroup.homes)) if self.cgroup else []
        self._control.settimeout(WARDEN_TIMEOUT_S)
        self._send(marshal.dumps((self.slot.uid, folders, homes)))
        self._reply("ready")

    def run(self, job: Job) -> Ended:
        """Raises SandboxError when the program could not be started or ended; the slot must then be closed."""
        watch = Watch(job.limits, self.cgroup, self._warden_pid())
        ended = Ended()
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            theirs = [_sealed_memory(stack, job.stdin)]
            for target in (ended.stdout, ended.stderr, ended.report):
                read_fd, write_fd = os.pipe()
                stack.callback(os.close, read_fd)
                theirs.append(write_fd)
                selector.register(read_fd, selectors.EVENT_READ, target)
            theirs += [_sealed_memory(stack, content) for content in job.inputs]
            try:
                self._send(_request(job), theirs)
            finally:
                for write_fd in theirs[1:4]:
                    os.close(write_fd)
            selector.register(self._control, selectors.EVENT_READ)
            self._collect(selector, watch, ended)
            self._drain(selector, ended, job.limits)
        ended.wall_s = watch.elapsed_s()
        ended.cpu_s = max(ended.cpu_s, watch.seen_cpu_s())  # of what is killed, the kernel counts only a part
        ended.was_out_of_memory = watch.was_out_of_memory()
        ended.peak_mib = self.cgroup.peak_mib() if self.cgroup is not None else None
        if ended.stopped is None and ended.cpu_s > job.limits.cpu_s:
            ended.stopped = ExecStatus.TIMEOUT  # it ended between two looks, which come late on a busy machine
        return ended

    def start(self, job: Job, stdio: int) -> "Watch":
        """Start a program with the descriptor `stdio` as its stdin and stdout, and let it run until `stop`."""
        watch = Watch(job.limits, self.cgroup, self._warden_pid())
        with contextlib.ExitStack() as stack:
            null = os.open(os.devnull, os.O_RDWR)
            stack.callback(os.close, null)
            inputs = [_sealed_memory(stack, content) for content in job.inputs]
            self._send(_request(job), [stdio, stdio, null, null, *inputs])
        return watch

    def stop(self) -> None:
        """End what `start` has started, if it runs still; SandboxError when it could not be started at all."""
        self._send(marshal.dumps("end"))
        self._reply("ended")

    def _collect(self, selector: selectors.BaseSelector, watch: "Watch", ended: Ended) -> None:
        """Read output and keep watch until the warden says that the program and all it started are gone."""
        stop_deadline = float("inf")
        next_look = time.monotonic() + TICK_S
        while True:
            events = selector.select(max(0.0, min(next_look, stop_deadline) - time.monotonic()))
            reason: ExecStatus | None = None
            for key, _ in events:
                if key.fileobj is self._control:
                    selector.unregister(self._control)
                    ended.exit_code, ended.cpu_s, seen = self._reply("ended")
                    ended.testimony = Testimony(*seen or ())
                    return
                if not _read_some(selector, key, watch.limits):
                    reason = ExecStatus.OUTPUT_LIMIT
            now = time.monotonic()
            if now >= next_look and ended.stopped is None:
                reason = reason or watch.look()
                next_look = now + TICK_S
            if reason is not None and ended.stopped is None:
                ended.stopped = reason
                self._send(marshal.dumps("end"))
                stop_deadline, next_look = now + WARDEN_TIMEOUT_S, float("inf")
            if now >= stop_deadline:
                raise SandboxError(f"a program was not gone {WARDEN_TIMEOUT_S:g} s after it was killed; see `dmesg`")

    def _drain(self, selector: selectors.BaseSelector, ended: Ended, limits: Limits) -> None:
        """Read what is left in the pipes; nobody holds their other ends any more."""
        while selector.get_map():
            for key, _ in selector.select():
                if not _read_some(selector, key, limits):
                    ended.stopped = ended.stopped or ExecStatus.OUTPUT_LIMIT
                    selector.unregister(key.fileobj)

    def _send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        if len(packet) > warden.MAX_PACKET_BYTES or len(fds) > warden.MAX_FDS:
            raise ValueError(
                f"a program's arguments are {len(packet)} bytes, with {len(fds)} open files; at most "
                f"{warden.MAX_PACKET_BYTES} and {warden.MAX_FDS} can be handed over, so send data by stdin"
            )
        try:
            socket.send_fds(self._control, [packet], fds)
        except OSError as error:
            raise SandboxLostError(f"the warden of sandbox slot {self.slot.name} is gone ({error})") from error

    def _reply(self, wanted: str) -> Any:
        try:
            packet = self._control.recv(warden.MAX_PACKET_BYTES)
        except TimeoutError as error:
            raise SandboxError(f"the warden of sandbox slot {self.slot.name} does not answer ({error})") from error
        except OSError as error:
            raise SandboxLostError(f"the warden of sandbox slot {self.slot.name} is gone ({error})") from error
        if not packet:
            raise SandboxLostError(f"the warden of sandbox slot {self.slot.name} died")
        kind, value = marshal.loads(packet)
        if kind != wanted:
            raise SandboxError(f"the sandbox could not start a program: {value}")
        return value

    def _warden_pid(self) -> int:
        assert self._warden is not None, "the constructor starts the warden"
        return self._warden.pid

    def close(self) -> None:
        """End the warden (and with it whatever runs), remove the groups and give the user id back."""
        self._control.close()
        if self._warden is not None:
            try:
                self._warden.wait(WARDEN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._warden.kill()
                self._warden.wait()
        if self.cgroup is not None:
            self.cgroup.remove()
        self.slot.release()


class Watch:
    """Decides, every TICK_S, whether a program has used up its limits."""

    def __init__(self, limits: Limits, cgroup: Cgroup | None, warden_pid: int) -> None:
        self.limits = limits
        self._cgroup = cgroup
        self._warden_pid = warden_pid
        self._cpu_s_before: float | None = None
        self._oom_kills_before = 0
        if cgroup is not None:
            cgroup.set_limits(limits.memory_mib, limits.pids + OVERHEAD_PIDS + GROUP_SPARE_PIDS)
            self._cpu_s_before = cgroup.cpu_s()
            self._oom_kills_before = cgroup.oom_kills()
            cgroup.watch_memory()
        self._seen_cpu_s = 0.0
        self._starved_s = 0.0
        self._start = time.monotonic()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def has_run_out_of_memory_since(self) -> bool:
        """As was_out_of_memory, counted from the last time that this said so."""
        was_out = self.was_out_of_memory()
        if was_out and self._cgroup is not None:
            self._oom_kills_before = self._cgroup.oom_kills()
            self._cgroup.watch_memory()
        return was_out

    def was_out_of_memory(self) -> bool:
        """Whether the kernel killed for the program's own limit; kills for want of the machine's memory are not its."""
        if self._cgroup is None or self._cgroup.oom_kills() <= self._oom_kills_before:
            return False
        return self._cgroup.has_met_memory_limit()

    def look(self) -> ExecStatus | None:
        """The limit that is exceeded, or None; SandboxError when the machine gives the program no time."""
        elapsed_s = self.elapsed_s()
        is_late, is_half_late = elapsed_s >= self.limits.wall_s, 2 * elapsed_s >= self.limits.wall_s
        counts_memory = self._cgroup is not None and self._cgroup.memory is not None
        cpu_s = self._group_cpu_s()
        usage = TreeUsage()
        if is_half_late or cpu_s is None or not counts_memory:
            usage = tree_usage(self._warden_pid)
        self._seen_cpu_s = max(self._seen_cpu_s, usage.cpu_s if cpu_s is None else cpu_s)
        if self._seen_cpu_s > self.limits.cpu_s:
            return ExecStatus.TIMEOUT
        if not counts_memory and usage.resident_bytes > self.limits.memory_mib << 20:
            return ExecStatus.MEMORY_LIMIT
        self._starved_s = max(self._starved_s, usage.starved_s)  # of a process that has ended since, too
        # What runs or waits for a core is left to the limit on CPU seconds.
        patience_s = self.limits.wall_s * (DISK_WALL_FACTOR if usage.is_uninterruptible else 1)
        if is_late and not usage.is_runnable and elapsed_s - self._starved_s >= patience_s:
            return ExecStatus.TIMEOUT
        if elapsed_s >= STARVED_WALL_FACTOR * self.limits.wall_s:
            raise SandboxError(
                f"a program waited {self._starved_s:.1f} of {elapsed_s:.1f} s for a core; "
                "lower sandbox.workers or raise sandbox.wall_s"
            )
        return None

    def seen_cpu_s(self) -> float:
        """CPU seconds by the control group, or without one as far as `look` has seen them."""
        group_cpu_s = self._group_cpu_s()
        return self._seen_cpu_s if group_cpu_s is None else group_cpu_s

    def _group_cpu_s(self) -> float | None:
        used = self._cgroup.cpu_s() if self._cgroup is not None else None
        return None if used is None or self._cpu_s_before is None else used - self._cpu_s_before


def _read_some(selector: selectors.BaseSelector, key: selectors.SelectorKey, limits: Limits) -> bool:
    """Move what is ready into the stream's buffer; False when that would exceed the limit, which is kept exactly."""
    buffer: bytearray = key.data
    data = os.read(key.fd, READ_BYTES)
    if not data:
        selector.unregister(key.fileobj)
        return True
    room = (limits.output_kib << 10) - len(buffer)
    buffer += data[:room]
    return len(data) <= room


def _request(job: Job) -> bytes:
    return marshal.dumps((list(job.argv), job.environment, job.folder, list(job.rlimits), job.wrapped))


def _sealed_memory(stack: contextlib.ExitStack, content: bytes) -> int:
    """A descriptor that reads as `content` and cannot be changed by who gets it."""
    fd = os.memfd_create("sandbox-input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, fd)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def read_reports(report: bytes) -> dict[str, Any]:
    """Merge the JSON documents, one a line, that bubblewrap writes as its status; the last may be cut by its end."""
    merged: dict[str, Any] = {}
    for line in report.split(b"\n")[:-1]:
        merged.update(json.loads(line))
    return merged
