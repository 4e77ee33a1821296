"""Weights from one GPU to the other, as `cispo train` sends them, against a plain copy between the two."""

import statistics
import time
from pathlib import Path

import torch

from cispo.broadcast import weights_checksum
from cispo.parallel.link import RECEIVER, SENDER, Link
from cispo.parallel.meeting import Meeting
from cispo.weight_stream import WeightBlock, piece_bytes, receive_block, send_block, weight_sizes
from two_gpu_parts.common import HYBRID, SMOLLM2, TINY, Row, Setting, new_decoder, on_two_ranks, wait

ROUNDS = 7
TIMEOUT_S = 60.0
SHARE_ASKED = 0.6


def run(setting: Setting) -> None:
    copy = copy_bytes_per_s(setting)
    where = "GPU 0 to GPU 1" if setting.is_gpu else "memory to memory"
    setting.say(Row("1 split", f"copy of 1 GiB, {where}", f"{copy / 1e9:.1f} GB/s"))
    (setting.rows.parent / "copy").write_text(str(copy))
    on_two_ranks(broadcast, setting)


def copy_bytes_per_s(setting: Setting) -> float:
    size = 1 << (30 if setting.is_gpu else 26)
    source = torch.zeros(size, dtype=torch.uint8, device=setting.of_rank(0))
    target = torch.empty_like(source, device=setting.of_rank(1))
    seconds = []
    for _ in range(ROUNDS + 2):
        started = time.perf_counter()
        target.copy_(source)
        wait(source.device)
        wait(target.device)
        seconds.append(time.perf_counter() - started)
    return size / statistics.median(seconds[2:])


def broadcast(rank: int, setting: Setting, scratch: Path) -> None:
    device = setting.of_rank(rank)
    address = scratch / "address"
    if rank == 0:
        meeting = Meeting.open("127.0.0.1")
        address.with_suffix(".draft").write_text(meeting.address)
        address.with_suffix(".draft").rename(address)
    else:
        while not address.exists():
            time.sleep(0.01)
        meeting = Meeting.enter(address.read_text(), TIMEOUT_S)
    began = time.perf_counter()
    link = Link(meeting, "first", SENDER if rank == 0 else RECEIVER, device, TIMEOUT_S)
    if rank == 0:
        setting.say(Row("1 split", "a link opens in", f"{time.perf_counter() - began:.2f} s"))
        _raw_speed(link, setting, rank)
    else:
        _raw_speed(link, None, rank)
    sizes = {"hybrid of 0.68 billion": HYBRID, "SmolLM2-135M": SMOLLM2} if setting.is_gpu else {"tiny hybrid": TINY}
    dtype = torch.bfloat16 if setting.is_gpu else torch.float32
    for name, config in sizes.items():
        decoder = new_decoder(config, dtype, device, seed=rank)
        if rank == 0:
            _send(name, decoder, link, meeting, setting)
        else:
            _receive(name, decoder, link, meeting)
        del decoder
    link.close()


def _raw_speed(link: Link, setting: Setting | None, rank: int) -> None:
    """What the link itself does with one large tensor and with one of the size of the hybrid's pieces."""
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    for mib in (1024, 256, 32, 4) if device.type == "cuda" else (16,):
        tensor = torch.zeros(mib << 20, dtype=torch.uint8, device=device)
        seconds = []
        for _ in range(ROUNDS + 2):
            wait(device)
            started = time.perf_counter()
            link.wait(link.start(tensor), TIMEOUT_S)
            wait(device)
            seconds.append(time.perf_counter() - started)
        if setting is not None:
            speed = tensor.nbytes / statistics.median(seconds[2:]) / 1e9
            setting.say(Row("1 split", f"one tensor of {mib} MiB through the link", f"{speed:.1f} GB/s"))


def _send(name: str, decoder: torch.nn.Module, link: Link, meeting: Meeting, setting: Setting) -> None:
    device = next(decoder.parameters()).device
    sizes, block = weight_sizes(decoder), WeightBlock(decoder, device)
    layer = 2 * piece_bytes(sizes, in_block=False)
    copy = float((setting.rows.parent / "copy").read_text())
    seconds, summed, in_all, proven = [], [], [], 0
    total = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for version in range(ROUNDS + 2):
        meeting.store.wait([f"{name}/{version}/ready"])
        wait(device)
        started = time.perf_counter()
        checksum = weights_checksum(dict(decoder.named_parameters()))
        summed.append(time.perf_counter() - started)
        sent = send_block([link], block, sizes, version, timeout_s=TIMEOUT_S)
        held = meeting.store.get(f"{name}/{version}/held").decode()
        in_all.append(time.perf_counter() - started)
        seconds.append(sent.seconds)
        total = sent.bytes
        proven += held == f"{version} {checksum}" and not sent.lost
        with torch.no_grad():  # another policy each time
            next(decoder.parameters()).add_(0.01)
    median = statistics.median(seconds[2:])
    share = total / median / copy
    asked = f"at least {SHARE_ASKED:.0%} of the copy" if setting.is_gpu else ""
    figures = f"{total / 1e9:.3f} GB in {median * 1e3:.2f} ms, {total / median / 1e9:.1f} GB/s, {share:.0%} of the copy"
    setting.say(Row("1 split", f"broadcast, {name}", figures, asked, share >= SHARE_ASKED if asked else None))
    whole, own = (statistics.median(each[2:]) * 1e3 for each in (in_all, summed))
    both = f"{whole:.2f} ms, of which the sender's checksum {own:.2f}"
    setting.say(Row("1 split", f"with checksums on both sides, {name}", both))
    what, rounds = f"versions and checksums proven, {name}", ROUNDS + 2
    setting.say(Row("1 split", what, f"{proven} of {rounds}", "all", proven == rounds))
    if device.type == "cuda":
        extra = torch.cuda.max_memory_allocated() - before
        setting.say(
            Row("1 split", f"extra memory of the sender, {name}", f"{extra / 2**20:.1f} MiB",
                f"a layer: {layer / 2**20:.1f} MiB", extra <= layer)
        )  # fmt: skip


def _receive(name: str, decoder: torch.nn.Module, link: Link, meeting: Meeting) -> None:
    sizes, block = weight_sizes(decoder), WeightBlock(decoder, next(decoder.parameters()).device)
    for version in range(ROUNDS + 2):
        meeting.store.set(f"{name}/{version}/ready", "")
        came = receive_block(link, block, sizes, in_block=True, timeout_s=TIMEOUT_S)
        checksum = weights_checksum(dict(decoder.named_parameters()))
        meeting.store.set(f"{name}/{version}/held", f"{came} {checksum}")
