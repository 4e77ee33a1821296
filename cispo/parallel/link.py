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
from functools import partial
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
_GLOO_SLACK = 1.2
_GROUP_TIMEOUT = timedelta(hours=24)
"""Of an NCCL group itself. Deadlines are the link's own: that of an NCCL group would end the process."""


class LinkLostError(CispoError, ConnectionError):
    """The other end of a link is gone; the message names the link and says how that was seen."""


class Link:
    """One end of a link. Both ends are opened at the same time, by two processes that use the same name.

    name: of no other link of the meeting, ever. place: SENDER or RECEIVER. device: of the tensors that go through it,
    this process's own GPU or the CPU. LinkLostError or DeadlineError where the other does not come within timeout_s.
    longest_wait_s: of any later `wait`; timeout_s where none is given.
    """

    def __init__(
        self,
        meeting: Meeting,
        name: str,
        place: int,
        device: torch.device,
        timeout_s: float,
        *,
        longest_wait_s: float | None = None,
    ) -> None:
        self.name, self.is_sender = name, place == SENDER
        self._meeting = meeting
        if meeting.is_lost(name):
            raise LinkLostError(f"link {name}: the other end is gone")
        meeting.store.set(f"here/{name}/{place}", "")
        deadline = time.perf_counter() + timeout_s
        self._wait(lambda: bool(meeting.store.check([f"here/{name}/{1 - place}"])), timeout_s, "the other end to come")
        # Else gloo's own deadline could pass first, and look like a loss.
        group_timeout = timedelta(seconds=_GLOO_SLACK * (longest_wait_s or timeout_s))
        self._opened: Future[Any] = Future()
        self._open(partial(_open_backend, meeting.room(f"link/{name}"), place, device, group_timeout), device, deadline)

    def start(self, tensor: Tensor) -> dist.Work:
        """Begin to send a contiguous tensor, or to receive one of this size into it; in turn at both ends.

        LinkLostError where the other end is gone.
        """
        try:
            work: dist.Work = self._opened.result().broadcast([tensor], _options())
        except RuntimeError as error:
            raise LinkLostError(f"link {self.name}: {error}") from error
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
        self._opened.add_done_callback(_abort)

    def _open(self, open_backend: Callable[[], Any], device: torch.device, deadline: float) -> None:
        """In a thread of its own, because what opens a group looks for no other sign than the other end's own.

        The thread is left to itself where the wait for it ends before; what it opens then is closed at once.
        """

        def open_and_try() -> None:
            try:
                backend = open_backend()
                backend.broadcast([torch.zeros(1, device=device)], _options()).wait()
                self._opened.set_result(backend)
            except Exception as error:
                self._opened.set_exception(error)

        threading.Thread(target=open_and_try, daemon=True, name=f"opens link {self.name}").start()
        try:
            self._wait(self._opened.done, deadline - time.perf_counter(), "the other end to open")
            self._opened.result()
        except RuntimeError as error:
            raise LinkLostError(f"link {self.name}: {error}") from error
        except CispoError:
            self.close()
            raise

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
                    raise DeadlineError(f"link {self.name}: waited {round(timeout_s, 1):g} s for {what}")
            if now - started > _SPIN_S:
                time.sleep(_NAP_S)


def _abort(opened: Future[Any]) -> None:
    if opened.exception() is None:
        opened.result().abort()


def _options() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank, options.asyncOp = SENDER, True
    return options


def _open_backend(store: Store, place: int, device: torch.device, gloo_timeout: timedelta) -> Any:
    if device.type != "cuda":
        # The constructor already connects, and waits so long for the other end.
        return dist.ProcessGroupGloo(store, place, 2, gloo_timeout)
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
