"""What a hostile program may not do. Each test lets the program try, and says what it must have met."""

import os
import socket
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cispo.sandboxes import ExecResult, ExecStatus, Limits, Sandbox

Run = Callable[..., ExecResult]


def output(result: ExecResult) -> str:
    assert result.status is ExecStatus.OK, result
    return result.stdout.decode()


def attempt(action: str) -> str:
    """A program that prints what `action` met: the name of its error, or `done` with its value."""
    return f"""
import errno, os, socket, ctypes, sys
try:
    print("done", {action})
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def test_the_sandbox_reports_what_it_enforces(sandbox: Sandbox) -> None:
    found = sandbox.capabilities()
    assert (found.backend, found.is_isolated, found.seccomp) == ("bubblewrap", True, True)
    assert found.separate_user == (os.geteuid() == 0)


def test_programs_are_never_root_inside(run_python: Run) -> None:
    assert output(run_python("import os; print(os.getresuid(), os.getresgid(), os.getgroups())")) == (
        "(1000, 1000, 1000) (1000, 1000, 1000) []\n"
    )


def test_programs_are_never_root_outside(sandbox: Sandbox) -> None:
    mark = uuid.uuid4().hex
    argv = [sandbox.capabilities().python, "-S", "-c", "import time; time.sleep(60)", mark]
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(sandbox.run, argv, limits=Limits(wall_s=1.5))
        seen = set()
        while not run.done():
            seen |= user_ids_of(mark)
    assert seen and all(0 not in ids for ids in seen)
    assert os.geteuid() == 0 or seen == {(os.geteuid(),) * 4}


def user_ids_of(mark: str) -> set[tuple[int, ...]]:
    """The four user ids, as the host sees them, of every process with `mark` on its command line."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark in (folder / "cmdline").read_text():
                line = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("Uid:"))
                found.add(tuple(map(int, line.split()[1:])))
        except OSError:
            continue
    return found


def test_programs_have_no_capabilities_and_cannot_gain_any(run_python: Run) -> None:
    status = output(run_python("print(open('/proc/self/status').read())"))
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"


@pytest.mark.parametrize(
    ("action", "met"),
    [
        ("socket.socket(socket.AF_INET)", "EAFNOSUPPORT"),
        ("socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)", "EAFNOSUPPORT"),
        ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "EAFNOSUPPORT"),
        ("socket.socket(socket.AF_VSOCK)", "EAFNOSUPPORT"),
        ("open('/usr/cispo', 'w')", "EROFS"),
        ("open('/cispo', 'w')", "EROFS"),
        ("open('/dev/cispo', 'w')", "EROFS"),
        ("open('/proc/sys/kernel/core_pattern', 'w')", "EROFS"),
        ("open('/proc/self/oom_score_adj', 'w')", "EROFS"),
        ("open('/proc/1/mem', 'r+b')", "EROFS"),
        ("open('/etc/passwd')", "ENOENT"),
        ("open('/root/.bashrc')", "ENOENT"),
        ("open('/dev/kmsg')", "ENOENT"),
        ("open('/sys/fs/cgroup')", "ENOENT"),
        ("os.setuid(0)", "EINVAL"),
        ("os.chroot('/task')", "EPERM"),
        ("os.memfd_create('x')", "EPERM"),
        ("os.nice(5)", "EPERM"),
        ("os.sched_setaffinity(0, [0])", "EPERM"),
        ("os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))", "EPERM"),
    ],
)
def test_an_attempt_meets_an_error(run_python: Run, action: str, met: str) -> None:
    assert output(run_python(attempt(action))).strip() == met


def test_killing_all_that_it_can_ends_only_the_program(run_python: Run) -> None:
    source = """
    import os
    os.kill(1, 9)
    try:
        os.kill(-1, 9)
    except ProcessLookupError:
        pass
    os.kill(os.getpid(), 9)
    """
    result = run_python(source)
    assert (result.status, result.exit_code) == (ExecStatus.RUNTIME_ERROR, 137)
    assert output(run_python("print('fine')")) == "fine\n"


@pytest.mark.parametrize(
    ("call", "met"),
    [
        ("unshare(0x10000000)", "EPERM"),  # CLONE_NEWUSER
        ("syscall(56, 0x10000000 | 17, 0, 0, 0, 0)", "EPERM"),  # clone with CLONE_NEWUSER
        ("ptrace(16, 1, 0, 0)", "EPERM"),
        ("mount(b'none', b'/task', b'tmpfs', 0, 0)", "EPERM"),
        ("syscall(425, 8, 0)", "EPERM"),  # io_uring_setup
        ("syscall(321, 0, 0, 0)", "EPERM"),  # bpf
        ("syscall(310, 1, 0, 0, 0, 0, 0)", "EPERM"),  # process_vm_readv
        ("syscall(250, 0, -3, 0)", "EPERM"),  # keyctl
        ("syscall(29, 0, 4096, 0o1600)", "EPERM"),  # shmget
        ("syscall(0x40000000 + 41, 2, 1, 0)", "ENOSYS"),  # socket by its x32 number
        ("ioctl(0, 0x5412, b'x')", "EPERM"),  # TIOCSTI
    ],
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of system calls are those of x86_64")
def test_the_filter_refuses_system_calls(run_python: Run, call: str, met: str) -> None:
    source = f"""
    import ctypes, errno
    libc = ctypes.CDLL(None, use_errno=True)
    print(libc.{call}, errno.errorcode.get(ctypes.get_errno()))
    """
    assert output(run_python(source)).split() == ["-1", met]


def test_a_server_of_the_host_cannot_be_reached(run_python: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"""
        import socket
        try:
            socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=2)
            print("connected")
        except OSError:
            print("no network")
        """
        assert output(run_python(source)).strip() == "no network"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_sockets_between_processes_of_one_program_work(run_python: Run) -> None:
    source = """
    import asyncio
    async def double(x):
        await asyncio.sleep(0.001)
        return 2 * x
    print(asyncio.run(double(21)))
    """
    assert output(run_python(source)).strip() == "42"


def test_the_environment_of_the_parent_is_nowhere(run_python: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CISPO_TEST_SECRET", "hush-4711")
    source = """
    import glob
    for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline") + ["/proc/self/environ"]:
        try:
            print(path, open(path, "rb").read())
        except OSError as error:
            print(path, error)
    """
    text = output(run_python(source))
    assert "/proc/1/environ b'PATH=" in text
    assert "hush-4711" not in text and "CISPO" not in text


def test_only_processes_of_the_sandbox_are_seen(run_python: Run) -> None:
    pids = output(run_python("import os; print(*[p for p in os.listdir('/proc') if p.isdigit()])")).split()
    assert 1 <= len(pids) <= 4 and str(os.getpid()) not in pids


def test_no_descriptor_of_ours_reaches_a_program(run_python: Run) -> None:
    source = """
    import os
    for fd in range(3, 1000):
        try:
            print(fd, os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    """
    assert output(run_python(source, files={"data.txt": b"x"})) == ""


def test_files_are_given_and_nothing_stays_from_one_run_to_the_next(run_python: Run) -> None:
    source = """
    import os
    print(sorted(os.listdir("/task")), sorted(os.listdir("/tmp")), os.listdir("/dev/shm"), os.getcwd())
    print(open("sub/data.txt").read())
    open("/tmp/left", "w").write("x")
    open("/dev/shm/left", "w").write("x")
    """
    for _ in range(2):
        text = output(run_python(source, files={"sub/data.txt": b"hello"}))
        assert text == "['sub'] ['sub'] [] /task\nhello\n"


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", "a\0b"])
def test_file_names_that_leave_the_folder_are_refused(run_python: Run, name: str) -> None:
    with pytest.raises(ValueError, match="leaves the working folder"):
        run_python("", files={name: b""})


def test_files_larger_than_the_folder_are_refused(run_python: Run) -> None:
    with pytest.raises(ValueError, match="files_mib is 1"):
        run_python("", files={"x": b"0" * (1 << 20) + b"0"}, limits=Limits(files_mib=1))


def test_standard_input_is_read_only_and_complete(run_python: Run) -> None:
    source = """
    import os, sys
    data = sys.stdin.buffer.read()
    try:
        os.write(0, b"x")
    except OSError:
        print(len(data), data[:3], data[-3:])
    """
    data = os.urandom(3 << 20)
    assert output(run_python(source, stdin=data)).strip() == f"{len(data)} {data[:3]!r} {data[-3:]!r}"


def test_a_program_cannot_forge_its_exit_code(run_python: Run) -> None:
    source = """
    import os
    for fd in range(3, 300):
        try:
            os.write(fd, b'{"exit-code": 0}\\n')
        except OSError:
            pass
    os._exit(7)
    """
    result = run_python(source)
    assert (result.status, result.exit_code) == (ExecStatus.RUNTIME_ERROR, 7)


def test_host_files_stay_as_they_are(run_python: Run, tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("as it was")
    source = f"""
    import os
    os.makedirs({str(tmp_path)!r}, exist_ok=True)  # a folder of its own: the host's /tmp is not there
    open({str(kept)!r}, "w").write("x")
    """
    assert run_python(source).status is ExecStatus.OK
    assert kept.read_text() == "as it was"
