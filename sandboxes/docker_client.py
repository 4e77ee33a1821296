"""The connection to a Docker daemon, and the reaper of containers whose owner is gone."""

import contextlib
import os
from pathlib import Path
from typing import Any

from cispo.errors import SandboxError
from cispo.sandboxes.bounds import MAX_OPEN_FILES
from cispo.sandboxes.types import Limits

DEFAULT_IMAGE = "cispo-sandbox"
OWNER_LABEL = "cispo.sandbox.owner"
USER_ID = 65534
# The first process of the container.
OVERHEAD_PIDS = 1
Sizes = tuple[int, int, int]


def connect() -> Any:
    """A client of the daemon that the environment names (DOCKER_HOST, or this machine's); SandboxError without one."""
    import docker

    try:
        client = docker.from_env(timeout=60)
        # Else each request copies this process's environment, which another thread may be changing: a KeyError.
        client.api.trust_env = False
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        raise SandboxError(f"no Docker daemon answers ({str(error)[:200]}); start one or set DOCKER_HOST") from error
    return client


def owner_mark() -> str:
    """Names this process among all of this boot of this machine."""
    return f"{_boot_id()}:{os.getpid()}:{_start_time(os.getpid())}"


def reap(client: Any) -> int:
    """Remove containers whose owner, a process of this machine, has ended; returns how many there were."""
    count = 0
    for container in client.containers.list(all=True, filters={"label": OWNER_LABEL}, ignore_removed=True):
        boot_id, pid, start_time = container.labels[OWNER_LABEL].split(":")
        if boot_id == _boot_id() and pid.isdigit() and _start_time(int(pid)) != start_time:
            remove(container)
            count += 1
    return count


def remove(container: Any) -> None:
    """Kill and remove; no error when it has gone already, or is going."""
    import docker

    with contextlib.suppress(docker.errors.APIError, OSError):
        container.remove(force=True, v=True)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def image_id(client: Any, name: str) -> str:
    """The id of an image, which stays the same should the name move on."""
    import docker

    try:
        return str(client.images.get(name).id)
    except docker.errors.ImageNotFound as error:
        raise SandboxError(
            f"the Docker image {name!r} is not here; run: python -m cispo.sandboxes.build_image, or name another"
        ) from error


def sizes_of(limits: Limits) -> Sizes:
    """Those limits that a container is made with: its memory, processes and folders; the others are its session's."""
    return limits.memory_mib, limits.pids, limits.files_mib


def create_container(
    client: Any, image: str, command: list[str], environment: dict[str, str], limits: Limits, *, runtime: str | None
) -> Any:
    """A container that is not started yet, closed to all but its stdin and its two folders in memory."""
    from docker.types import LogConfig, Ulimit

    file_bytes = limits.files_mib << 20
    folder = f"rw,exec,nosuid,nodev,size={limits.files_mib}m,mode=0700,uid={USER_ID},gid={USER_ID}"
    ceilings = {"nofile": MAX_OPEN_FILES, "fsize": file_bytes, "core": 0}
    return client.containers.create(
        image,
        command,
        environment=environment,
        labels={OWNER_LABEL: owner_mark()},
        user=f"{USER_ID}:{USER_ID}",
        working_dir="/task",
        hostname="sandbox",
        network_mode="none",
        ipc_mode="none",
        read_only=True,
        tmpfs={"/task": folder, "/tmp": folder},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        pids_limit=limits.pids + OVERHEAD_PIDS,
        mem_limit=f"{limits.memory_mib}m",
        memswap_limit=f"{limits.memory_mib}m",
        ulimits=[Ulimit(name=name, soft=value, hard=value) for name, value in ceilings.items()],
        log_config=LogConfig(type=LogConfig.types.NONE),
        stdin_open=True,
        runtime=runtime,
    )
