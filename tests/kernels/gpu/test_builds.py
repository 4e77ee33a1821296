"""Every shipped configuration of every Triton kernel compiles for sm_90 without a GPU: no spills, products on wgmma."""

import json
import os
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cispo.kernels.gpu
from cispo.kernels.gpu.build import SHARED_MEMORY_BYTES, Report

MODULES = [f"cispo.kernels.gpu.{info.name}" for info in pkgutil.iter_modules(cispo.kernels.gpu.__path__)]


def test_shipped_configurations_assemble_without_spills() -> None:
    # The interpreter replaces the compiler in this process, so another one compiles.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    names = [name for name in MODULES if name != "cispo.kernels.gpu.build"]

    def build(part: list[str]) -> list[Report]:
        command = [sys.executable, "-m", "cispo.kernels.gpu.build", *part]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        reports = [Report(**json.loads(line)) for line in done.stdout.splitlines()]
        assert reports
        return reports

    with ThreadPoolExecutor(2) as pool:
        reports = [report for part in pool.map(build, (names[::2], names[1::2])) for report in part]
    for report in reports:
        assert report.spilled_bytes == 0, report
        assert report.shared_bytes <= SHARED_MEMORY_BYTES, report
        assert not report.is_serialised, report
        assert (report.wgmma > 0) == report.has_products, report
