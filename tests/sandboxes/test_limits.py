"""Limits on time, memory, processes, files and output, each pressed by a program that wants more."""

import time
from collections.abc import Callable

import pytest

from cispo.sandboxes import ExecResult, ExecStatus, Limits, Sandbox

Run = Callable[..., ExecResult]
SMALL = Limits(wall_s=30.0, cpu_s=1.0, memory_mib=96, pids=16, output_kib=64, files_mib=8)


def test_an_infinite_loop_is_stopped_by_cpu_seconds(run_python: Run) -> None:
    result = run_python("while True: pass", limits=SMALL)
    assert result.status is ExecStatus.TIMEOUT
    assert 1.0 <= result.cpu_s < 3.0


def test_a_sleeper_is_stopped_by_the_clock(run_python: Run) -> None:
    result = run_python("import time; time.sleep(60)", limits=Limits(wall_s=0.4, cpu_s=5.0))
    assert result.status is ExecStatus.TIMEOUT
    assert result.exit_code is None and result.cpu_s < 1.0


def test_who_waits_for_a_child_of_vfork_is_stopped_by_the_clock(run_python: Run) -> None:
    source = "import ctypes, time\nctypes.CDLL(None).vfork()\ntime.sleep(60)"
    result = run_python(source, limits=Limits(wall_s=0.2, cpu_s=5.0))
    assert result.status is ExecStatus.TIMEOUT


def test_signals_cannot_be_ignored_away(run_python: Run) -> None:
    source = """
    import signal
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True:
        pass
    """
    assert run_python(source, limits=SMALL).status is ExecStatus.TIMEOUT


def test_cpu_seconds_of_children_count(run_python: Run, sandbox: Sandbox) -> None:
    source = """
    import os
    while True:
        if os.fork() == 0:
            for _ in range(300_000):
                pass
            os._exit(0)
        os.wait()
    """
    result = run_python(source, limits=SMALL)
    assert result.status is ExecStatus.TIMEOUT
    assert result.cpu_s >= 1.0


def test_memory_of_one_process_is_bounded_gently(run_python: Run) -> None:
    source = """
    try:
        bytearray(500 << 20)
    except MemoryError:
        print("refused")
    """
    result = run_python(source, limits=SMALL)
    assert (result.status, result.stdout) == (ExecStatus.OK, b"refused\n")


def test_memory_of_all_processes_together_is_bounded(run_python: Run) -> None:
    source = """
    import os, time
    for _ in range(4):
        if os.fork() == 0:
            kept = bytearray(60 << 20)
            time.sleep(60)
            os._exit(0)
    os._exit(1 if os.wait()[1] == 9 else 0)
    """
    assert run_python(source, limits=Limits(wall_s=60.0, cpu_s=5.0, memory_mib=96)).status is ExecStatus.MEMORY_LIMIT


def test_the_warden_is_not_what_the_kernel_kills_for_memory(run_python: Run) -> None:
    source = """
    import os, time
    for _ in range(14):
        if os.fork() == 0:
            kept = bytearray(9 << 20)  # each of them smaller than the warden
            time.sleep(60)
    statuses = [os.wait()[1] for _ in range(14)]
    """
    limits = Limits(wall_s=2.0, cpu_s=5.0, memory_mib=64, pids=16)
    assert run_python(source, limits=limits).status in (ExecStatus.TIMEOUT, ExecStatus.MEMORY_LIMIT)


def test_a_fork_bomb_is_bounded_and_gone(run_python: Run) -> None:
    source = """
    import os
    while True:
        try:
            os.fork()
        except OSError:
            pass
    """
    result = run_python(source, limits=SMALL)
    assert result.status is ExecStatus.TIMEOUT
    assert run_python("print('fine')").stdout == b"fine\n"


def test_processes_and_threads_are_counted(run_python: Run) -> None:
    source = """
    import os, threading, time
    count = 0
    try:
        for count in range(100):
            if os.fork() == 0:
                time.sleep(5)
                os._exit(0)
    except OSError as error:
        print(count, type(error).__name__)
    """
    result = run_python(source, limits=SMALL)
    count, error = result.stdout.split()
    assert 8 <= int(count) <= 18 and error == b"BlockingIOError"


@pytest.mark.parametrize("folder", ["/task", "/tmp", "/dev/shm"])
def test_folders_are_bounded(run_python: Run, folder: str) -> None:
    source = f"""
    written = 0
    try:
        for name in range(20):
            with open(f"{folder}/{{name}}", "wb") as file:
                written += file.write(bytes(1 << 20))
    except OSError as error:
        print(written >> 20, error.errno)
    """
    assert run_python(source, limits=SMALL).stdout.split() == [b"8", b"28"]  # ENOSPC


def test_one_file_is_bounded(run_python: Run) -> None:
    source = """
    import os, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open("large", "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 1 << 30)
        except OSError as error:
            print(error.errno)
    """
    assert run_python(source, limits=SMALL).stdout.strip() in (b"27", b"28")  # EFBIG, ENOSPC


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_cut_at_its_limit_and_the_program_stopped(run_python: Run, stream: str) -> None:
    source = f"""
    import sys
    while True:
        sys.{stream}.write("x" * 65536)
    """
    result = run_python(source, limits=SMALL)
    assert result.status is ExecStatus.OUTPUT_LIMIT
    assert getattr(result, stream) == b"x" * (64 << 10)


def test_output_up_to_the_limit_is_kept_whole(run_python: Run) -> None:
    result = run_python("print('x' * (65536 - 1))", limits=SMALL)
    assert (result.status, len(result.stdout)) == (ExecStatus.OK, 65536)


def test_a_daemon_that_holds_the_pipes_does_not_hold_the_result(run_python: Run) -> None:
    source = """
    import os, sys, time
    print("done", flush=True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    """
    started = time.monotonic()
    result = run_python(source, limits=Limits(wall_s=50.0))
    assert (result.status, result.stdout) == (ExecStatus.OK, b"done\n")
    assert time.monotonic() - started < 40.0


@pytest.mark.parametrize(
    ("source", "exit_code"),
    [("import sys; sys.exit(3)", 3), ("import os; os.abort()", 134), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_ends_are_reported_as_a_shell_does(run_python: Run, source: str, exit_code: int) -> None:
    result = run_python(source)
    assert (result.status, result.exit_code) == (ExecStatus.RUNTIME_ERROR, exit_code)


@pytest.mark.parametrize("field", ["wall_s", "cpu_s", "memory_mib", "pids", "output_kib", "files_mib"])
def test_limits_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Limits(**{field: 0})


def test_a_result_names_signal_truncation_and_peak(run_python: Run) -> None:
    killed = run_python("import os; kept = bytearray(40 << 20); os.kill(os.getpid(), 11)")
    assert (killed.signal, killed.exit_code, killed.truncated) == (11, 139, False)
    assert killed.peak_mib is None or 40.0 < killed.peak_mib < 128.0
    flood = run_python("while True: print('x' * 1000)", limits=SMALL)
    assert (flood.signal, flood.exit_code, flood.truncated) == (None, None, True)
    assert run_python("raise SystemExit(3)").signal is None
