"""Slots: the user id that programs of one slot run under, held by one process of the machine at a time.

A user id of its own keeps programs that run side by side from counting against each other's process limit, and from
signalling or reading each other should the namespaces fail. Ids are given out by locks on files that only root can
open; a lock ends with the process that holds it. Without root there is one id, our own, and nothing to lock.
"""

import fcntl
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from cispo.errors import SandboxError

# Between the ranges that Debian and systemd give out (60001-60577 and 61184 on), so no account has one.
FIRST_UID, LAST_UID = 60600, 61111
LOCK_FOLDER = Path("/run/cispo-sandboxes")


@dataclass
class Slot:
    """uid is None where programs run under our own user id; name is unique among the machine's open slots."""

    uid: int | None
    name: str
    lock_fd: int | None = None

    def release(self) -> None:
        """Let go of the lock; it is free when the warden, which inherits it, has ended too."""
        if self.lock_fd is not None:
            os.close(self.lock_fd)
            self.lock_fd = None


def take_slot(index: int, *, own_user: bool = False, lock_folder: Path = LOCK_FOLDER) -> Slot:
    """The free user id with the lowest number when started as root, or our own where there is no other, or by wish.

    `index` makes the names of slots with our own user id differ. Raises SandboxError when the lock folder cannot be
    used or all ids are taken.
    """
    if own_user or os.geteuid() != 0:
        return Slot(None, f"cispo-sandbox-{os.getpid()}-{index}")
    _open_lock_folder(lock_folder)
    for uid in range(FIRST_UID, LAST_UID + 1):
        fd = None if _has_account(uid) else _try_lock(lock_folder / f"uid-{uid}.lock")
        if fd is not None:
            return Slot(uid, f"cispo-sandbox-{uid}", fd)
    raise SandboxError(
        f"all {LAST_UID - FIRST_UID + 1} sandbox user ids of this machine are in use; "
        "end another run or lower sandbox.workers"
    )


def _open_lock_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        reason = error.strerror
        raise SandboxError(f"the sandbox cannot keep its locks in {folder} ({reason}); make /run writable") from error
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != 0 or status.st_mode & 0o022:
        raise SandboxError(f"{folder} must be a folder that only root can write; remove it and start again")


def _has_account(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _try_lock(path: Path) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd
