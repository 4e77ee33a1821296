"""Control groups for sandbox slots: limits on memory and processes for a whole tree, and what it has used.

A slot's group is made below the group of the process that opens the sandbox, so limits set on that one still hold.
With version 2 a group that holds processes cannot hand controllers to children, so there the slot's group is made
beside it. Where nothing can be made, `open_cgroup` returns None and the sandbox says so in its capabilities.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

CGROUP_FILES = Path("/proc/self/cgroup")
MOUNT_FILE = Path("/proc/self/mountinfo")
# What one refused request may have asked for: a huge page, and what the kernel takes in advance for each core.
MEMORY_SLACK_BYTES = 4 << 20


@dataclass
class Cgroup:
    """One slot's groups; a controller that is not available is None. All are one folder in version 2.

    homes: the groups that this process is in, one for each folder.
    """

    version: int
    memory: Path | None
    pids: Path | None
    cpu: Path | None
    homes: tuple[Path, ...]
    _memory_mib: int = 0
    _pids: int = 0
    _memory_hits: int = 0

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(folder for folder in (self.memory, self.pids, self.cpu) if folder is not None))

    def set_limits(self, memory_mib: int, pids: int) -> None:
        """Raises OSError when the kernel refuses."""
        if self.memory is not None and memory_mib != self._memory_mib:
            limit = str(memory_mib << 20)
            if self.version == 2:
                _write(self.memory / "memory.max", limit)
                self._write_if_present(self.memory / "memory.swap.max", "0")
            else:
                self._set_memory_v1(self.memory, limit)
            self._memory_mib = memory_mib
        if self.pids is not None and pids != self._pids:
            _write(self.pids / "pids.max", str(pids))
            self._pids = pids

    def _set_memory_v1(self, folder: Path, limit: str) -> None:
        swap = folder / "memory.memsw.limit_in_bytes"
        # The limit on memory with swap may never be below the one on memory: lift it, then set both.
        self._write_if_present(swap, "-1")
        _write(folder / "memory.limit_in_bytes", limit)
        self._write_if_present(swap, limit)

    @staticmethod
    def _write_if_present(path: Path, text: str) -> None:
        if path.exists():
            _write(path, text)

    def oom_kills(self) -> int:
        """How often the kernel has killed a process of the group for memory."""
        if self.memory is None:
            return 0
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        fields = dict(line.split() for line in (self.memory / name).read_text().splitlines())
        return int(fields.get("oom_kill", 0))

    def watch_memory(self) -> None:
        """Begin to note whether the group meets its limit on memory."""
        if self.memory is None:
            return
        if self.version == 1:
            _write(self.memory / "memory.max_usage_in_bytes", "0")
        else:
            self._memory_hits = self._memory_hits_v2(self.memory)

    def has_met_memory_limit(self) -> bool:
        """Whether it has since `watch_memory`. A kill without that was for want of the machine's memory."""
        if self.memory is None:
            return False
        if self.version == 2:
            return self._memory_hits_v2(self.memory) > self._memory_hits
        # Kernels differ in whether they count failures here, but all note the highest use.
        highest = int((self.memory / "memory.max_usage_in_bytes").read_text())
        return highest + MEMORY_SLACK_BYTES >= self._memory_mib << 20

    def peak_mib(self) -> float | None:
        """The most memory in use since `watch_memory`; None in version 2, which counts from the making of the group."""
        if self.memory is None or self.version == 2:
            return None
        return int((self.memory / "memory.max_usage_in_bytes").read_text()) / (1 << 20)

    @staticmethod
    def _memory_hits_v2(folder: Path) -> int:
        fields = dict(line.split() for line in (folder / "memory.events").read_text().splitlines())
        return int(fields.get("max", 0))

    def cpu_s(self) -> float | None:
        """CPU seconds ever used in the group; None when not counted."""
        if self.cpu is None:
            return None
        if self.version == 1:
            return int((self.cpu / "cpuacct.usage").read_text()) / 1e9
        fields = dict(line.split() for line in (self.cpu / "cpu.stat").read_text().splitlines())
        return int(fields["usage_usec"]) / 1e6

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove the folders; after processes were killed the kernel says EBUSY for some milliseconds."""
        deadline = time.monotonic() + timeout_s
        for folder in self.folders:
            while folder.exists() and not _remove(folder) and time.monotonic() < deadline:
                time.sleep(0.005)


def open_cgroup(name: str, *, mounts: str | None = None, own: str | None = None) -> Cgroup | None:
    """Make (or take over) the groups called `name`; None when this process may not make any.

    mounts and own stand for the text of /proc/self/mountinfo and /proc/self/cgroup.
    """
    mounts = MOUNT_FILE.read_text() if mounts is None else mounts
    own = CGROUP_FILES.read_text() if own is None else own
    homes = _own_folders(mounts, own)
    made = {kind: folder for kind in ("memory", "pids", "cpuacct") if (folder := _make(homes.get(kind), name))}
    if made:
        from_where = {folder: homes[kind] for kind, folder in made.items()}
        return Cgroup(1, made.get("memory"), made.get("pids"), made.get("cpuacct"), tuple(from_where.values()))
    if "" in homes and (folder := _make_v2(homes[""], name)):
        return Cgroup(2, folder, folder, folder, (homes[""],))
    return None


def _own_folders(mounts: str, own: str) -> dict[str, Path]:
    """Where this process is, by controller; the key of version 2's one hierarchy is the empty string."""
    paths = {}
    for line in own.splitlines():
        _, names, path = line.split(":", 2)
        paths.update(dict.fromkeys(names.split(","), path))
    folders: dict[str, Path] = {}
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        root, mount_point = left.split()[3:5]
        kind, _, options = right.split(maxsplit=2)
        controllers = [""] if kind == "cgroup2" else options.split(",") if kind == "cgroup" else []
        for controller in set(controllers) & set(paths):
            folders[controller] = _below_mount(Path(mount_point), root, paths[controller])
    return folders


def _below_mount(mount_point: Path, root: str, path: str) -> Path:
    """In a container the path may be the host's while the mount shows only the container's part of the tree."""
    with contextlib.suppress(ValueError):
        folder = mount_point / Path(path).relative_to(root)
        if folder.is_dir():
            return folder
    return mount_point


def _make(parent: Path | None, name: str) -> Path | None:
    if parent is None:
        return None
    folder = parent / name
    try:
        folder.mkdir(exist_ok=True)
        with open(folder / "cgroup.procs", "r+b"):
            return folder
    except OSError:
        return None


def _make_v2(own: Path, name: str) -> Path | None:
    for parent in (own, own.parent):
        if _hands_on_controllers(parent / "cgroup.subtree_control") and (folder := _make(parent, name)):
            return folder
    return None


def _hands_on_controllers(control: Path) -> bool:
    wanted = {"memory", "pids"}
    if not control.exists():
        return False
    if not wanted <= set(control.read_text().split()):
        with contextlib.suppress(OSError):  # refused where processes live in the group, and where it is not ours
            control.write_text("+memory +pids")
    return wanted <= set(control.read_text().split())


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _remove(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
