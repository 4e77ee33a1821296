"""A Ray of our own for one run, or a running one that is joined; and waits that name what they wait for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cispo.errors import CispoError, DeadlineError
from cispo.recipe.schema import RaySettings

Result = TypeVar("Result")

NAMESPACE = "cispo"


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Start a local Ray, or join the one at `settings.address`; what was started here is stopped on the way out."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
    if settings.address is None:
        options |= {"include_dashboard": settings.dashboard, "dashboard_host": "127.0.0.1"}
    else:
        options["address"] = settings.address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "start a local Ray" if settings.address is None else f"join Ray at {settings.address!r}"
        raise CispoError(f"cannot {where} ({error}); check ray.address or leave it out") from error
    try:
        yield
    finally:
        ray.shutdown()


def await_result(reference: Any, *, timeout_s: float, what: str) -> Any:
    """The value of an object reference; DeadlineError after `timeout_s` seconds, CispoErrors of an actor as they are.

    what: the wait in words, such as "rollout:1 to take weights of version 3".
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
        raise
    except ray.exceptions.RayActorError as error:
        died = f"an actor died while the run waited for {what} ({_first_line(error)})"
        raise CispoError(f"{died}; look at its log, then resume the run") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
