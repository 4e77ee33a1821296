"""A link: two processes and a way for tensors from the first to the second, whatever other groups they belong to.

NCCL where both have a GPU of their own, gloo on CPUs. A third process may enter their meeting: if it learns
that one of them is gone, it says so there (`declare_lost`), because NCCL itself would wait for it.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from cispo.errors import CispoError, DeadlineError
from cispo.parallel.meeting import Meeting

SENDER, RECEIVER = 0, 1
_SPIN_S = 0.02
_NAP_S = 0.001
_LOOK_S = 0.1
_GROUP_TIMEOUT = timedelta(hours=24)
"""Of the group itself. Deadlines are the link's own: that of an NCCL group would end the process."""


class LinkLostError(CispoError, ConnectionError):
    """The other end of a link is gone; the message names the link and says how that was seen."""


class Link:
    """One end of a link. Both ends are opened at the same time, by two processes that use the same name.

    name: of no other link of the meeting, ever. place: SENDER or RECEIVER. device: of the tensors that go through it,
    this process's own GPU or the CPU. LinkLostError or DeadlineError where the other does not come within timeout_s.
    """

    def __init__(self, meeting: Meeting, name: str, place: int, device: torch.device, timeout_s: float) -> None:
        self.name, self.is_sender = name, place == SENDER
        self._meeting = meeting
        if meeting.is_lost(name):
            raise LinkLostError(f"link {name}: the other end is gone")
        meeting.store.set(f"here/{name}/{place}", "")
        self._wait(lambda: bool(meeting.store.check([f"here/{name}/{1 - place}"])), timeout_s, "the other end to come")
        self._backend = self._open(meeting.room(f"link/{name}"), place, device, timeout_s)

    def start(self, tensor: Tensor) -> dist.Work:
        """Begin to send a contiguous tensor, or to receive one of this size into it; in turn at both ends."""
        work: dist.Work = self._backend.broadcast([tensor], _options())
        return work

    def wait(self, work: dist.Work, timeout_s: float) -> None:
        """Until it has been done; what is launched on the device's current stream afterwards sees it.

        LinkLostError where the other end is gone, DeadlineError after timeout_s.
        """
        self._wait(work.is_completed, timeout_s, "tensors to move")
        try:
            work.wait()
        except RuntimeError as error:
            raise LinkLostError(f"link {self.name}: {error}") from error

    def close(self) -> None:
        """Let go of it, whatever is under way; the other end is not asked."""
        self._backend.abort()

    def _open(self, store: Store, place: int, device: torch.device, timeout_s: float) -> Any:
        """In a thread of its own, because what opens a group looks for no other sign than the other end's own."""
        opened: Future[Any] = Future()

        def open_and_try() -> None:
            try:
                backend = _open_backend(store, place, device, timeout_s)
                backend.broadcast([torch.zeros(1, device=device)], _options()).wait()
                opened.set_result(backend)
            except Exception as error:
                opened.set_exception(error)

        threading.Thread(target=open_and_try, daemon=True, name=f"opens link {self.name}").start()
        self._wait(opened.done, timeout_s, "the other end to open")
        try:
            return opened.result()
        except RuntimeError as error:
            raise LinkLostError(f"link {self.name}: {error}") from error

    def _wait(self, is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
        # Pieces take some hundred microseconds, less than it takes to sleep and wake.
        started = looked = time.perf_counter()
        while not is_done():
            now = time.perf_counter()
            if now - looked > _LOOK_S:
                looked = now
                if self._meeting.is_lost(self.name):
                    raise LinkLostError(f"link {self.name}: the other end is gone")
                if now - started > timeout_s:
                    raise DeadlineError(f"link {self.name}: waited {timeout_s:g} s for {what}")
            if now - started > _SPIN_S:
                time.sleep(_NAP_S)


def _options() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank, options.asyncOp = SENDER, True
    return options


def _open_backend(store: Store, place: int, device: torch.device, timeout_s: float) -> Any:
    if device.type != "cuda":
        # The constructor already connects, and waits so long for the other end.
        return dist.ProcessGroupGloo(store, place, 2, timedelta(seconds=timeout_s))
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _GROUP_TIMEOUT
    # Else NCCL's watchdog ends this process when a link to a process that died is closed.
    name, before = "TORCH_NCCL_ASYNC_ERROR_HANDLING", os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    os.environ[name] = "0"
    try:
        return dist.ProcessGroupNCCL(store, place, 2, options)
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
