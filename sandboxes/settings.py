"""The section `sandbox` of a recipe."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cispo.sandboxes.types import Limits


class SandboxSettings(BaseModel):
    """Where untrusted programs run, and what each of them may use."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["auto", "bubblewrap", "docker", "unsafe-local"] = "auto"
    """`auto` takes the best isolation there is and fails without any; `unsafe-local` isolates nothing."""
    image: str = "cispo-sandbox"
    """The image of the backend docker: any with a python3 of 3.9 or later."""
    runtime: str | None = None
    """The runtime of the backend docker as its daemon knows it, such as `runsc`; null takes the daemon's default."""
    workers: int = Field(default=2, ge=1, le=256)
    """Programs that run at a time."""
    wall_s: float = Field(default=10.0, gt=0, le=3600)
    """Seconds by the clock for one program, less those in which it waited for a core."""
    cpu_s: float = Field(default=5.0, gt=0, le=3600)
    """CPU seconds for one program and its children, over all its tests."""
    memory_mib: int = Field(default=256, ge=32)
    """Memory of one program and its children, in MiB."""
    pids: int = Field(default=64, ge=4)
    """Processes and threads of one program."""
    output_kib: int = Field(default=1024, ge=1)
    """Output kept of each stream, in KiB; a program that writes more is stopped."""
    files_mib: int = Field(default=64, ge=1)
    """Size of the writable folder, in MiB."""

    def limits(self) -> Limits:
        return Limits(
            wall_s=self.wall_s,
            cpu_s=self.cpu_s,
            memory_mib=self.memory_mib,
            pids=self.pids,
            output_kib=self.output_kib,
            files_mib=self.files_mib,
        )
