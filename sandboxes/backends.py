"""Opening a sandbox by the name of its backend. It fails closed: no isolation is an error, never a plain process."""

from typing import Any

from cispo.sandboxes.bubblewrap import BubblewrapSandbox, find_bubblewrap
from cispo.sandboxes.docker_client import connect
from cispo.sandboxes.docker_sandbox import DockerSandbox
from cispo.sandboxes.settings import SandboxSettings
from cispo.sandboxes.types import Sandbox
from cispo.sandboxes.unsafe_local import UnsafeLocalSandbox


def open_sandbox(backend: str = "auto", **settings: Any) -> Sandbox:
    """Open a sandbox; close it, or use it in a `with` statement.

    backend: `auto` (bubblewrap), `bubblewrap`, `docker`, or `unsafe-local`.
    settings: fields of SandboxSettings, of which `workers` is the number of programs that may run at a time.

    Raises SandboxError when the backend cannot work here, saying what to install; ValueError for wrong settings.
    """
    checked = SandboxSettings.model_validate({"backend": backend, **settings})
    if checked.backend == "unsafe-local":
        return UnsafeLocalSandbox(checked.workers)
    if checked.backend == "docker":
        return DockerSandbox(checked.workers, image=checked.image, runtime=checked.runtime)
    return BubblewrapSandbox(checked.workers)


def check_backend(backend: str) -> None:
    """Whether what a backend needs is installed on this machine, without opening a sandbox; SandboxError if not."""
    if backend == "docker":
        connect().close()
    elif backend != "unsafe-local":
        find_bubblewrap()
