"""Where processes find each other: a TCPStore that one of them holds and the others enter by its address."""

from datetime import timedelta
from typing import Self

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

_HOLDERS_TIMEOUT = timedelta(seconds=300)


class Meeting:
    """A store that all who know its address share."""

    def __init__(self, store: TCPStore, address: str, timeout: timedelta) -> None:
        """Use `open` or `enter`."""
        self.store, self.address, self._timeout = store, address, timeout

    @classmethod
    def open(cls, host: str) -> Self:
        """A meeting that this process holds, on a free port. host: how the others reach this machine."""
        store = TCPStore(host, 0, None, is_master=True, wait_for_workers=False, timeout=_HOLDERS_TIMEOUT)
        return cls(store, f"{host}:{store.port}", _HOLDERS_TIMEOUT)

    @classmethod
    def enter(cls, address: str, timeout_s: float) -> Self:
        """The meeting that another process holds."""
        timeout = timedelta(seconds=timeout_s)
        return cls(_connect(address, timeout), address, timeout)

    def room(self, name: str) -> Store:
        """A store of the same processes in which nobody meets those of other rooms.

        By a connection of its own: a connection serves one call at a time, and a call that waits for a key there would
        keep whoever looks for a loss waiting too.
        """
        return PrefixStore(name, _connect(self.address, self._timeout))

    def declare_lost(self, link: str) -> None:
        """Tell whoever waits at an end of this link that the other is gone."""
        self.store.set(f"lost/{link}", "")

    def is_lost(self, link: str) -> bool:
        return bool(self.store.check([f"lost/{link}"]))


def _connect(address: str, timeout: timedelta) -> TCPStore:
    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), None, is_master=False, wait_for_workers=False, timeout=timeout)
