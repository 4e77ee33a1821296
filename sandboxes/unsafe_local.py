"""A backend that isolates nothing, for machines without namespaces and for trusted programs; only by its name.

Programs run as the user who opened the sandbox, in a folder that is removed afterwards, with time, output and
per-process memory limited. They can read and write what that user can, use the network, and outwit the limits.
"""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cispo.sandboxes.bounds import resource_limits
from cispo.sandboxes.bubblewrap import ENVIRONMENT
from cispo.sandboxes.slotted import SlottedSandbox, conclude
from cispo.sandboxes.supervisor import Ended, Job, Supervisor
from cispo.sandboxes.types import Capabilities, ExecResult, Limits


class UnsafeLocalSandbox(SlottedSandbox):
    """Raises SandboxError only when a program cannot be started."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, own_user=True)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            backend="unsafe-local",
            is_isolated=False,
            seccomp=False,
            memory_total=False,
            pids_total=False,
            separate_user=False,
            knows_killers=True,
            python=sys.executable,
            python_version=platform.python_version(),
        )

    def _run_in(
        self, supervisor: Supervisor, argv: Sequence[str], stdin: bytes, files: Mapping[str, bytes], limits: Limits
    ) -> Ended:
        folder = Path(tempfile.mkdtemp(prefix="cispo-unsafe-"))
        try:
            for name, content in files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            environment = {**ENVIRONMENT, "PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder)}
            job = Job(list(argv), environment, str(folder), limits, resource_limits(limits), stdin)
            return supervisor.run(job)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _result(self, ended: Ended, limits: Limits) -> ExecResult:
        exit_code = ended.exit_code if ended.exit_code >= 0 else 128 - ended.exit_code
        return conclude(ended, exit_code, limits)
