import importlib
import io
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cispo.views import Views, open_views

BLOCK_BYTES = 32768
WRITTEN_WITHIN_S = 60.0


@pytest.fixture
def forbidden_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Sends every proxied or W&B connection to a listener that only counts them, and hides the user's W&B account."""
    connections: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def count() -> None:
        while True:
            try:
                connection, peer = listener.accept()
            except OSError:
                return
            connections.append(str(peer))
            connection.close()

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "WANDB_BASE_URL"):
        monkeypatch.setenv(variable, address)
    for variable in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_BASE_URL"]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    yield connections
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def read_history(file: Path) -> list[dict[str, float]]:
    """The history rows of a .wandb file: LevelDB's log format after a header of 7 bytes, one protobuf record each."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, place, partial, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if BLOCK_BYTES - place % BLOCK_BYTES < 7:
            place += BLOCK_BYTES - place % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + length > len(data):  # not wholly written yet
            break
        partial += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = messages.Record()
            record.ParseFromString(partial)
            partial = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def written_history(file: Path, last_step: int) -> list[dict[str, float]]:
    """The rows once the last is there: W&B's service is told to finish and answers nothing, then writes the rest."""
    deadline = time.monotonic() + WRITTEN_WITHIN_S
    rows = read_history(file)
    while not any(row["_step"] == last_step for row in rows) and time.monotonic() < deadline:
        time.sleep(0.05)
        rows = read_history(file)
    return rows


def views_in(run_folder: Path, stream: io.StringIO, wandb: str) -> Views:
    assert wandb in ("offline", "online")
    return open_views(
        run_folder,
        name="demo",
        steps=9,
        recipe={"seed": 7},
        wandb="offline" if wandb == "offline" else "online",
        console="lines",
        terminal=Console(file=stream),
    )


def test_offline_history_is_on_disk_and_a_resumed_run_continues_it(
    tmp_path: Path, forbidden_network: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("wandb")
    stream = io.StringIO()
    with views_in(tmp_path, stream, "offline") as views:
        views.step(0, {"eval/heldout/pass@1": 0.25})
        for step in (1, 2, 3):
            views.step(step, {"reward/mean": step / 8, "time_s/step": 1.0})
    first_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = written_history(file, 3)
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["eval/heldout/pass@1"] == 0.25
    assert [row["reward/mean"] for row in rows[1:]] == [1 / 8, 2 / 8, 3 / 8]

    with views_in(tmp_path, stream, "offline") as views:
        for step in (2, 3, 4):
            views.step(step, {"reward/mean": step / 8})
    (resumed,) = set(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) - {file}
    assert [row["_step"] for row in written_history(resumed, 4)] == [4], "steps that W&B has must not be given again"
    assert resumed.name == file.name == f"run-{first_id}.wandb"

    assert forbidden_network == []
    assert "wandb sync" in stream.getvalue() and "warning" not in stream.getvalue()
    assert "warning" not in capfd.readouterr().err.lower()


def test_online_without_a_key_asks_nothing_and_the_run_goes_on(
    tmp_path: Path, forbidden_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("wandb")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("W&B asked a question"))
    stream = io.StringIO()
    with views_in(tmp_path, stream, "online") as views:
        views.step(1, {"reward/mean": 0.5})
    assert stream.getvalue().count("W&B is off: UnsupportedError: no W&B key on this machine; run `wandb login`") == 1
    assert "reward  0.500" in stream.getvalue()
    assert "W&B is off" in (tmp_path / "log.txt").read_text()


def test_a_failure_of_wandb_in_the_middle_is_reported_once_and_the_run_goes_on(
    tmp_path: Path, forbidden_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = importlib.import_module("wandb")
    stream = io.StringIO()
    views = views_in(tmp_path, stream, "offline")
    views.step(1, {"reward/mean": 0.125})

    def fail(*_: object, **__: object) -> None:
        raise wandb.errors.CommError("the service is gone")

    monkeypatch.setattr(wandb.Run, "log", fail)
    for step in (2, 3):
        views.step(step, {"reward/mean": step / 8})
    views.close()
    assert stream.getvalue().count("W&B is off: CommError: the service is gone; the run goes on without it") == 1
    assert "step 3/9" in stream.getvalue()


def test_without_the_package_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    stream = io.StringIO()
    with views_in(tmp_path, stream, "offline") as views:
        views.step(1, {"reward/mean": 0.5})
    assert "W&B is off: ModuleNotFoundError" in stream.getvalue() and "reward  0.500" in stream.getvalue()
