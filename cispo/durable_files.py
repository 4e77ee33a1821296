"""Files that outlive a kill: written whole or not at all, lines that are there or torn at the end, nothing between."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cispo.errors import RunFolderError

DRAFT_SUFFIX = ".draft"
"""Ends the hidden name under which a file is written before it takes its place."""


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file so that a reader, or a kill at any moment, meets the old one or the whole new one; text as UTF-8."""
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=DRAFT_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in [content] if isinstance(content, str | bytes) else content:
                file.write(piece if isinstance(piece, bytes) else piece.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(draft)
        raise
    sync_folder(path.parent)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON, which is there for good when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line as it stands and as a record of a step; RunFolderError names one that somebody has damaged."""
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{path}:{number} is no line of {path.stem}; delete it") from error
        found.append((line, record))
    return found


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline: a line is complete when its newline is written."""
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.flush()
        os.fsync(file.fileno())


def last_line(path: Path, block_bytes: int = 1 << 16) -> bytes:
    """The last complete line of a file, or nothing; only the file's end is read."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = b""
        while size > 0 and tail.rstrip(b"\n").count(b"\n") < 1:
            start = max(0, size - block_bytes)
            file.seek(start)
            tail = file.read(size - start) + tail
            size = start
    return tail.rstrip(b"\n").rpartition(b"\n")[2]


def sync_folder(path: Path) -> None:
    """Make a rename in the folder last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
