"""Who killed a program decides: its own doing is its verdict, a kill from outside the sandbox's loss, tried again."""

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cispo.errors import SandboxError, SandboxLostError
from cispo.sandboxes import Capabilities, ExecResult, ExecStatus, Limits, Sandbox, VerdictStatus, open_sandbox
from cispo.sandboxes.attempts import LOST_RUNS, FailedAttemptsError, run_patiently
from cispo.sandboxes.docker_client import OWNER_LABEL, connect, owner_mark
from cispo.sandboxes.judge import judge_calls, judge_stdin
from cispo.sandboxes.kill_witness import MACHINES, NOTIFY, witness_filter

LIMITS = Limits(wall_s=30.0, cpu_s=5.0, memory_mib=96, pids=16)
TIMER, SET_TIMER = {"x86_64": (222, 223), "aarch64": (107, 110)}[os.uname().machine]
CLONE = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
# A program's ways to die of SIGKILL or SIGTERM, or to look so, with nobody's help.
OWN_DOINGS = {
    "kills itself": "import os; os.kill(os.getpid(), 9)",
    "terminates itself": "import os; os.kill(os.getpid(), 15)",
    "kills its group": "import os; os.kill(0, 9)",
    "kills all": "import os; os.kill(-1, 9)",
    "kills by a descriptor": "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 9)",
    "kills a thread": "import signal, threading; signal.pthread_kill(threading.get_ident(), 9)",
    "exits as if killed": "import os; os._exit(137)",
    "exits as if terminated": "raise SystemExit(143)",
    "is killed by its child": "import os, time\nif os.fork() == 0:\n    os.kill(os.getppid(), 9)\ntime.sleep(60)",
    "runs a shell that is killed": "import os\nos.execvp('sh', ['sh', '-c', 'kill -9 $$'])",
    "ends its own time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
    "sets a timer": f"""
import ctypes, struct, time
libc, timer = ctypes.CDLL(None), ctypes.c_long()
event = struct.pack("<qii48x", 0, 9, 0)
assert libc.syscall({TIMER}, 0, event, ctypes.byref(timer)) == 0
assert libc.syscall({SET_TIMER}, timer, 0, struct.pack("<qqqq", 0, 0, 0, 1000), 0) == 0
time.sleep(60)
""",
    "has a child that ends with SIGKILL": f"""
import ctypes, os, time
if ctypes.CDLL(None).syscall({CLONE}, 9, 0, 0, 0, 0) == 0:
    os._exit(0)
time.sleep(60)
""",
    "asks for SIGKILL when it may read": """
import fcntl, os, time
read_fd, write_fd = os.pipe()
fcntl.fcntl(read_fd, 10, 9)
fcntl.fcntl(read_fd, fcntl.F_SETOWN, os.getpid())
fcntl.fcntl(read_fd, fcntl.F_SETFL, os.O_ASYNC)
os.write(write_fd, b"x")
time.sleep(60)
""",
}
# Programs that kill others of their own, and go on.
HONEST = {
    "a child": "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nchild.kill()\nprint(-child.wait())",
    "a thousand children": """
import os, signal
for _ in range(200):
    pid = os.fork()
    if pid == 0:
        signal.pause()
    os.kill(pid, 9)
    os.waitpid(pid, 0)
print(9)
""",
}


class Counted:
    """A sandbox that counts how often it is asked to run something."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox, self.runs = sandbox, 0

    def run(self, *args: Any, **named: Any) -> ExecResult:
        self.runs += 1
        return self._sandbox.run(*args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sandbox, name)


@pytest.fixture(scope="module", params=["bubblewrap", pytest.param("docker", marks=pytest.mark.docker)])
def opened(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with open_sandbox(request.param, workers=1) as sandbox:
        assert sandbox.capabilities().knows_killers
        yield sandbox


@pytest.mark.parametrize("name", OWN_DOINGS)
def test_its_own_doing_is_its_verdict_at_once(opened: Sandbox, name: str) -> None:
    counted: Any = Counted(opened)
    verdict = judge_stdin(counted, OWN_DOINGS[name], [{"stdin": "", "expected": ""}], LIMITS)
    assert (verdict.status, verdict.passed) == (VerdictStatus.RUNTIME_ERROR, 0)
    assert counted.runs == 1


@pytest.mark.parametrize("name", HONEST)
def test_who_kills_children_of_its_own_goes_on(opened: Sandbox, name: str) -> None:
    verdict = judge_stdin(opened, HONEST[name], [{"stdin": "", "expected": "9"}], LIMITS)
    assert verdict.status is VerdictStatus.OK, verdict


def test_calls_without_end_keep_nobody_from_stopping_it(opened: Sandbox) -> None:
    """Eight processes signal themselves as fast as they can, and each signal waits for whoever looks on."""
    flood = """
import os, signal
signal.signal(15, signal.SIG_IGN)
for _ in range(3):
    os.fork()
while True:
    os.kill(os.getpid(), 15)
"""
    started = time.monotonic()
    result = opened.run([opened.capabilities().python, "-S", "-c", flood], limits=replace(LIMITS, wall_s=2.0))
    assert result.status is ExecStatus.TIMEOUT
    assert time.monotonic() - started < 25.0


def test_an_unsafe_program_is_told_from_its_killers_too() -> None:
    with open_sandbox("unsafe-local", workers=1) as sandbox:
        result = sandbox.run([sys.executable, "-S", "-c", OWN_DOINGS["kills itself"]])
        assert (result.status, result.exit_code) == (ExecStatus.RUNTIME_ERROR, 137)
        mark = "import time; time.sleep(61.5)"
        killer = threading.Thread(target=kill_when_seen, args=(mark,))
        killer.start()
        with pytest.raises(SandboxLostError, match="signal 9"):
            sandbox.run([sys.executable, "-S", "-c", mark])
        killer.join()


def kill_when_seen(mark: str) -> None:
    """Kill a process of this machine with `mark` on its command line, as soon as there is one."""
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (folder / "cmdline").read_bytes().split(b"\0") and folder.name != str(os.getpid()):
                    os.kill(int(folder.name), signal.SIGKILL)
                    return
            except OSError:
                continue
        time.sleep(0.005)


@pytest.mark.docker
def test_a_killed_container_is_the_sandboxs_loss_and_a_judge_tries_again() -> None:
    client = connect()
    is_over = threading.Event()
    kills = 0

    def kill_some() -> None:
        nonlocal kills
        label = {"label": f"{OWNER_LABEL}={owner_mark()}"}
        while kills < 3 and not is_over.wait(0.05):
            for container in client.containers.list(filters=label, ignore_removed=True):
                container.kill()
                kills += 1

    with open_sandbox("docker", workers=1) as sandbox:
        killer = threading.Thread(target=kill_some)
        killer.start()
        with pytest.raises(SandboxLostError, match="killed"):
            sandbox.run(["sleep", "30"], limits=LIMITS)
        source = "import time\ndef f(n):\n    time.sleep(0.5)\n    return n"
        verdict = judge_calls(sandbox, source, "f", [{"args": [1], "expected": 1}], LIMITS)
        is_over.set()
        killer.join()
        with sandbox.session(limits=LIMITS) as session:
            assert session.run(["sh", "-c", "kill -9 $$"]).exit_code == 137
            for container in client.containers.list(filters={"label": f"{OWNER_LABEL}={owner_mark()}"}):
                container.kill()
            with pytest.raises(SandboxLostError, match="killed"):
                session.run(["true"])
    client.close()
    assert (verdict.status, kills) == (VerdictStatus.OK, 3)


class Scripted:
    """Stands for a sandbox whose runs end as the test wants; the last goes on for ever."""

    def __init__(self, ends: Sequence[ExecResult | SandboxError], *, knows_killers: bool = True) -> None:
        self._ends, self._knows_killers, self.runs = list(ends), knows_killers, 0

    def run(self, argv: Sequence[str], **options: Any) -> ExecResult:
        self.runs += 1
        end = self._ends.pop(0) if len(self._ends) > 1 else self._ends[0]
        if isinstance(end, SandboxError):
            raise end
        return end

    def capabilities(self) -> Capabilities:
        return Capabilities("scripted", True, True, True, True, True, "python3", "3.11.0", self._knows_killers)


KILLED = ExecResult(ExecStatus.RUNTIME_ERROR, 137, 9, b"", b"", False, 0.1, 0.1, None)
RIGHT = ExecResult(ExecStatus.OK, 0, None, b"42\n", b"", False, 0.1, 0.1, None)
TESTS = [{"stdin": "", "expected": "42"}]


@pytest.mark.parametrize("losses", [1, 8, LOST_RUNS - 1])
def test_kills_in_a_row_do_not_decide_a_verdict(losses: int) -> None:
    sandbox: Any = Scripted([*[SandboxLostError("killed")] * losses, RIGHT])
    assert judge_stdin(sandbox, "", TESTS, LIMITS).status is VerdictStatus.OK
    assert sandbox.runs == losses + 1


def test_a_loss_that_never_ends_is_given_up_and_never_a_pass() -> None:
    sandbox: Any = Scripted([SandboxLostError("killed by nobody")])
    verdict = judge_stdin(sandbox, "", TESTS, LIMITS)
    assert (verdict.status, verdict.passed) == (VerdictStatus.SANDBOX_ERROR, 0)
    assert f"killed {LOST_RUNS} times in a row, at last: killed by nobody" in verdict.message
    assert sandbox.runs == LOST_RUNS


def test_losses_are_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr("cispo.sandboxes.attempts.time.monotonic", lambda: float(next(clock)))
    sandbox: Any = Scripted([SandboxLostError("killed")])
    with pytest.raises(FailedAttemptsError, match="killed"):
        run_patiently(sandbox, ["true"], LIMITS)
    assert sandbox.runs < LOST_RUNS


def test_where_nobody_knows_the_killer_who_is_always_killed_has_done_it() -> None:
    sandbox: Any = Scripted([KILLED], knows_killers=False)
    assert judge_stdin(sandbox, "", TESTS, LIMITS).status is VerdictStatus.RUNTIME_ERROR
    assert sandbox.runs == LOST_RUNS
    again: Any = Scripted([*[KILLED] * 8, RIGHT], knows_killers=False)
    assert judge_stdin(again, "", TESTS, LIMITS).status is VerdictStatus.OK


def returned(program: bytes, architecture: int, number: int, arguments: Sequence[int]) -> int:
    """What a filter returns for a call: a small machine for the operations that it uses."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *[*arguments, *[0] * 6][:6])
    steps = list(struct.iter_unpack("<HBBI", program))
    accumulator, place = 0, 0
    while True:
        operation, if_true, if_false, operand = steps[place]
        place += 1
        if operation == 0x06:
            return int(operand)
        if operation == 0x20:
            accumulator = struct.unpack_from("<I", data, operand)[0]
        elif operation == 0x54:
            accumulator &= operand
        else:
            assert operation == 0x15
            place += if_true if accumulator == operand else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_tells_of_deadly_calls_alone(machine: str) -> None:
    architecture, column, _ = MACHINES[machine]
    program = witness_filter(machine)
    assert program is not None and witness_filter("riscv64") is None
    kill, tgkill, exit_group, clone, prlimit = ((62, 129), (234, 131), (231, 94), (56, 220), (302, 261))

    def tells(numbers: tuple[int, int], *arguments: int) -> bool:
        return returned(program, architecture, numbers[column], arguments) == NOTIFY

    assert tells(kill, 5, 9) and tells(kill, 5, 15) and tells(tgkill, 5, 5, 9)
    assert not tells(kill, 9, 0) and not tells(kill, 15, 11) and not tells(tgkill, 9, 9, 6)
    assert tells(exit_group, 137) and tells(exit_group, 143 + 256) and not tells(exit_group, 1)
    assert tells(clone, 9) and tells(clone, 0x100000F) and not tells(clone, 0x1200011)
    assert tells(prlimit, 0, 0) and not tells(prlimit, 0, 7)
    assert not tells((0, 63), 9, 9, 9)
    assert returned(program, architecture ^ 1, kill[column], (5, 9)) != NOTIFY


WATCHED = """
import ctypes, threading
from cispo.sandboxes import open_sandbox
from cispo.sandboxes.kill_witness import Testimony
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
testimony = Testimony()
testimony.begin()
assert testimony.listen()

def answer():
    while True:
        testimony.next_caller()
        testimony.let_go()

threading.Thread(target=answer, daemon=True).start()
with open_sandbox(workers=1) as sandbox:
    print(sandbox.capabilities().knows_killers, sandbox.run([sandbox.capabilities().python, "-c", "1"]).status)
"""


def test_where_somebody_above_listens_already_the_sandbox_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["False", "ok"], done.stderr[-500:]
