"""The CPU kernels: C++ sources in kernels/cpu, compiled for this processor on first use and called through ctypes.

They serve float32 on CPU; everything else goes to the plain-PyTorch twins. The compiled library is kept under
$XDG_CACHE_HOME/cispo (by default ~/.cache/cispo) by a hash of sources, compiler, flags and processor, so a process
compiles only what no process before it has. Set CISPO_CPU_KERNELS=plain to use the twins instead, for a comparison or
where there is no C++ compiler; the two differ in rounding, so a run must not switch between them.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cispo.errors import CispoError

SOURCES = Path(__file__).resolve().parent / "cpu"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-fPIC")
_CHOICE = "CISPO_CPU_KERNELS"
_Type = type[ctypes.c_void_p] | type[ctypes.c_int64] | type[ctypes.c_float]
_TYPES: dict[str, _Type] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "f": ctypes.c_float,
    "n": ctypes.c_int64,
    "t": ctypes.c_int64,
}

Argument = Tensor | int | float | None


class CpuKernelError(CispoError, RuntimeError):
    """The CPU kernels cannot be compiled here, or are asked for by a name that does not exist."""


@functools.cache
def _is_chosen() -> bool:
    choice = os.environ.get(_CHOICE, "fused")
    if choice not in ("fused", "plain"):
        raise CpuKernelError(f"{_CHOICE} must be `fused` or `plain`, got {choice!r}")
    return choice == "fused"


def serves(*tensors: Tensor) -> bool:
    """Whether the CPU kernels take these operands: all float32 on CPU, and not switched off."""
    # A plain loop: a decode step asks some forty times, and a generator takes longer than the answer.
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype is not torch.float32:
            return False
    return _is_chosen()


def _compiler() -> str:
    named = os.environ.get("CXX")
    for candidate in (named,) if named else ("g++", "clang++", "c++"):
        found = shutil.which(candidate)
        if found:
            return found
    raise CpuKernelError(
        f"no C++ compiler found ({named or 'g++, clang++, c++'}), which float32 on CPU needs; install g++, name one in "
        f"CXX, or set {_CHOICE}=plain to use the slower PyTorch kernels"
    )


def _processor() -> str:
    """What -march=native depends on."""
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(("model name", "flags", "Features", "CPU")))


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cispo" / "cpu_kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CpuKernelError(
            f"the compiled CPU kernels cannot be kept in {folder} ({error}); name a folder in XDG_CACHE_HOME"
        ) from error
    return folder


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())[:400]
        raise CpuKernelError(
            f"compiling the CPU kernels failed with exit code {done.returncode}: {' '.join(command)}: {said}; name "
            f"another compiler in CXX, or set {_CHOICE}=plain to go on without them"
        )
    return done.stdout


def _compile() -> Path:
    """The compiled library, made if this processor, compiler and source have not met before."""
    compiler = _compiler()
    headers = "".join(path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.h")))
    basis = "\0".join((_run([compiler, "--version"]), _processor(), *FLAGS, headers))
    folder = _cache_folder()
    objects = {}
    for source in sorted(SOURCES.glob("*.cpp")):
        key = hashlib.sha256((basis + source.read_text(encoding="utf-8")).encode()).hexdigest()[:16]
        objects[source] = folder / f"{source.stem}-{key}.o"
    key = hashlib.sha256("\0".join(path.name for path in objects.values()).encode()).hexdigest()[:16]
    library = folder / f"cispo-{key}.so"
    if library.exists():
        return library
    # A run's actors start together: the first compiles, the others wait for it.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(compiler, objects, library)
    return library


def _build(compiler: str, objects: dict[Path, Path], library: Path) -> None:
    """Compile the sources whose objects are missing, and link. Every file appears by rename, so none is half made."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        missing = [(source, path) for source, path in objects.items() if not path.exists()]
        made = [Path(scratch) / path.name for _, path in missing]
        commands = [
            [compiler, *FLAGS, "-c", str(source), "-o", str(new)]
            for (source, _), new in zip(missing, made, strict=True)
        ]
        list(pool.map(_run, commands))
        for (_, path), new in zip(missing, made, strict=True):
            new.replace(path)
        linked = Path(scratch) / library.name
        _run([compiler, "-shared", "-fopenmp", *map(str, objects.values()), "-o", str(linked)])
        linked.replace(library)


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_compile()))


def prepare() -> None:
    """Compile and load the kernels now, where they are switched on; CpuKernelError says what stands in the way."""
    if _is_chosen():
        _library()


class Recorder(Protocol):
    """What takes down calls of kernels instead of executing them (cispo.kernels.cpu_plan)."""

    def add(self, function: "CpuFunction", arguments: tuple[Argument, ...]) -> None: ...

    def add_weight(self, weight: Tensor, matrices: int) -> None:
        """Note that packed panels of a weight are among the arguments."""


class _Recording(threading.local):
    recorder: Recorder | None = None


recording = _Recording()
"""Where this thread's calls go, if not to the kernels."""


@contextmanager
def unrecorded() -> Iterator[None]:
    """Execute what is in here now, even while a recording goes on: constants that are made once."""
    recorder, recording.recorder = recording.recorder, None
    try:
        yield
    finally:
        recording.recorder = recorder


class CpuFunction:
    """A function of the library.

    signature: a letter an argument, p a tensor (or None), i an integer, f a float, n the number of rows (or sequences)
    that it works on, t the number of threads. Tensors are passed by address: the caller answers for their dtype, shape
    and strides, and keeps them alive.
    """

    def __init__(self, name: str, signature: str) -> None:
        self._name, self.signature = name, signature
        self._types: tuple[_Type, ...] = tuple(_TYPES[letter] for letter in signature)
        self._function: ctypes._NamedFuncPointer | None = None

    def __call__(self, *arguments: Argument) -> None:
        if len(arguments) != len(self._types):
            raise TypeError(f"{self._name} takes {len(self._types)} arguments, got {len(arguments)}")
        if recording.recorder is not None:
            recording.recorder.add(self, arguments)
            return
        function = self._function or self._resolve()
        function(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])

    def replay_address(self) -> int:
        """Address of the function that calls this one on recorded words. CpuKernelError where it has none."""
        return ctypes.cast(_symbol(f"{self._name}_replay"), ctypes.c_void_p).value or 0

    def _resolve(self) -> "ctypes._NamedFuncPointer":
        function = _symbol(self._name)
        function.argtypes, function.restype = self._types, None
        self._function = function
        return function


def _symbol(name: str) -> "ctypes._NamedFuncPointer":
    try:
        return _library()[f"cispo_{name}"]
    except AttributeError as error:
        raise CpuKernelError(f"the CPU kernels have no function {name}") from error


if __name__ == "__main__":
    print(_compile())
