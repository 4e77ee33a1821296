"""Opening a sandbox: it fails closed, with the remedy, and isolates nothing only when asked to by name."""

import os
import stat
from pathlib import Path

import pytest
from pydantic import ValidationError

from cispo.errors import SandboxError
from cispo.sandboxes import ExecStatus, Limits, bubblewrap, open_sandbox
from cispo.sandboxes.cgroups import open_cgroup
from cispo.sandboxes.seccomp import seccomp_filter
from cispo.sandboxes.settings import SandboxSettings
from cispo.sandboxes.slots import take_slot
from cispo.sandboxes.supervisor import Watch


def test_a_missing_bubblewrap_is_an_error_that_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        open_sandbox()


def fake_bwrap(folder: Path, script: str) -> None:
    path = folder / "bwrap"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_an_old_bubblewrap_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_bwrap(tmp_path, "echo bubblewrap 0.4.1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"0\.4\.1.*too old.*0\.8\.0 or later"):
        open_sandbox()


def test_a_bubblewrap_that_cannot_work_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "find_bubblewrap", lambda: "/bin/false")
    with pytest.raises(SandboxError, match="needs user namespaces"):
        open_sandbox()


@pytest.mark.parametrize("wrong", [{"backend": "dokcer"}, {"workers": 0}, {"cpu_s": 0}, {"memory": 3}])
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        open_sandbox(**wrong)  # type: ignore[arg-type]


def test_settings_and_limits_agree() -> None:
    assert SandboxSettings().limits() == Limits()
    assert SandboxSettings(cpu_s=2, pids=9).limits() == Limits(cpu_s=2, pids=9)


def test_unsafe_local_runs_programs_and_says_what_it_is() -> None:
    with open_sandbox("unsafe-local", workers=1) as sandbox:
        found = sandbox.capabilities()
        assert (found.backend, found.is_isolated) == ("unsafe-local", False)
        result = sandbox.run(
            [found.python, "-c", "import os, sys; print(open('a/b').read(), sys.stdin.read()); sys.exit(3)"],
            stdin=b"in",
            files={"a/b": b"file"},
        )
        assert (result.status, result.exit_code, result.stdout) == (ExecStatus.RUNTIME_ERROR, 3, b"file in\n")
        loop = "import os\nos.fork()\nwhile True: pass"
        assert sandbox.run([found.python, "-c", loop], limits=Limits(cpu_s=0.3)).status is ExecStatus.TIMEOUT
        with pytest.raises(SandboxError, match="/nowhere/python"):
            sandbox.run(["/nowhere/python"])


def test_a_program_that_does_not_exist_is_a_sandbox_error() -> None:
    with open_sandbox(workers=1) as sandbox, pytest.raises(SandboxError, match="No such file"):
        sandbox.run(["/usr/bin/no-such-program"])


def test_the_filter_is_made_for_known_machines_only() -> None:
    for machine in ("x86_64", "aarch64"):
        program = seccomp_filter(machine)
        assert program is not None and len(program) % 8 == 0 and len(program) // 8 < 4096
    assert seccomp_filter("riscv64") is None


def test_a_lock_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("without root there are no locks")
    folder = tmp_path / "locks"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(SandboxError, match="only root can write"):
        take_slot(0, lock_folder=folder)


def test_slots_of_one_machine_have_different_user_ids_until_released(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("without root there are no locks")
    first, second = take_slot(0, lock_folder=tmp_path / "locks"), take_slot(1, lock_folder=tmp_path / "locks")
    assert first.uid is not None and first.uid != second.uid
    first.release()
    third = take_slot(2, lock_folder=tmp_path / "locks")
    assert third.uid == first.uid
    second.release()
    third.release()


def test_groups_of_version_2_are_made_beside_a_group_that_holds_processes(tmp_path: Path) -> None:
    own = tmp_path / "user.slice" / "app.scope"
    own.mkdir(parents=True)
    (own.parent / "cgroup.subtree_control").write_text("memory pids")
    for path in (own, own.parent):
        (path / "cgroup.procs").touch()
    made = own.parent / "slot"
    made.mkdir()
    (made / "cgroup.procs").touch()
    mounts = f"31 23 0:26 / {tmp_path} rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    group = open_cgroup("slot", mounts=mounts, own="0::/user.slice/app.scope\n")
    assert group is not None and group.version == 2
    assert group.folders == (made,) and group.homes == (own,)
    (made / "memory.events").write_text("low 0\nmax 3\noom_kill 2\n")
    (made / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    group.set_limits(64, 9)
    assert (made / "memory.max").read_text() == str(64 << 20) and (made / "pids.max").read_text() == "9"
    assert (group.oom_kills(), group.cpu_s()) == (2, 1.5)
    watch = Watch(Limits(), group, os.getpid())
    (made / "memory.events").write_text("low 0\nmax 3\noom_kill 3\n")
    assert not watch.was_out_of_memory(), "the kernel killed for want of the machine's memory"
    (made / "memory.events").write_text("low 0\nmax 4\noom_kill 3\n")
    assert watch.was_out_of_memory()


def test_no_groups_where_none_may_be_made(tmp_path: Path) -> None:
    assert open_cgroup("slot", mounts="", own="0::/\n") is None
    mounts = f"31 23 0:26 / {tmp_path}/none rw shared:9 - cgroup2 cgroup2 rw\n"
    assert open_cgroup("slot", mounts=mounts, own="0::/x\n") is None
