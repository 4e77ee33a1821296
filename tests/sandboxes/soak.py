"""What the soak test does to a machine, and what it looks for afterwards."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cispo.sandboxes.docker_client import OWNER_LABEL, connect
from cispo.sandboxes.slots import FIRST_UID, LAST_UID

TICK_S = 0.1
# Mean seconds between two kills of a kind.
PERIOD_S = {"actor": 15.0, "warden": 6.0, "bwrap": 1.5, "container": 20.0}


class Machine:
    """Reads /proc again and again, and remembers what belonged to the given actors: processes, user ids, groups."""

    def __init__(self, actor_pids: Callable[[], list[int]]) -> None:
        self._actor_pids = actor_pids
        self.actors: set[int] = set()
        self.processes: set[tuple[int, str]] = set()
        self.uids: set[int] = set()
        self.groups: set[Path] = set()

    def look(self) -> dict[str, list[int]]:
        """Living wardens and bwraps of the actors."""
        self.actors |= set(self._actor_pids())
        stats = {int(path.name): fields_of(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
        children: dict[int, list[int]] = {}
        for pid, fields in stats.items():
            if fields:
                children.setdefault(int(fields[1]), []).append(pid)
        level, found = [pid for pid in self.actors if stats.get(pid)], dict[str, list[int]]()
        while level := [child for pid in level for child in children.get(pid, [])]:
            for pid in level:
                self._remember(pid, stats[pid][19], found)
        return found

    def _remember(self, pid: int, started: str, found: dict[str, list[int]]) -> None:
        with suppress(OSError, StopIteration):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            status = Path(f"/proc/{pid}/status").read_text()
            uid = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Uid:"))
            self.processes.add((pid, started))
            self.uids |= {uid} if FIRST_UID <= uid <= LAST_UID else set()
            if b"warden.py" in command:
                found.setdefault("warden", []).append(pid)
                groups = [line.split(":") for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
                self.groups |= {Path("/sys/fs/cgroup", names, path[1:]) for _, names, path in groups if "cispo" in path}
            elif command.split(b"\0")[0].endswith(b"bwrap"):
                found.setdefault("bwrap", []).append(pid)

    def left(self) -> list[str]:
        """What of all that is still there. A user id or group may have been given to somebody else in the meantime."""
        alive = [f"process {pid}" for pid, started in self.processes if fields_of(pid)[19:20] == [started]]
        groups = [str(path) for path in self.groups if path.exists() and not (path / "cgroup.procs").read_text()]
        client = connect()
        try:
            containers = [f"container {item.id}" for item in containers_of(client, self.actors, all=True)]
        finally:
            client.close()
        return alive + groups + containers


def containers_of(client: Any, owners: set[int], *, all: bool) -> list[Any]:
    """Containers that these processes have made: those that run, or all."""
    found = client.containers.list(all=all, filters={"label": OWNER_LABEL}, ignore_removed=True)
    return [item for item in found if int(item.labels[OWNER_LABEL].split(":")[1]) in owners]


def fields_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


class Killer:
    """Kills actors, wardens, bubblewrap processes and containers at random until it is stopped."""

    def __init__(self, machine: Machine, actor_pids: Callable[[], list[int]], seed: int) -> None:
        self.kills: Counter[str] = Counter()
        self.error: BaseException | None = None
        self._machine, self._actor_pids, self._chance = machine, actor_pids, random.Random(seed)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        client = connect()
        last = time.monotonic()
        try:
            while not self._is_over.wait(TICK_S):
                targets = {**self._machine.look(), "actor": self._actor_pids()}
                elapsed_s, last = time.monotonic() - last, time.monotonic()
                for kind, period_s in PERIOD_S.items():
                    if self._chance.random() < elapsed_s / period_s:
                        self._kill(kind, targets, client)
        except BaseException as error:  # shown by the test, which would pass without kills otherwise
            self.error = error
        finally:
            client.close()

    def _kill(self, kind: str, targets: dict[str, list[int]], client: Any) -> None:
        import docker

        with suppress(ProcessLookupError, docker.errors.DockerException):
            if kind == "container":
                if containers := containers_of(client, self._machine.actors, all=False):
                    self._chance.choice(containers).kill()
                    self.kills[kind] += 1
            elif targets.get(kind):
                os.kill(self._chance.choice(targets[kind]), signal.SIGKILL)
                self.kills[kind] += 1

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()
