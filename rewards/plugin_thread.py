"""A thread for the reward functions that users write, which may hang.

Calls have a deadline, and a thread that passes it is left behind and replaced. Nothing can end a thread from outside;
being a daemon, it does not keep the process alive.
"""

import asyncio
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

from cispo.errors import DeadlineError

# How long after its deadline an async function may take to notice that it was cancelled.
CANCEL_GRACE_S = 2.0
Outcome = Any  # what a call returned, or the exception that it raised


class PluginThread:
    """Runs calls one after another in one thread, which also keeps one event loop for all async functions.

    Outcomes are what calls return, or what they raise; DeadlineError for a call that takes longer than its time.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._start()

    def _start(self) -> None:
        self._calls = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls,), name="reward-plugins", daemon=True).start()

    def run_all(self, calls: Sequence[Callable[[], Any]], timeout_s: float) -> list[Outcome]:
        """Make each call. Those that turn out to be async run all at once, the others in order; each has timeout_s."""
        outcomes = [self._outcome(call, timeout_s) for call in calls]
        waiting = [index for index, outcome in enumerate(outcomes) if inspect.isawaitable(outcome)]
        if waiting:
            coroutines = [_within(outcomes[index], timeout_s) for index in waiting]
            gathered = self._outcome(lambda: _run_loop(coroutines), timeout_s + CANCEL_GRACE_S)
            results = [gathered] * len(waiting) if isinstance(gathered, BaseException) else gathered
            for index, result in zip(waiting, results, strict=True):
                outcomes[index] = result
        return outcomes

    def _outcome(self, call: Callable[[], Any], timeout_s: float) -> Outcome:
        future: Future[Any] = Future()
        self._calls.put((call, future))
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            if future.done():  # raised by the function itself
                return error
            self._calls.put(None)
            self._start()
            return DeadlineError(f"took longer than its timeout_s of {timeout_s:g} s")
        except BaseException as error:
            if not future.done():
                raise  # an interrupt of the thread that waits
            return error

    def close(self) -> None:
        self._calls.put(None)


_runners = threading.local()


def _serve(calls: "queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]") -> None:
    while (item := calls.get()) is not None:
        call, future = item
        try:
            result = call()
        except BaseException as error:  # sys.exit() in a reward ends no worker
            future.set_exception(error)
        else:
            future.set_result(result)
        del item, call, future
    runner: asyncio.Runner | None = getattr(_runners, "runner", None)
    if runner is not None:
        runner.close()


def _run_loop(coroutines: Sequence[Coroutine[Any, Any, Outcome]]) -> list[Outcome]:
    """One loop for the thread's life, as clients that users keep between calls belong to the loop they began in."""
    if not hasattr(_runners, "runner"):
        _runners.runner = asyncio.Runner()
    return _runners.runner.run(_gather(coroutines))  # type: ignore[no-any-return] # attributes of a local are Any


async def _gather(coroutines: Sequence[Coroutine[Any, Any, Outcome]]) -> list[Outcome]:
    return await asyncio.gather(*coroutines)


async def _within(awaitable: Awaitable[Any], timeout_s: float) -> Outcome:
    task = asyncio.ensure_future(_caught(awaitable))
    done, _ = await asyncio.wait([task], timeout=timeout_s)
    if not done:
        task.cancel()
        return DeadlineError(f"took longer than its timeout_s of {timeout_s:g} s")
    return task.result()


async def _caught(awaitable: Awaitable[Any]) -> Outcome:
    try:
        return await awaitable
    except BaseException as error:  # sys.exit() would end the loop, for all that wait on it
        return error
