"""What the docker backend encloses, bounds and leaves behind. Needs a Docker daemon and the image of build_image.py."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cispo.errors import SandboxClosedError, SandboxError
from cispo.sandboxes import ExecResult, ExecStatus, Limits, Sandbox, VerdictStatus, open_sandbox
from cispo.sandboxes.docker_client import OWNER_LABEL, connect, owner_mark, reap
from cispo.sandboxes.judge import judge_asserts, judge_calls, judge_repo, judge_stdin

pytestmark = pytest.mark.docker
SMALL = Limits(wall_s=20.0, cpu_s=1.0, memory_mib=96, pids=16, output_kib=64, files_mib=8)
Run = Callable[..., ExecResult]


@pytest.fixture(scope="module")
def docker() -> Iterator[Sandbox]:
    with open_sandbox("docker", workers=2) as opened:
        yield opened
    assert own_containers() == []


def own_containers() -> list[str]:
    """Containers that this process has made and not removed; one that is being removed is given time."""
    client = connect()
    try:
        label = f"{OWNER_LABEL}={owner_mark()}"
        deadline = time.monotonic() + 10.0
        while found := client.containers.list(all=True, filters={"label": label}, ignore_removed=True):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return [container.id for container in found]
    finally:
        client.close()


@pytest.fixture(scope="module")
def run(docker: Sandbox) -> Run:
    def run_source(source: str, **options: Any) -> ExecResult:
        options.setdefault("limits", SMALL)
        return docker.run(["python3", "-S", "-s", "-c", source], **options)

    return run_source


def test_it_says_what_it_enforces(docker: Sandbox) -> None:
    found = docker.capabilities()
    assert (found.backend, found.is_isolated, found.memory_total, found.pids_total) == ("docker", True, True, True)


def test_files_stdin_streams_and_exit_code_go_through(run: Run) -> None:
    source = "import sys; print(open('a/b').read(), sys.stdin.read()); print('e', file=sys.stderr); sys.exit(3)"
    result = run(source, stdin=b"in", files={"a/b": b"file"})
    assert (result.status, result.exit_code, result.signal) == (ExecStatus.RUNTIME_ERROR, 3, None)
    assert (result.stdout, result.stderr) == (b"file in\n", b"e\n")
    assert run("import sys; print(len(sys.stdin.read()))", stdin=bytes(5 << 20)).stdout == b"5242880\n"
    assert run("import os; os.kill(os.getpid(), 11)").signal == 11


@pytest.mark.parametrize(
    ("action", "met"),
    [
        ("socket.create_connection(('1.1.1.1', 53), 2)", "ENETUNREACH"),
        ("open('/usr/x', 'w')", "EROFS"),
        ("open('/x', 'w')", "EROFS"),
        ("open('/proc/sys/kernel/core_pattern', 'w')", "EROFS"),
        ("os.setuid(0)", "EPERM"),
        ("os.chroot('/task')", "EPERM"),
        ("open('/var/run/docker.sock')", "ENOENT"),
        ("os.mknod('/task/disk', 0o60666, os.makedev(8, 0))", "EPERM"),
    ],
)
def test_an_attempt_meets_an_error(run: Run, action: str, met: str) -> None:
    source = f"import errno, os, socket\ntry:\n    {action}\n    print('done')\nexcept OSError as e:\n"
    assert run(source + "    print(errno.errorcode[e.errno])").stdout.decode().strip() == met


def test_programs_have_no_privileges(run: Run) -> None:
    status = run("print(open('/proc/self/status').read())").stdout.decode()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (fields["NoNewPrivs"], fields["Seccomp"], fields["Uid"].split()[0]) == ("1", "2", "65534")


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("while True: pass", ExecStatus.TIMEOUT),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", ExecStatus.TIMEOUT),
        ("x = []\nwhile True: x.append(bytearray(8 << 20))", ExecStatus.MEMORY_LIMIT),
        ("while True: print('x' * 1000)", ExecStatus.OUTPUT_LIMIT),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", ExecStatus.OUTPUT_LIMIT),
    ],
)
def test_limits_hold(run: Run, source: str, status: ExecStatus) -> None:
    assert run(source).status is status
    assert run("print('fine')").stdout == b"fine\n"


def test_a_sleeper_is_stopped_by_the_clock(run: Run) -> None:
    started = time.monotonic()
    result = run("import time; time.sleep(60)", limits=Limits(wall_s=1.0))
    assert (result.status, result.exit_code) == (ExecStatus.TIMEOUT, None)
    assert time.monotonic() - started < 20.0


@pytest.mark.parametrize("folder", ["/task", "/tmp"])
def test_folders_are_bounded(run: Run, folder: str) -> None:
    source = f"""
written = 0
try:
    for name in range(20):
        with open(f"{folder}/{{name}}", "wb") as file:
            written += file.write(bytes(1 << 20))
except OSError as error:
    print(written >> 20, error.errno)
"""
    assert run(source).stdout.split() == [b"8", b"28"]


def test_containers_made_in_advance_serve_whoever_wants_their_sizes(docker: Any, run: Run) -> None:
    run("pass")
    docker._maker.submit(lambda: None).result()
    spares = list(docker._spares.containers)
    assert spares
    assert run("print(1)", limits=dataclasses.replace(SMALL, wall_s=7.0, output_kib=1)).stdout == b"1\n"
    docker._maker.submit(lambda: None).result()
    assert spares[1:] == list(docker._spares.containers)[: len(spares) - 1]


def test_a_daemon_does_not_hold_the_result_nor_outlive_it(run: Run) -> None:
    source = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint('done')"
    started = time.monotonic()
    assert run(source).stdout == b"done\n"
    assert time.monotonic() - started < 20.0


JUDGED = Limits(wall_s=20.0, cpu_s=2.0, memory_mib=128, pids=16, output_kib=64, files_mib=8)
CALLS = [{"args": [2, 3], "expected": 5}, {"args": [20, 22], "expected": 42}]
ASSERTS = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(20, 22) == 42\n"
TESTS = {
    "test_sum.py": "from work import f\n\ndef test_f():\n    assert f(20, 22) == 42\n\n"
    "def test_small():\n    assert f(2, 3) == 5\n\ndef test_half():\n    assert f(0.5, 0.25) == 0.75\n"
}
IDS = [f"test_sum.py::test_{name}" for name in ("f", "small", "half")]
SAME = "class A:\n    __eq__ = lambda s, o: True\ndef f(a, b): return A()"
EXITS = "import os\ndef f(a, b): os._exit(0)"
FORGES = """
import os
def f(a, b):
    for fd in range(1, 64):
        try:
            os.write(fd, b'["loaded"]\\n["passed", 1]\\n["end", 0]\\n')
        except OSError:
            pass
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("source", "is_right"),
    [
        ("def f(a, b): return a + b", True),
        ("print('hello')\ndef f(a, b):\n    print(a)\n    return sum((a, b))", True),
        ("def f(a, b): return a * b", False),
        (SAME, False),
        (EXITS, False),
        (FORGES, False),
        ("import os\nos._exit(0)\ndef f(a, b): return 0", False),
        ("def f(a, b):\n    x = []\n    while True: x.append(bytearray(8 << 20))", False),
    ],
)
def test_the_judges_reach_the_same_verdicts_here(docker: Sandbox, source: str, is_right: bool) -> None:
    verdicts = [
        judge_calls(docker, source, "f", CALLS, JUDGED),
        judge_asserts(docker, source, ASSERTS, "f", JUDGED),
        judge_repo(docker, {"work.py": ""}, {"work.py": source}, TESTS, IDS, JUDGED),
    ]
    assert [verdict.status is VerdictStatus.OK for verdict in verdicts] == [is_right] * 3, verdicts
    assert VerdictStatus.SANDBOX_ERROR not in [verdict.status for verdict in verdicts]


@pytest.mark.parametrize(
    ("source", "is_right"),
    [
        ("print(sum(map(int, input().split())))", True),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit(0)", True),
        ("import os\nos._exit(0)", False),
        ("print(5)\nraise SystemExit(1)", False),
        ("print(5)\nprint(5)", False),
        ("import glob\nfor p in glob.glob('/proc/*/cmdline'): print(open(p).read())", False),
    ],
)
def test_output_is_judged_here_too(docker: Sandbox, source: str, is_right: bool) -> None:
    verdict = judge_stdin(docker, source, [{"stdin": "2 3", "expected": "5"}], JUDGED)
    assert (verdict.status is VerdictStatus.OK) == is_right
    assert verdict.status is not VerdictStatus.SANDBOX_ERROR


OWNER = """
import sys
from cispo.sandboxes import Limits, open_sandbox
with open_sandbox("docker", workers=1) as sandbox:
    print("open", flush=True)
    sandbox.run(["python3", "-c", "import time; time.sleep(600)"], limits=Limits(wall_s=600.0))
"""


def test_what_a_killed_owner_leaves_is_reaped() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"open\n"
        time.sleep(1.0)
        owner.kill()
    client = connect()
    assert reap(client) >= 1
    assert reap(client) == 0
    client.close()


def test_a_closed_sandbox_and_a_missing_image_are_errors() -> None:
    sandbox = open_sandbox("docker", workers=1)
    sandbox.close()
    with pytest.raises(SandboxClosedError):
        sandbox.run(["true"])
    with pytest.raises(SandboxError, match="build_image"):
        open_sandbox("docker", workers=1, image="no-such-image")


def test_a_missing_daemon_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere.sock")
    with pytest.raises(SandboxError, match="no Docker daemon"):
        open_sandbox("docker", workers=1)
