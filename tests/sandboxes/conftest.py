"""Real sandboxes for all tests of this folder. Without bubblewrap they fail, with the command that installs it.

Tests of the judges run in each backend that isolates: those marked `docker` need a Docker daemon and the image that
`python -m cispo.sandboxes.build_image` makes. When a sandbox is closed, nothing of its programs may be left.
"""

import textwrap
import time
from collections.abc import Callable, Iterator

import pytest

from cispo.sandboxes import ExecResult, Limits, Sandbox, open_sandbox
from cispo.sandboxes.docker_client import OWNER_LABEL, connect, owner_mark


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    with open_sandbox("bubblewrap", workers=2) as opened:
        yield opened


@pytest.fixture(
    scope="session", params=["bubblewrap", pytest.param("docker", marks=pytest.mark.docker)], name="any_sandbox"
)
def any_sandbox_fixture(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox of each backend that isolates."""
    if request.param == "bubblewrap":
        yield request.getfixturevalue("sandbox")
        return
    with open_sandbox("docker", workers=2) as opened:
        yield opened
    assert own_containers() == []


def own_containers() -> list[str]:
    """Containers that this process has made and not removed; one that is being removed is given time."""
    client = connect()
    try:
        label = f"{OWNER_LABEL}={owner_mark()}"
        deadline = time.monotonic() + 10.0
        while found := client.containers.list(all=True, filters={"label": label}, ignore_removed=True):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return [container.id for container in found]
    finally:
        client.close()


@pytest.fixture(scope="session")
def run_python(sandbox: Sandbox) -> Callable[..., ExecResult]:
    """Run Python source in the sandbox: run_python(source, stdin=..., files=..., limits=...)."""
    python = sandbox.capabilities().python

    def run(source: str, **options: object) -> ExecResult:
        options.setdefault("limits", Limits(wall_s=20.0, cpu_s=2.0, memory_mib=128))
        return sandbox.run([python, "-S", "-s", "-c", textwrap.dedent(source)], **options)  # type: ignore[arg-type]

    return run
