"""One real sandbox for all tests of this folder. Without bubblewrap they fail, with the command that installs it."""

import textwrap
from collections.abc import Callable, Iterator

import pytest

from cispo.sandboxes import ExecResult, Limits, Sandbox, open_sandbox


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    with open_sandbox("bubblewrap", workers=2) as opened:
        yield opened


@pytest.fixture(scope="session")
def run_python(sandbox: Sandbox) -> Callable[..., ExecResult]:
    """Run Python source in the sandbox: run_python(source, stdin=..., files=..., limits=...)."""
    python = sandbox.capabilities().python

    def run(source: str, **options: object) -> ExecResult:
        options.setdefault("limits", Limits(wall_s=20.0, cpu_s=2.0, memory_mib=128))
        return sandbox.run([python, "-S", "-s", "-c", textwrap.dedent(source)], **options)  # type: ignore[arg-type]

    return run
