"""The warden: one small process per sandbox slot that starts, ends and reaps the slot's programs, one at a time.

It runs as a script of the standard library alone (`python -I -S warden.py FD [LOCK]`), talking to the process that
opened the sandbox over the socket FD and holding its slot's lock with it. It exists for three reasons:

- it sits in the slot's control groups, so programs are born inside their limits. Moving a process in costs 5 to 20 ms
  for every program (the kernel waits for a grace period); being forked inside costs nothing;
- it is a subreaper: whatever a program or a killed bubblewrap leaves behind becomes its child, and is killed and reaped
  before it reports the end. `--die-with-parent` alone leaves orphans when the parent dies in its first milliseconds;
- it outlives nobody: when its socket closes, however its owner died, it kills what runs, leaves the groups and exits.

Messages are marshalled tuples, one a packet; file descriptors travel beside the request. The warden never reads
anything a program wrote.
"""

import array
import contextlib
import ctypes
import fcntl
import importlib
import marshal
import os
import resource
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING or __name__ != "__main__":
    from cispo.sandboxes.kill_witness import Testimony
else:
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # last, as files here bear names of the library
    Testimony = importlib.import_module("kill_witness").Testimony

MAX_PACKET_BYTES = 1 << 17
MAX_FDS = 64
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
ADDR_NO_RANDOMIZE, PERSONALITY_AS_IT_IS = 0x0040000, 0xFFFFFFFF
FIRST_SPARE_FD = 128
REMOVE_ATTEMPTS, REMOVE_PAUSE_MS = 200, 5

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def fix_addresses() -> None:
    """Programs get the same addresses every time: Python orders sets of objects by them, and a verdict must not change.

    A container's own filter may refuse this call; then programs run as they would have, with addresses by chance.
    """
    before = _libc.personality(ctypes.c_ulong(PERSONALITY_AS_IT_IS))
    if before != -1:
        _libc.personality(ctypes.c_ulong(before | ADDR_NO_RANDOMIZE))


def main(control_fd: int, *lock_fd: int) -> None:
    for fd in (control_fd, *lock_fd):
        os.set_inheritable(fd, False)
    control = socket.socket(fileno=control_fd)
    uid, groups, homes = marshal.loads(control.recv(MAX_PACKET_BYTES))
    try:
        prepare(uid, groups)
    except OSError as error:
        control.send(marshal.dumps(("failed", str(error))))
        return
    control.send(marshal.dumps(("ready", "")))
    try:
        serve(control, uid)
    finally:
        end_children()
        for group, home in zip(groups, homes, strict=True):
            leave_group(group, home)


def prepare(uid: int | None, groups: list[str]) -> None:
    """Become the slot's subreaper, end what an earlier owner of the slot left, and enter the control groups."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if uid is not None:
        end_processes_of(uid)
    for group in groups:
        write_file(f"{group}/cgroup.procs", b"0")


def leave_group(group: str, home: str) -> None:
    """Go back to where the owner is and remove the group, which stays busy for some milliseconds."""
    with contextlib.suppress(OSError):  # the home is gone
        write_file(f"{home}/cgroup.procs", b"0")
    for _ in range(REMOVE_ATTEMPTS):
        try:
            os.rmdir(group)
            return
        except OSError:
            select.poll().poll(REMOVE_PAUSE_MS)


def serve(control: socket.socket, uid: int | None) -> None:
    while True:
        packet, fds = receive(control)
        if not packet:
            return
        request: Any = marshal.loads(packet)
        if request == "end":  # arrived after its program had ended
            continue
        try:
            reply, owner_is_gone = run_program(control, uid, request, fds)
        except OSError as error:
            end_children()
            reply, owner_is_gone = ("failed", f"{type(error).__name__}: {error}"), False
        if owner_is_gone:
            return
        control.send(marshal.dumps(reply))


def receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """socket.recv_fds ignores its flags, and without this one the descriptors would reach every program."""
    space = socket.CMSG_LEN(MAX_FDS * array.array("i").itemsize)
    packet, messages, _, _ = control.recvmsg(MAX_PACKET_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for _, _, data in messages:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return packet, list(fds)


def run_program(control: socket.socket, uid: int | None, request: Any, fds: list[int]) -> tuple[tuple[str, Any], bool]:
    """Run one program to its end. Returns the reply, and whether the owner has closed the socket."""
    *request, wrapped = request
    cpu_s_before = cpu_s_of_children()
    failure_read, failure_write = os.pipe()
    witness = None if wrapped is None else Witness(wrapped)
    try:
        pid = os.fork()
        if pid == 0:
            become_program(uid, request, fds, failure_write, witness)
        os.close(failure_write)
        for fd in fds:
            os.close(fd)
        with os.fdopen(failure_read, "rb") as failures:
            failure = failures.read()
        if failure:
            os.waitpid(pid, 0)
            return ("failed", failure.decode(errors="replace")), False
        owner_is_gone = wait_for_end(control, pid, witness)
        _, wait_status = os.waitpid(pid, 0)
        end_children()
    finally:
        if witness is not None:
            witness.testimony.close()
    exit_code, cpu_s = os.waitstatus_to_exitcode(wait_status), cpu_s_of_children() - cpu_s_before
    return ("ended", (exit_code, cpu_s, None if witness is None else witness.seen())), owner_is_gone


class Witness:
    """What kill_witness.py tells of one program. is_wrapped: bubblewrap and its first process are no part of it."""

    def __init__(self, is_wrapped: bool) -> None:
        self.testimony = Testimony()
        self.has_own_doing = self.has_first_outlived = False
        self._is_wrapped = is_wrapped

    def seen(self) -> tuple[bool, bool, bool]:
        return self.testimony.is_available, self.has_own_doing, self.has_first_outlived

    def note(self, pid: int) -> None:
        caller = self.testimony.next_caller()
        if caller is None:
            return
        if self._is_wrapped and caller == pid:  # about to repeat the exit code of the program, or of a first process
            self.has_first_outlived |= any(not is_dead(child) for child in children_of(pid))  # that was killed
        elif self._is_wrapped and parent_of(caller) == pid:
            self.has_first_outlived = True
        else:
            self.has_own_doing = True
        self.testimony.let_go()


def cpu_s_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def become_program(
    uid: int | None, request: Any, fds: list[int], failure_fd: int, witness: "Witness | None"
) -> NoReturn:
    """In the forked child: take the descriptors, limits and user id of the program, then execute it."""
    try:
        argv, environment, folder, limits = request
        os.setsid()
        os.umask(0o022)
        failure_fd = fcntl.fcntl(failure_fd, fcntl.F_DUPFD_CLOEXEC, FIRST_SPARE_FD)
        if witness is not None:
            witness.testimony.keep_above(FIRST_SPARE_FD)
        take_descriptors(fds)
        os.chdir(folder)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        for kind, value in limits:
            resource.setrlimit(kind, value)
        write_file("/proc/self/oom_score_adj", b"1000")
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        fix_addresses()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if witness is not None:
            witness.testimony.begin()
        os.execve(argv[0], argv, environment)
    except BaseException as error:
        os.write(failure_fd, f"{type(error).__name__}: {error}".encode())
    os._exit(127)


def take_descriptors(fds: list[int]) -> None:
    """Number the descriptors 0, 1, 2, ...; everything else here is closed by execve."""
    spares = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_SPARE_FD) for fd in fds]
    os.closerange(len(spares), FIRST_SPARE_FD)
    for number, fd in enumerate(spares):
        os.dup2(fd, number, inheritable=True)


def wait_for_end(control: socket.socket, pid: int, witness: "Witness | None") -> bool:
    """Wait until the program ends, or kill it when told so. Returns whether the owner has closed the socket."""
    poll = select.poll()
    pidfd = os.pidfd_open(pid)
    try:
        poll.register(pidfd, select.POLLIN)
        poll.register(control, select.POLLIN)
        if witness is not None and witness.testimony.listen():
            poll.register(witness.testimony, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            told = ready.pop(witness.testimony.fileno(), 0) if witness is not None else 0
            if witness is not None and told & select.POLLIN:
                witness.note(pid)  # one, and then the others have their turn: a program can call as fast as it is heard
            elif witness is not None and told:  # it hangs up: nobody is under the filter any more
                poll.unregister(witness.testimony)
            if pidfd in ready:
                return False
            if not ready:
                continue
            packet = control.recv(MAX_PACKET_BYTES)
            end_children(keep_zombie=pid)
            if not packet:
                return True
            poll.unregister(control)
    finally:
        os.close(pidfd)


def end_children(keep_zombie: int | None = None) -> None:
    """Kill and reap children, and theirs as they become ours, until there are none but the zombie `keep_zombie`."""
    while True:
        children = [pid for pid in children_of(os.getpid())] if has_children() else []
        others = [pid for pid in children if pid != keep_zombie]
        if not others and (keep_zombie is None or is_dead(keep_zombie)):
            return
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in others:
            os.waitpid(pid, 0)
        if keep_zombie is not None:
            os.waitid(os.P_PID, keep_zombie, os.WEXITED | os.WNOWAIT)


def has_children() -> bool:
    """A look that costs one system call, so that a program's ordinary end needs no walk over /proc."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def children_of(parent: int) -> list[int]:
    return [pid for pid in all_pids() if parent_of(pid) == parent]


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def parent_of(pid: int) -> int | None:
    fields = stat_fields(pid)
    return int(fields[1]) if fields else None


def is_dead(pid: int) -> bool:
    fields = stat_fields(pid)
    return not fields or fields[0] in (b"Z", b"X")


def stat_fields(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def end_processes_of(uid: int) -> None:
    """Kill what runs under the slot's own user id: it can only be left from a warden that was itself killed."""
    while True:
        found = [pid for pid in all_pids() if owner_of(pid) == uid and not is_dead(pid)]
        if not found:
            return
        for pid in found:
            kill_if_of(pid, uid)
        select.poll().poll(1)


def kill_if_of(pid: int, uid: int) -> None:
    """Kill by a descriptor of the process: by now its number may be that of somebody else's."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            if owner_of(pid) == uid:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


def owner_of(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:  # the folder's own owner is root for some processes
            return next(int(line.split()[1]) for line in file if line.startswith(b"Uid:"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def write_file(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
