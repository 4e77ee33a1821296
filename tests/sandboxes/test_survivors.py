"""Nothing outlives a run: not a program stopped at any moment, not one whose warden or owner is killed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cispo.errors import SandboxError
from cispo.sandboxes import ExecStatus, Limits, open_sandbox, supervisor
from cispo.sandboxes.slots import FIRST_UID, LAST_UID

# Ignores what can be ignored, leaves its session, and leaves children behind.
STUBBORN = """
import os, signal, sys, time
for number in (1, 2, 3, 10, 12, 13, 14, 15):
    signal.signal(number, signal.SIG_IGN)
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        os.fork()
        time.sleep(600)
time.sleep(600)
"""


def processes_with(mark: str) -> list[int]:
    """Pids of living processes of this machine with `mark` in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if mark.encode() in command:
                found.append(int(folder.name))
    return found


def children_of(pid: int) -> list[int]:
    stats = {int(folder.name): folder / "stat" for folder in Path("/proc").iterdir() if folder.name.isdigit()}
    found = []
    for child, stat in stats.items():
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(child)
    return found


def wait_until_gone(mark: str) -> list[int]:
    deadline = time.monotonic() + 20.0
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def test_a_program_stopped_at_any_moment_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "TICK_S", 0.001)
    mark, chance = uuid.uuid4().hex, random.Random(0)
    with open_sandbox(workers=1) as sandbox:
        argv = [sandbox.capabilities().python, "-S", "-c", STUBBORN, mark]
        for _ in range(40):
            result = sandbox.run(argv, limits=Limits(wall_s=0.5, cpu_s=chance.uniform(0.0005, 0.02)))
            assert result.status is ExecStatus.TIMEOUT
            assert processes_with(mark) == []


def test_a_killed_warden_is_an_error_and_its_programs_end(monkeypatch: pytest.MonkeyPatch) -> None:
    mark, chance = uuid.uuid4().hex, random.Random(1)
    with open_sandbox(workers=1) as sandbox, ThreadPoolExecutor(1) as pool:
        python = sandbox.capabilities().python
        for _ in range(6):
            run = pool.submit(sandbox.run, [python, "-S", "-c", STUBBORN, mark], limits=Limits(wall_s=60.0))
            time.sleep(chance.uniform(0.0, 0.08))
            for pid in set(children_of(os.getpid())) & set(processes_with("warden.py")):
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(SandboxError, match="warden"):
                run.result(60.0)
            assert sandbox.run([python, "-S", "-c", "print(1)"]).stdout == b"1\n"
            assert wait_until_gone(mark) == []


OWNER = """
import sys
from cispo.sandboxes import Limits, open_sandbox
with open_sandbox(workers=1) as sandbox:
    print("open", flush=True)
    sandbox.run([sandbox.capabilities().python, "-S", "-c", sys.argv[1], sys.argv[2]], limits=Limits(wall_s=600.0))
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_owner_takes_its_wardens_and_programs_along(seed: int) -> None:
    mark = uuid.uuid4().hex
    with subprocess.Popen([sys.executable, "-c", OWNER, STUBBORN, mark], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"open\n"
        time.sleep(random.Random(seed).uniform(0.0, 0.05))
        wardens = children_of(owner.pid)
        groups = {path for path in all_slot_groups() if set(map(str, wardens)) & pids_in(path)}
        owner.kill()
    assert wardens
    assert wait_until_gone(mark) == []
    deadline = time.monotonic() + 20.0
    while any(Path(f"/proc/{pid}").exists() for pid in wardens) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in wardens)
    assert not {path for path in groups if path.exists() and not pids_in(path)}


def test_closing_leaves_no_zombie_no_descriptor_and_no_group() -> None:
    before = set(os.listdir("/proc/self/fd"))
    others = set(children_of(os.getpid()))
    with open_sandbox(workers=2) as sandbox, ThreadPoolExecutor(2) as pool:
        python = sandbox.capabilities().python
        runs = [pool.submit(sandbox.run, [python, "-S", "-c", "pass"]) for _ in range(8)]
        assert all(run.result().status is ExecStatus.OK for run in runs)
        wardens = set(children_of(os.getpid())) - others
        groups = {path for path in all_slot_groups() if set(map(str, wardens)) & pids_in(path)}
    assert len(wardens) == 2
    assert not wardens & set(children_of(os.getpid()))
    assert set(os.listdir("/proc/self/fd")) == before
    assert not {path for path in groups if path.exists() and not pids_in(path)}
    sandbox.close()
    with pytest.raises(SandboxError, match="closed"):
        sandbox.run([python])


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def all_slot_groups() -> set[Path]:
    return set(Path("/sys/fs/cgroup").rglob("cispo-sandbox-*"))


def pids_in(group: Path) -> set[str]:
    try:
        return set((group / "cgroup.procs").read_text().split())
    except OSError:
        return set()


def test_processes_at_one_time_get_user_ids_of_their_own() -> None:
    if os.geteuid() != 0:
        pytest.skip("without root all programs run under our own user id")
    mark = uuid.uuid4().hex
    owners = [
        subprocess.Popen([sys.executable, "-c", OWNER, "import time; time.sleep(600)", mark], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        seen = [wait_for_program(owner.pid, mark) for owner in owners]
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()
    assert all(FIRST_UID <= uid <= LAST_UID for uid in seen)
    assert seen[0] != seen[1]
    assert wait_until_gone(mark) == []


def wait_for_program(owner: int, mark: str) -> int:
    """The user id of the bubblewrap that a warden of `owner` has started with `mark` on its command line."""
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        grandchildren = {program for warden in children_of(owner) for program in children_of(warden)}
        for program in grandchildren & set(processes_with(mark)):
            if "bwrap" in command_of(program):
                return Path(f"/proc/{program}").stat().st_uid
        time.sleep(0.01)
    raise AssertionError("no program was started")


def test_many_threads_share_the_slots() -> None:
    with open_sandbox(workers=2) as sandbox:
        python = sandbox.capabilities().python
        results: dict[int, bytes] = {}

        def work(start: int) -> None:
            for number in range(start, start + 5):
                results[number] = sandbox.run([python, "-S", "-c", f"print({number})"]).stdout

        threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 30, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: b"%d\n" % number for number in range(30)}


def test_a_forked_process_may_not_use_the_sandbox() -> None:
    with open_sandbox(workers=1) as sandbox:
        pid = os.fork()
        if pid == 0:
            try:
                sandbox.run(["/usr/bin/true"])
            except SandboxError as error:
                os._exit(0 if "open one in each process" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
