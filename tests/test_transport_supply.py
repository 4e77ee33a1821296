"""Ends of links that go at awkward moments: nobody waits for them longer than for the news, and none is blamed."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cispo.parallel.link import RECEIVER, SENDER, Link, LinkLostError
from cispo.parallel.meeting import Meeting

CPU = torch.device("cpu")
TIMEOUT_S = 40.0


@pytest.fixture
def meeting() -> Meeting:
    return Meeting.open("127.0.0.1")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.mark.parametrize("place", [SENDER, RECEIVER])
def test_an_end_that_dies_while_its_link_opens_ends_the_others_wait(meeting: Meeting, place: int) -> None:
    own = Meeting.enter(meeting.address, TIMEOUT_S)
    # The other end has come, and dies before it says where it can be reached.
    meeting.store.set(f"here/rollout:0/{1 - place}", "")
    threading.Timer(0.3, meeting.declare_lost, ["rollout:0"]).start()
    started = time.perf_counter()
    with pytest.raises(LinkLostError, match="link rollout:0: the other end is gone"):
        Link(own, "rollout:0", place, CPU, TIMEOUT_S)
    assert time.perf_counter() - started < TIMEOUT_S / 4
    # Whoever else looks into the same meeting is not held up either, though the link's thread still waits.
    assert not own.is_lost("rollout:1")
    assert time.perf_counter() - started < TIMEOUT_S / 4
    opener = next(thread for thread in threading.enumerate() if thread.name == "opens link rollout:0")
    late = dist.ProcessGroupGloo(meeting.room("link/rollout:0"), 1 - place, 2, timedelta(seconds=TIMEOUT_S))
    opened = late.broadcast([torch.zeros(1)], _from_sender())
    opened.wait()
    opener.join(TIMEOUT_S)
    assert not opener.is_alive()


def _from_sender() -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank = SENDER
    return options
