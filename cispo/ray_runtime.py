"""A Ray of our own for one run, or a running one that is joined; and waits that name what they wait for."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cispo import errors
from cispo.errors import ActorLostError, CispoError, DeadlineError
from cispo.recipe.schema import RaySettings

Result = TypeVar("Result")

NAMESPACE = "cispo"
CONNECT_TIMEOUT_S = 10.0


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Start a local Ray, or join the one at `settings.address`; what was started here is stopped on the way out."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
    if settings.address is None:
        # Without "local" Ray joins whatever RAY_ADDRESS or `ray start` left behind, with another's processes and code.
        options |= {"address": "local", "include_dashboard": settings.dashboard, "dashboard_host": "127.0.0.1"}
    else:
        options["address"] = settings.address
        _refuse_silent_address(settings.address)
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if settings.address is None:
            raise CispoError(f"cannot start a local Ray ({error}); see whether memory and ports are free") from error
        raise CispoError(
            f"cannot join Ray at {settings.address!r} ({error}); check ray.address, and that RAY_AUTH_MODE and token "
            "are the cluster's, or leave the address out to start a local Ray"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray puts its own in place, which ends the process at once and stops nothing.
        signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_silent_address(address: str) -> None:
    """Ray tries for minutes to reach a host that does not answer; a plain connection tells within seconds."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise CispoError(
            f"nothing answers at ray.address {address!r} ({error}); start Ray there, or leave it out"
        ) from error


def await_result(reference: Any, *, timeout_s: float, what: str) -> Any:
    """The value of an object reference; DeadlineError after `timeout_s` seconds, CispoErrors of an actor as they are.

    what: the wait in words, such as "rollout:1 to take weights of version 3". ActorLostError where its actor is gone.
    Any other exception of an actor is a bug and comes as Ray's own, with the actor's traceback.
    """
    import ray

    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise DeadlineError(
            f"waited {timeout_s:g} s for {what}; look at that actor's log (`ray logs`), then resume the run, "
            "with a higher timeout if it was only slow"
        ) from error
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, CispoError):
            raise type(cause)(*cause.args) from error
        error.add_note(f"raised while the run waited for {what}")
        raise
    except ray.exceptions.RayActorError as error:
        raise _death(error, what) from error


def _death(error: Exception, what: str) -> CispoError:
    """Why an actor is gone. Of an actor whose constructor raised, Ray hands on the traceback's text only."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[0]
    if "creation task" in reason:
        reason = lines[-1]
        name, _, text = reason.partition(": ")
        kind = getattr(errors, name.rpartition(".")[2], None)
        if name.startswith(f"{errors.__name__}.") and isinstance(kind, type) and issubclass(kind, CispoError):
            return kind(text)
    return ActorLostError(
        f"an actor died while the run waited for {what} ({reason}); look at its log (`ray logs`), then resume the run"
    )
