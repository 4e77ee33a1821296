"""Weights through links: every bit arrives in the receiver's own weights, and ends that are gone hold nobody up."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import nn

from cispo.broadcast import weights_checksum
from cispo.errors import DeadlineError
from cispo.parallel.link import RECEIVER, SENDER, Link, LinkLostError
from cispo.parallel.meeting import Meeting
from cispo.weight_stream import (
    ALIGNMENT_BYTES,
    Sent,
    WeightBlock,
    piece_bytes,
    receive_block,
    send_block,
    send_weights,
    weight_sizes,
)

CPU = torch.device("cpu")
TIMEOUT_S = 20.0


class Layered(nn.Module):
    """Weights of two dtypes, of which none has the size of a piece, one is longer than several and one is empty."""

    def __init__(self, seed: int, *, wide: int = 3_000_000) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.layers = nn.ModuleList(nn.ParameterDict({"a": weight(7, 5), "b": weight(3, 11)}) for _ in range(2))
        self.embedding = weight(wide, dtype=torch.bfloat16)
        self.nothing = weight(0)
        self.scale = weight()


@pytest.fixture
def meeting() -> Meeting:
    return Meeting.open("127.0.0.1")


@pytest.fixture
def beside() -> Iterator[Callable[..., Future[object]]]:
    """Call something in another thread, which stands for another process."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


def open_both(
    meeting: Meeting, name: str, beside: Callable[..., Future[Link]], timeout_s: float = TIMEOUT_S
) -> tuple[Link, Link]:
    other = beside(Link, Meeting.enter(meeting.address, TIMEOUT_S), name, RECEIVER, CPU, timeout_s)
    return Link(meeting, name, SENDER, CPU, timeout_s), other.result()


def send(links: Sequence[Link], module: nn.Module, version: int = 3, timeout_s: float = TIMEOUT_S) -> Sent:
    """As a learner of several ranks does: one weight after the other."""
    sizes = weight_sizes(module)
    return send_weights(links, module.named_parameters(), sizes, version, device=CPU, timeout_s=timeout_s)


def receive(link: Link, module: nn.Module, *, in_block: bool = False) -> int:
    block = WeightBlock(module, CPU)
    return receive_block(link, block, weight_sizes(module), in_block=in_block, timeout_s=TIMEOUT_S)


def checksum(module: nn.Module) -> str:
    return weights_checksum(dict(module.named_parameters()))


@pytest.mark.parametrize("in_block", [False, True])
@pytest.mark.parametrize("wide", [0, 100, 3_000_000])
def test_versions_and_every_bit_arrive_time_after_time_at_all_receivers(
    meeting: Meeting, beside: Callable[..., Future[object]], monkeypatch: pytest.MonkeyPatch, wide: int, in_block: bool
) -> None:
    monkeypatch.setattr("cispo.weight_stream._BLOCK_PIECE_BYTES", 1 << 21)
    ends = [open_both(meeting, f"rollout:{index}", beside) for index in range(2)]
    held = [Layered(seed=9, wide=wide) for _ in ends]
    for version in range(3):
        policy = Layered(seed=version, wide=wide)
        expected = checksum(policy)
        came = [beside(receive, end, module, in_block=in_block) for (_, end), module in zip(ends, held, strict=True)]
        links = [start for start, _ in ends]
        if in_block:
            sent = send_block(links, WeightBlock(policy, CPU), weight_sizes(policy), version, timeout_s=TIMEOUT_S)
        else:
            sent = send(links, policy, version)
        assert [one.result() for one in came] == [version, version]
        assert [checksum(module) for module in held] == [expected, expected]
        assert sent.bytes == sum(weight.nbytes for weight in policy.parameters())
        assert not sent.lost


def test_a_block_holds_the_modules_own_weights_in_their_places() -> None:
    module = Layered(seed=0, wide=100)
    module.register_buffer("table", torch.arange(3))
    parameters, expected = list(module.parameters()), checksum(module)
    block = WeightBlock(module, CPU)
    assert checksum(module) == expected
    assert all(now is before for now, before in zip(module.parameters(), parameters, strict=True))
    starts = [weight.data_ptr() - block.bytes_B.data_ptr() for weight in module.parameters() if weight.numel()]
    assert starts == sorted(starts) and all(start % ALIGNMENT_BYTES == 0 for start in starts)
    # What is written through either is the other's.
    block.bytes_B.zero_()
    assert not any(bool(weight.any()) for weight in module.parameters())


def test_a_receiver_that_is_declared_lost_is_left_out_and_the_others_get_all(
    meeting: Meeting, beside: Callable[..., Future[object]]
) -> None:
    first, end = open_both(meeting, "alive", beside)
    # Gloo lets go of what nobody took only after the time that it was opened with.
    second, _ = open_both(meeting, "gone", beside, timeout_s=1.5)
    policy, held = Layered(seed=0), Layered(seed=1)
    came = beside(receive, end, held)
    threading.Timer(0.3, meeting.declare_lost, ["gone"]).start()
    started = time.perf_counter()
    sent = send([first, second], policy)
    assert time.perf_counter() - started < TIMEOUT_S / 2
    assert came.result() == 3
    assert list(sent.lost) == ["gone"] and "the other end is gone" in sent.lost["gone"]
    assert checksum(held) == checksum(policy)
    # The stream through the lost link stops where it was; the next one needs no sign of life from it.
    came = beside(receive, end, held)
    assert not send([first], Layered(seed=2)).lost
    came.result()
    assert checksum(held) == checksum(Layered(seed=2))


def test_a_sender_that_is_declared_lost_ends_the_receivers_wait(
    meeting: Meeting, beside: Callable[..., Future[object]]
) -> None:
    _, end = open_both(meeting, "rollout:0", beside)
    threading.Timer(0.3, meeting.declare_lost, ["rollout:0"]).start()
    with pytest.raises(LinkLostError, match=r"link rollout:0: the other end is gone"):
        receive(end, Layered(seed=0))
    # Nor does anybody wait for it again under that name.
    with pytest.raises(LinkLostError, match=r"link rollout:0: the other end is gone"):
        Link(meeting, "rollout:0", RECEIVER, CPU, TIMEOUT_S)


def test_a_wait_has_an_end_that_says_what_it_was_for(meeting: Meeting, beside: Callable[..., Future[object]]) -> None:
    with pytest.raises(DeadlineError, match=r"link alone: waited 0\.2 s for the other end to come"):
        Link(meeting, "alone", SENDER, CPU, 0.2)
    start, _ = open_both(meeting, "silent", beside, timeout_s=1.5)
    with pytest.raises(DeadlineError, match=r"link silent: waited 0\.5 s for tensors to move"):
        send([start], Layered(seed=0), timeout_s=0.5)


def test_a_piece_is_half_of_the_largest_layer_but_no_crumb_and_of_a_block_some_hundred_mebibytes() -> None:
    mib = 1 << 20
    sizes = {"layers.0.a": 3 * mib, "layers.0.b": 5 * mib, "layers.1.a": mib, "embedding": 6 * mib}
    assert piece_bytes(sizes, in_block=False) == 4 * mib
    assert piece_bytes({"embedding": 64}, in_block=False) == mib
    assert piece_bytes(sizes, in_block=True) == 15 * mib + ALIGNMENT_BYTES
    assert 150 * mib < piece_bytes({"embedding": 600 * mib}, in_block=True) < 256 * mib


def test_a_weight_of_another_size_than_announced_is_refused(
    meeting: Meeting, beside: Callable[..., Future[object]]
) -> None:
    start, _ = open_both(meeting, "rollout:0", beside, timeout_s=1.5)
    module = nn.Linear(4, 3, bias=False)
    with pytest.raises(ValueError, match="weight weight has 48 bytes, 52 were announced"):
        send_weights([start], module.named_parameters(), {"weight": 52}, 0, device=CPU, timeout_s=1.0)
