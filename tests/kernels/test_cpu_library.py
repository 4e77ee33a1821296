"""The compiled library: what stands in its way is one line with a remedy, and many processes may want it at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cispo.kernels import cpu_library
from cispo.kernels.cpu_library import CpuFunction, CpuKernelError

USE = """
import torch
from cispo.kernels.product import product
print(product(torch.ones(2, 16), torch.ones(3, 16)).sum())
"""


def use(code: str = USE, **environment: str) -> "subprocess.Popen[str]":
    """A process of its own that needs the kernels."""
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], env=settings, stdout=pipe, stderr=pipe, text=True)


def last_line(process: "subprocess.Popen[str]") -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    return errors.splitlines()[-1]


def test_no_compiler_is_named_with_the_remedy(tmp_path: Path) -> None:
    line = last_line(use(CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path)))
    assert "no C++ compiler found (no-such-compiler)" in line and "CISPO_CPU_KERNELS=plain" in line


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho first >&2; echo second >&2; exit 3\n')
    compiler.chmod(0o755)
    line = last_line(use(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path)))
    assert "failed with exit code 3" in line and "first second" in line


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = last_line(use(XDG_CACHE_HOME=str(tmp_path / "file")))
    assert "cannot be kept in" in line and "XDG_CACHE_HOME" in line


def test_plain_needs_no_compiler_and_a_wrong_choice_is_refused(tmp_path: Path) -> None:
    plain = use(CISPO_CPU_KERNELS="plain", CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert plain.communicate(timeout=120)[0].strip() == "tensor(96.)"
    assert "must be `fused` or `plain`, got 'fast'" in last_line(use(CISPO_CPU_KERNELS="fast"))


@pytest.mark.slow
def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    processes = [use(XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    for process in processes:
        assert process.communicate(timeout=300)[0].strip() == "tensor(96.)"
    names = [path.name for path in (tmp_path / "cispo" / "cpu_kernels").iterdir()]
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert len([name for name in names if name.endswith(".o")]) == len(list(cpu_library.SOURCES.glob("*.cpp")))


def test_only_float32_on_cpu_is_served() -> None:
    x = torch.ones(2)
    assert cpu_library.serves(x, x) and not cpu_library.serves(x, x.bfloat16())
    assert not cpu_library.serves(x.to("meta"))


def test_calls_are_counted_and_names_are_known() -> None:
    with pytest.raises(TypeError, match="takes 3 arguments, got 1"):
        CpuFunction("product", "pii")(1)
    with pytest.raises(CpuKernelError, match="no function of_no_one"):
        CpuFunction("of_no_one", "i")(1)
