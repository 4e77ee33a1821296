"""What a tree of processes uses now, read from /proc; for limits that no control group holds."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class TreeUsage:
    """cpu_s includes children that ended and were waited for; starved_s is how long the process that waited longest was
    ready to run without getting a core; resident_bytes counts shared pages once a process."""

    cpu_s: float = 0.0
    resident_bytes: int = 0
    starved_s: float = 0.0


def tree_usage(root_pid: int) -> TreeUsage:
    """The sum over the living descendants of `root_pid`, without itself."""
    stats = {int(name): fields for name in os.listdir("/proc") if name.isdigit() and (fields := _stat_fields(name))}
    children = defaultdict(list)
    for pid, fields in stats.items():
        children[int(fields[1])].append(pid)
    found: list[int] = []
    waiting = list(children[root_pid])
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting.extend(children[pid])
    return TreeUsage(
        cpu_s=sum(sum(map(int, stats[pid][11:15])) for pid in found) / CLOCK_TICKS_PER_S,
        resident_bytes=sum(int(stats[pid][21]) for pid in found) * PAGE_BYTES,
        starved_s=max((_starved_s(pid) for pid in found), default=0.0),
    )


def _stat_fields(pid: str) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on (utime, stime, cutime, cstime are 11 to 14, rss is 21)."""
    try:
        return Path("/proc", pid, "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return []


def _starved_s(pid: int) -> float:
    """0 where the kernel keeps no scheduler statistics, so that all time counts as the program's own."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[1]) / 1e9
    except OSError:
        return 0.0
