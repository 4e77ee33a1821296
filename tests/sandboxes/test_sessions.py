"""Sessions on both backends: files stay from command to command, processes do not, and each command has its limits."""

from collections.abc import Iterator

import pytest

from cispo.errors import SandboxClosedError, SandboxError, UnsupportedError
from cispo.sandboxes import ExecStatus, Limits, Sandbox, open_sandbox
from cispo.sandboxes.session import Session

LIMITS = Limits(wall_s=30.0, cpu_s=2.0, memory_mib=96, pids=16, output_kib=64, files_mib=8)


@pytest.fixture(scope="module", params=["bubblewrap", pytest.param("docker", marks=pytest.mark.docker)])
def opened(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with open_sandbox(request.param, workers=1) as sandbox:
        yield sandbox


@pytest.fixture
def session(opened: Sandbox) -> Iterator[Session]:
    with opened.session(files={"a/b.txt": b"given"}, limits=LIMITS) as session:
        assert isinstance(session, Session)
        yield session


def test_files_stay_and_stdin_and_streams_go_through(session: Session) -> None:
    assert session.run(["sh", "-c", "cat a/b.txt; echo kept > c; cat >&2; exit 3"], stdin=b"in").exit_code == 3
    result = session.run(["sh", "-c", "cat c d; pwd"], files={"d": b"later\n"})
    assert (result.status, result.stdout) == (ExecStatus.OK, b"kept\nlater\n/task\n")
    data = bytes(3 << 20)
    assert session.run(["wc", "-c"], stdin=data).stdout.split() == [str(len(data)).encode()]
    assert session.run(["no-such-program"]).exit_code == 127
    with pytest.raises(ValueError, match="leaves the working folder"):
        session.run([], files={"../x": b""})


@pytest.mark.parametrize(
    ("source", "limits", "statuses"),
    [
        ("while True: pass", Limits(cpu_s=0.3), {"timeout"}),
        ("import time; time.sleep(600)", Limits(wall_s=0.3), {"timeout"}),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", Limits(cpu_s=0.3), {"timeout"}),
        ("import os\nwhile os.fork() == 0 or os.wait(): pass", Limits(cpu_s=0.3), {"timeout", "process_limit"}),
        ("kept = []\nwhile True: kept.append(bytearray(4 << 20))", LIMITS, {"memory_limit"}),
        ("while True: print('x' * 1000)", LIMITS, {"output_limit"}),
        ("for n in range(99):\n    open(f'f{n}', 'wb').write(bytes(1 << 20))", LIMITS, {"disk_limit"}),
        ("import os\nfor n in range(99):\n    if os.fork() == 0: os.read(0, 1); os.pause()", LIMITS, {"process_limit"}),
    ],
)
def test_each_command_has_its_limits_and_the_session_goes_on(
    opened: Sandbox, session: Session, source: str, limits: Limits, statuses: set[str]
) -> None:
    source = source.replace("os.pause()", "__import__('signal').pause()")
    result = session.run([opened.capabilities().python, "-S", "-c", source], limits=limits)
    assert result.status.value in statuses, result
    assert session.run(["sh", "-c", "cat a/b.txt"]).stdout == b"given"


def test_nothing_runs_between_two_commands(opened: Sandbox, session: Session) -> None:
    python = opened.capabilities().python
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1)\n    open('late', 'w')\nprint(1)"
    assert session.run([python, "-S", "-c", daemon]).stdout == b"1\n"
    count = "import os; print(sum(name.isdigit() for name in os.listdir('/proc')))"
    assert session.run([python, "-S", "-c", count]).stdout == b"2\n"
    assert session.run(["sh", "-c", "sleep 1.2; ls"]).stdout == b"a\n"


def test_a_command_can_neither_end_nor_reach_what_started_it(opened: Sandbox, session: Session) -> None:
    source = """
import os
for number in (1, 2, 3, 9, 11, 15, 17, 19):
    os.kill(1, number)
for path in ("/proc/1/mem", "/proc/1/fd/100", "/proc/1/environ"):
    try:
        open(path, "rb").read(1)
        print("open", path)
    except OSError:
        pass
for fd in range(3, 256):
    try:
        os.write(fd, b'{"stopped": "", "exit_code": 0}')
        print("written", fd)
    except OSError:
        pass
"""
    result = session.run([opened.capabilities().python, "-S", "-c", source])
    assert (result.status, result.stdout) == (ExecStatus.OK, b"")


def test_sessions_are_apart_and_a_closed_one_is_an_error(opened: Sandbox) -> None:
    with opened.session() as first, opened.session() as second:
        first.run([], files={"x": b"1"})
        assert second.run(["ls"]).stdout == b""
    with pytest.raises(SandboxClosedError):
        first.run(["ls"])
    with opened.session() as third:
        assert third.run(["ls"]).stdout == b""


def test_closing_the_sandbox_closes_its_sessions(request: pytest.FixtureRequest, opened: Sandbox) -> None:
    with open_sandbox(opened.capabilities().backend, workers=1) as sandbox:  # type: ignore[arg-type]
        session = sandbox.session()
    with pytest.raises(SandboxClosedError):
        session.run(["ls"])
    with pytest.raises(SandboxError, match="closed"):
        sandbox.session()


def test_unsafe_local_has_none() -> None:
    with open_sandbox("unsafe-local", workers=1) as sandbox, pytest.raises(UnsupportedError, match="bubblewrap"):
        sandbox.session()


def test_files_that_cannot_be_written_are_an_error(opened: Sandbox) -> None:
    with pytest.raises(SandboxError, match="files could not be written"):
        opened.session(files={"a": b"", "a/b": b""}, limits=LIMITS)
