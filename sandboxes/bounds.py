"""What all backends check before a program runs, and the limits that each of its processes inherits."""

import math
import resource
import signal
from collections.abc import Mapping
from pathlib import PurePosixPath

from cispo.sandboxes.types import Limits

MAX_OPEN_FILES = 256
# Address space of an interpreter that has done nothing yet, libraries included.
BASE_ADDRESS_SPACE_MIB = 64


def check_files(files: Mapping[str, bytes], limits: Limits) -> None:
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise ValueError(f"file name {name!r} leaves the working folder; use a relative name without '..'")
    size = sum(map(len, files.values()))
    if size > limits.files_mib << 20:
        raise ValueError(f"the files hold {size} bytes; the limit files_mib is {limits.files_mib}")


def resource_limits(limits: Limits) -> list[tuple[int, tuple[int, int]]]:
    """Limits that every process inherits: the only ones without control groups, the gentler ones with them."""
    cpu_s = math.ceil(limits.cpu_s) + 1  # counted in ticks and for each process: only for when nobody watches
    address_space = (limits.memory_mib + BASE_ADDRESS_SPACE_MIB) << 20
    file_size = limits.files_mib << 20
    return [
        (resource.RLIMIT_CPU, (cpu_s, cpu_s + 1)),
        (resource.RLIMIT_AS, (address_space, address_space)),
        (resource.RLIMIT_FSIZE, (file_size, file_size)),
        (resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES)),
        (resource.RLIMIT_CORE, (1, 1)),  # 0 would still hand the dump to a program of the host; 1 does not
    ]


def signal_of(exit_code: int) -> int | None:
    """The number of the signal that an exit code of a shell's kind stands for."""
    number = exit_code - 128
    return number if number in signal.valid_signals() else None
