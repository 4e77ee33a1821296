"""What each Triton kernel is compiled as, and what the assembler makes of it for sm_90, on a machine without a GPU.

A module of kernels lists its shipped configurations (`BUILDS`); its launches take their settings from the same entries,
so what is checked is what runs. `python -m cispo.kernels.gpu.build MODULE ...` compiles them and prints one JSON
object a configuration: registers, spilled bytes, shared memory, and how many matrix instructions (wgmma) are in it.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

SM90 = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_BYTES = 227 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Build:
    """One shipped configuration of a kernel.

    types: Triton type of every argument that is no constant, by name ("*bf16", "*fp32", "i32", "fp32"). constants:
    value of every constexpr. has_products: a matrix product is in it, so wgmma must be. aligned: arguments that are
    multiples of 16 (addresses always are). max_registers: of a thread, where more programs a processor are worth it.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    has_products: bool
    aligned: tuple[str, ...] = ()
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Of the compiler: what a launch takes besides the arguments."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    def launch(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Run the kernel with these settings; arguments: all but the constants, in order."""
        self.kernel[grid](*arguments, **self.constants, **self.options)


@dataclass(frozen=True, slots=True)
class Report:
    """What the assembler says of one build."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: int
    is_serialised: bool
    has_products: bool


def report(build: Build) -> Report:
    """Compile for sm_90 and assemble with the ptxas that Triton picks for it; needs no GPU."""
    arguments = build.kernel.arg_names
    types = {name: build.types.get(name, "constexpr") for name in arguments}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(arguments)
        if types[name].startswith("*") or name in build.aligned
    }
    source = ASTSource(fn=build.kernel, signature=types, constexprs=dict(build.constants), attrs=attributes)
    compiled = triton.compile(source, target=SM90, options=build.options)
    with tempfile.TemporaryDirectory() as scratch:
        ptx = Path(scratch) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"], encoding="utf-8")
        ptxas = get_ptxas(SM90.arch).path  # the one of Triton's that knows the PTX it wrote
        command = [ptxas, "-arch=sm_90a", "-v", str(ptx), "-o", str(Path(scratch) / "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Report(
        name=build.name,
        registers=max(int(found) for found in re.findall(r"Used (\d+) registers", log)),
        spilled_bytes=sum(int(found) for found in re.findall(r"(\d+) bytes spill", log)),
        shared_bytes=compiled.metadata.shared,
        wgmma=compiled.asm["ptx"].count("wgmma.mma_async"),
        is_serialised="serializ" in log,
        has_products=build.has_products,
    )


def main() -> None:
    for name in sys.argv[1:]:
        for build in importlib.import_module(name).BUILDS:
            print(json.dumps(asdict(report(build))), flush=True)


if __name__ == "__main__":
    main()
