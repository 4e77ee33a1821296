"""Worker processes for the reward `math`, which may be killed at any time without harm.

A worker (math_worker.py) imports SymPy once and forks a child for each comparison; the kernel ends a child at its
limits of CPU time and memory. A worker that dies, or is silent for WALL_S, is killed with its child and replaced.
"""

import atexit
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

WALL_S = 30.0
"""Seconds by the clock for one comparison: far above its CPU time, so that a busy machine changes no verdict."""
ATTEMPTS = 3
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH")


class _WorkerDiedError(Exception):
    pass


class _Worker:
    def __init__(self) -> None:
        # The environment may hold secrets, and nothing in it is needed but the way to our own code.
        env = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        env |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cispo.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
        try:
            self._read()
        except _WorkerDiedError:
            self.kill()
            raise

    def ask(self, gold: str, found: str | None) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"gold": gold, "found": found}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise _WorkerDiedError(str(error)) from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(WALL_S):
                raise _WorkerDiedError(f"it was silent for {WALL_S:g} s")
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise _WorkerDiedError("it ended")
        return dict(json.loads(line))

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


class MathPool:
    """At most `workers` comparisons at a time; workers are started when they are first needed."""

    def __init__(self, workers: int | None = None) -> None:
        count = workers or os.cpu_count() or 1
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        self._count = count

    def compare(self, gold: str, found: str | None) -> dict[str, Any]:
        """The worker's reply (see math_worker.py); a worker that dies again and again is an `error`."""
        worker = self._idle.get()
        reason = ""
        try:
            for _ in range(ATTEMPTS):
                try:
                    worker = worker or _Worker()
                    return worker.ask(gold, found)
                except _WorkerDiedError as error:
                    reason = str(error)
                    if worker is not None:
                        worker.kill()
                    worker = None
            return {"error": f"the maths worker failed {ATTEMPTS} times: {reason}"}
        finally:
            self._idle.put(worker)

    def process_ids(self) -> list[int]:
        """Of the workers that idle now."""
        with self._idle.mutex:
            return [worker.process.pid for worker in self._idle.queue if worker is not None]

    def close(self) -> None:
        """Kill the workers; those that are busy are waited for."""
        for worker in [self._idle.get() for _ in range(self._count)]:
            if worker is not None:
                worker.kill()
            self._idle.put(None)


_lock = threading.Lock()
_shared: MathPool | None = None


def shared_pool() -> MathPool:
    """The pool of this process, which ends with it."""
    global _shared
    with _lock:
        if _shared is None:
            _shared = MathPool()
            atexit.register(_shared.close)
        return _shared
