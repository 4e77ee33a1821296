"""Where processes find each other: a TCPStore that one of them holds and the others enter by its address."""

from datetime import timedelta
from typing import Self

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore


class Meeting:
    """A store that all who know its address share."""

    def __init__(self, store: TCPStore, address: str) -> None:
        """Use `open` or `enter`."""
        self.store, self.address = store, address

    @classmethod
    def open(cls, host: str) -> Self:
        """A meeting that this process holds, on a free port. host: how the others reach this machine."""
        store = TCPStore(host, 0, None, is_master=True, wait_for_workers=False)
        return cls(store, f"{host}:{store.port}")

    @classmethod
    def enter(cls, address: str, timeout_s: float) -> Self:
        """The meeting that another process holds."""
        host, _, port = address.rpartition(":")
        timeout = timedelta(seconds=timeout_s)
        return cls(TCPStore(host, int(port), None, is_master=False, wait_for_workers=False, timeout=timeout), address)

    def room(self, name: str) -> Store:
        """A store of the same processes in which nobody meets those of other rooms.

        By a connection of its own: a connection serves one call at a time, and a call that waits for a key there would
        keep whoever looks for a loss waiting too.
        """
        return PrefixStore(name, self.store.clone())

    def declare_lost(self, link: str) -> None:
        """Tell whoever waits at an end of this link that the other is gone."""
        self.store.set(f"lost/{link}", "")

    def is_lost(self, link: str) -> bool:
        return bool(self.store.check([f"lost/{link}"]))
