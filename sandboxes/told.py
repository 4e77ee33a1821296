"""Which limit a program that failed by itself says it met, from the last line of its standard error.

The kernel refuses memory, processes and space with an error that the program sees and nobody else does. So this is its
own word. It names a failure and decides none: whatever it says, it has failed.
"""

from cispo.sandboxes.types import ExecStatus

LAST_LINE_BYTES = 4096
# As Python, shells and the C library put it.
TOLD: tuple[tuple[ExecStatus, tuple[bytes, ...]], ...] = (
    (ExecStatus.MEMORY_LIMIT, (b"MemoryError", b"Cannot allocate memory", b"std::bad_alloc")),
    (ExecStatus.DISK_LIMIT, (b"No space left on device", b"File too large", b"Disk quota exceeded")),
    (ExecStatus.PROCESS_LIMIT, (b"Resource temporarily unavailable", b"can't start new thread")),
)


def told_limit(stderr: bytes) -> ExecStatus:
    """MEMORY_LIMIT, DISK_LIMIT or PROCESS_LIMIT where the last line says so, else RUNTIME_ERROR."""
    line = stderr.rstrip()[-LAST_LINE_BYTES:].rpartition(b"\n")[2]
    for status, phrases in TOLD:
        if any(phrase in line for phrase in phrases):
            return status
    return ExecStatus.RUNTIME_ERROR
