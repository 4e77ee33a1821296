"""The default sandbox: each program in namespaces of its own, made by bubblewrap (the command `bwrap`) on this machine.

What a program sees: the host's /usr read-only, a /proc of its own processes, a /dev of a few harmless devices, and one
writable folder of limited size, /task, which is also /tmp and its working folder. What it does not get: a network, the
host's processes, files or environment, a user id that owns anything, capabilities, new namespaces, or a life after
`run`.

Programs never run as root, not even inside a user namespace of root: there owner permission still opens
/proc/sys/kernel/core_pattern. Started by root, each slot has a user id of its own (slots.py); started by anybody else,
programs run as that user, unseen and unreachable behind the namespaces. The environment is given to bwrap itself,
because its --clearenv leaves the parent's readable in /proc/1/environ.

Not given: protection from errors in the kernel, from side channels of the processor, and from measuring time.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cispo.errors import SandboxError, SandboxLostError
from cispo.sandboxes.bounds import resource_limits
from cispo.sandboxes.kill_witness import DEADLY_EXIT_CODES
from cispo.sandboxes.seccomp import seccomp_filter
from cispo.sandboxes.session import SERVER_SOURCE
from cispo.sandboxes.slotted import SlottedSandbox, conclude
from cispo.sandboxes.supervisor import OVERHEAD_PIDS, Ended, Job, Supervisor, read_reports
from cispo.sandboxes.types import Capabilities, ExecResult, ExecStatus, Limits

INSTALL_HINT = "install it with `apt-get install bubblewrap` (or your system's package of that name)"
OLDEST_VERSION = (0, 8, 0)  # the first with --disable-userns
OLDEST_PYTHON = (3, 9)
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/task",
    "TMPDIR": "/task",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # sets of strings have one order, so a verdict does not change between runs
    "MALLOC_ARENA_MAX": "1",  # threads would reserve 64 MiB of address space each
}
PROBE_SOURCE = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
REPORT_FD, FIRST_INPUT_FD = 3, 4
PRLIMIT = Path("/usr/bin/prlimit")


class BubblewrapSandbox(SlottedSandbox):
    """Opens after one trial program has run; raises SandboxError with the remedy when that is not possible."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._bwrap = find_bubblewrap()
        self._seccomp = seccomp_filter()
        self._root: list[str] = root_arguments()
        self._knows_killers = False
        try:
            self._python, self._python_version = self._choose_python()
            self._capabilities = self._find_capabilities()
        except BaseException:
            self.close()
            raise

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def _run_in(
        self, supervisor: Supervisor, argv: Sequence[str], stdin: bytes, files: Mapping[str, bytes], limits: Limits
    ) -> Ended:
        return supervisor.run(self._job(supervisor, argv, stdin, files, limits))

    def _result(self, ended: Ended, limits: Limits) -> ExecResult:
        """bwrap reports an exit code only for a program that it did start."""
        self._knows_killers = ended.testimony.is_available
        exit_code = read_reports(bytes(ended.report)).get("exit-code")
        if ended.stopped is None and not ended.was_out_of_memory:
            if ended.exit_code < 0:
                raise SandboxLostError(f"somebody outside of the sandbox killed bubblewrap (signal {-ended.exit_code})")
            if exit_code is None:
                message = ended.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
                raise SandboxError(
                    f"bubblewrap could not set the sandbox up (exit code {ended.exit_code}): {message[0]}"
                )
            seen = ended.testimony
            if exit_code in DEADLY_EXIT_CODES and seen.is_available and not seen.has_first_outlived:
                raise SandboxLostError("somebody outside of the sandbox killed its first process")
        return conclude(ended, 137 if exit_code is None else exit_code, limits)

    def _session_job(self, supervisor: Supervisor, limits: Limits) -> Job:
        argv = [self._python, "-S", "-s", "-c", SERVER_SOURCE]
        return self._job(supervisor, argv, b"", {}, limits, is_session=True)

    def _job(
        self,
        supervisor: Supervisor,
        argv: Sequence[str],
        stdin: bytes,
        files: Mapping[str, bytes],
        limits: Limits,
        *,
        is_session: bool = False,
    ) -> Job:
        """The program of a session is process 1 inside and has no limit of its own on CPU seconds."""
        inputs = [] if self._seccomp is None else [self._seccomp]
        arguments = [*self._isolation(limits), *self._root, *self._writable(limits)]
        for name, content in files.items():
            arguments += ["--perms", "0644", "--file", str(FIRST_INPUT_FD + len(inputs)), f"/task/{name}"]
            inputs.append(content)
        arguments += ["--as-pid-1"] if is_session else []
        arguments += ["--chdir", "/task", "--", *self._process_limit(supervisor, limits), *argv]
        rlimits = [item for item in resource_limits(limits) if not is_session or item[0] != resource.RLIMIT_CPU]
        if supervisor.slot.uid is not None:
            rlimits.append((resource.RLIMIT_NPROC, (limits.pids + OVERHEAD_PIDS,) * 2))
        wrapped = None if is_session else True  # session_server.py is a witness itself, and there can be only one
        return Job([self._bwrap, *arguments], ENVIRONMENT, "/", limits, rlimits, stdin, inputs, wrapped)

    def _isolation(self, limits: Limits) -> list[str]:
        seccomp = [] if self._seccomp is None else ["--seccomp", str(FIRST_INPUT_FD)]
        return [
            "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000",
            "--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
            *seccomp, "--json-status-fd", str(REPORT_FD),
        ]  # fmt: skip

    def _writable(self, limits: Limits) -> list[str]:
        """/proc is read-only: a program could make the warden the kernel's choice when memory ends (oom_score_adj)."""
        size = str(limits.files_mib << 20)
        return [
            "--proc", "/proc", "--remount-ro", "/proc",
            "--dev", "/dev", "--size", size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
            "--perms", "0700", "--size", size, "--tmpfs", "/task", "--symlink", "task", "/tmp", "--remount-ro", "/",
        ]  # fmt: skip

    def _process_limit(self, supervisor: Supervisor, limits: Limits) -> list[str]:
        """Under our own user id the limit must be set inside, where only the sandbox's processes are counted."""
        if supervisor.slot.uid is not None or not PRLIMIT.exists():
            return []
        return [str(PRLIMIT), f"--nproc={limits.pids}:{limits.pids}", "--"]

    def _choose_python(self) -> tuple[str, str]:
        """The first interpreter that a program's user can start: the system's, else the one our own is made from."""
        failures = []
        for python, binds in python_candidates():
            self._root = root_arguments() + binds
            try:
                result = self.run([python, "-S", "-s", "-c", PROBE_SOURCE])
            except SandboxError as error:
                failures.append(f"{python}: {error}")
                continue
            version = result.stdout.decode().strip()
            if result.status is ExecStatus.OK and tuple(map(int, version.split("."))) >= OLDEST_PYTHON:
                return python, version
            failures.append(f"{python}: {version or result.stderr.decode(errors='replace').strip()[-300:]}")
        raise SandboxError(
            f"no program can be run by bubblewrap ({'; '.join(failures) or 'there is no python3'}); it needs user "
            "namespaces (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0) "
            "and a python3 >= 3.9 that other users may read, such as the system's"
        )

    def _find_capabilities(self) -> Capabilities:
        supervisor = self._idle.get()
        self._idle.put(supervisor)
        assert supervisor is not None, "the trial program has made a slot"
        groups, has_uid = supervisor.cgroup, supervisor.slot.uid is not None
        return Capabilities(
            backend="bubblewrap",
            is_isolated=True,
            seccomp=self._seccomp is not None,
            memory_total=groups is not None and groups.memory is not None,
            pids_total=has_uid or PRLIMIT.exists() or (groups is not None and groups.pids is not None),
            separate_user=has_uid,
            knows_killers=self._knows_killers,
            python=self._python,
            python_version=self._python_version,
        )


def find_bubblewrap() -> str:
    """The path of `bwrap`; SandboxError when it is missing or too old."""
    path = shutil.which("bwrap")
    if path is None:
        raise SandboxError(f"bubblewrap is not installed (no `bwrap` on PATH); {INSTALL_HINT}")
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    version = tuple(map(int, re.findall(r"\d+", text)))
    if version < OLDEST_VERSION:
        raise SandboxError(f"{path} is {text.strip() or 'of unknown version'}, too old; {INSTALL_HINT}, 0.8.0 or later")
    return path


def root_arguments() -> list[str]:
    """/usr and what leads to it: on a system with merged /usr links, else the folders themselves."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    return arguments


def python_candidates() -> list[tuple[str, list[str]]]:
    """Interpreters with the arguments that make each visible inside."""
    ours = str(Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}"))
    is_visible = sys.base_prefix == "/usr" or sys.base_prefix.startswith("/usr/")
    binds = [] if is_visible else ["--ro-bind", sys.base_prefix, sys.base_prefix]
    candidates: list[tuple[str, list[str]]] = [("/usr/bin/python3", []), (ours, binds)]
    return [candidate for candidate in candidates if Path(candidate[0]).exists()]
