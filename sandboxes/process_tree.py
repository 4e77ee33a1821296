"""What a tree of processes uses now, read from /proc; for limits that no control group holds."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Below the warden come bubblewrap and its first process inside; all deeper processes are the program's.
SANDBOX_LEVELS = 2


@dataclass(frozen=True, slots=True)
class TreeUsage:
    """What living processes have used so far.

    cpu_s: includes children that ended and were waited for.
    resident_bytes: shared pages count once a process.
    starved_s: how long the program was ready to run without getting a core. It is the sum along the way to it, where
    each waits for the next, and of the program's own processes the one that waited longest: were they added up, a
    program could wait for itself many times over. A wait counts when it is over.
    is_runnable: some process runs, or waits for a core, at this moment.
    is_uninterruptible: some process waits for a disk, or for a child made by vfork, which looks the same.
    """

    cpu_s: float = 0.0
    resident_bytes: int = 0
    starved_s: float = 0.0
    is_runnable: bool = False
    is_uninterruptible: bool = False


def tree_usage(root_pid: int) -> TreeUsage:
    """The usage of the living descendants of `root_pid`, without itself."""
    stats = {int(name): fields for name in os.listdir("/proc") if name.isdigit() and (fields := _stat_fields(name))}
    children = defaultdict(list)
    for pid, fields in stats.items():
        children[int(fields[1])].append(pid)
    levels = [children[root_pid]]
    while levels[-1]:
        levels.append([child for pid in levels[-1] for child in children[pid]])
    found = [pid for level in levels for pid in level]
    way = [pid for level in levels[:SANDBOX_LEVELS] for pid in level]
    own = [pid for level in levels[SANDBOX_LEVELS:] for pid in level]
    return TreeUsage(
        cpu_s=sum(sum(map(int, stats[pid][11:15])) for pid in found) / CLOCK_TICKS_PER_S,
        resident_bytes=sum(int(stats[pid][21]) for pid in found) * PAGE_BYTES,
        starved_s=sum(map(_starved_s, way)) + max(map(_starved_s, own), default=0.0),
        is_runnable=any(stats[pid][0] == b"R" for pid in found),
        is_uninterruptible=any(stats[pid][0] == b"D" for pid in found),
    )


def _starved_s(pid: int) -> float:
    """Seconds that a process ever waited for a core; 0 where the kernel does not count them."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[1]) / 1e9
    except OSError:
        return 0.0


def _stat_fields(pid: str) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on (utime, stime, cutime, cstime are 11 to 14, rss is 21)."""
    try:
        return Path("/proc", pid, "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []
