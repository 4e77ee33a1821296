"""Runs inside the sandbox: scores answers by a task of reasoning-gym. A script like session_server.py, Python 3.9+.

Some scorers run the answer as program text, so each answer is scored in a process of its own, forked once everything
is imported. This one, the parent, takes nothing from it but one line: being not dumpable, it can be neither read nor
written by a process of the same user. What an answer can do is kill this process; the reward outside then gives each
answer a sandbox of its own.

The request, marshalled on stdin, has the task, its entry and the answers; two archives lie in the working folder. The
first line of the reply is the score of the entry's own answer, which tells whether task and entry are sound; then comes
one line for each answer, [index, kind, value], with the kinds score, raised (an error's name), died and late.
"""

import ast
import contextlib
import ctypes
import functools
import importlib
import importlib.abc
import importlib.machinery
import json
import marshal
import os
import resource
import select
import signal
import sys
import time
import types
import zipfile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

PR_SET_DUMPABLE = 4
PACKAGE = "reasoning_gym"
FOLDER = "gym"
MAX_LINE_BYTES = 4096
FIRST_OWN_FD = 100


def main() -> None:
    request = marshal.loads(sys.stdin.buffer.read())
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    replies = take_descriptors()
    with zipfile.ZipFile("gym.zip") as archive:
        archive.extractall(FOLDER)
    sys.path[:0] = [FOLDER, "libraries.zip"]
    sys.meta_path.append(Placeholders(request["placeholders"]))
    item = request["item"]
    score = scorer(request["task"], request["module"], request["settings"], request["literal_only"])
    own = item["answer"] if isinstance(item["answer"], str) else ""
    for index, answer in enumerate([own, *request["answers"]]):
        line = in_a_child(functools.partial(score, answer, item), request["cpu_s"], request["wall_s"])
        os.write(replies, json.dumps([index - 1, *line]).encode() + b"\n")


def take_descriptors() -> int:
    """Where replies go; what scores and answers print goes nowhere."""
    import fcntl

    replies = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, FIRST_OWN_FD)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    return replies


class Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for packages that a task imports and that cannot come into the sandbox, being compiled for another Python.

    Most of these only make questions. Whatever a scorer would do with one raises an error, but for the two functions of
    numpy that some use on single numbers.
    """

    def __init__(self, names: "list[str]") -> None:
        self.names = frozenset(names)

    def find_spec(self, name: str, path: "Any", target: "Any" = None) -> "importlib.machinery.ModuleSpec | None":
        is_ours = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec: "importlib.machinery.ModuleSpec") -> types.ModuleType:
        return Placeholder(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Missing(type):
    """A name of such a package: it may stand in an annotation, and not be called."""

    def __getattr__(cls, name: str) -> "Any":
        if name.startswith("__"):
            raise AttributeError(name)
        return missing(f"{cls.__name__}.{name}")

    def __call__(cls, *args: object, **named: object) -> "NoReturn":
        raise ImportError(f"{cls.__name__} is not in the sandbox: it is compiled for another Python")

    def __getitem__(cls, key: object) -> "Any":
        return cls

    def __or__(cls, other: object) -> "Any":
        return cls

    __ror__ = __or__


def is_close(a: float, b: float, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    return abs(a - b) <= atol + rtol * abs(b)


STAND_INS = {"numpy.isclose": is_close, "numpy.round": round}


def missing(name: str) -> "Any":
    if name in STAND_INS:
        return STAND_INS[name]
    return type.__call__(Missing, name, (), {})


class Placeholder(types.ModuleType):
    def __getattr__(self, name: str) -> "Any":
        if name.startswith("__"):
            raise AttributeError(name)
        return missing(f"{self.__name__}.{name}")


def scorer(
    task: str, module_name: str, settings: "dict[str, Any]", literal_only: bool
) -> "Callable[[Any, Any], float]":
    """The task's own scorer. The packages around its module stay empty, as importing all tasks takes a second."""
    parts = module_name.split(".")
    for count in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:count]))
        package.__path__ = [os.path.join(FOLDER, *parts[:count])]
        sys.modules[package.__name__] = package
    importlib.import_module(f"{PACKAGE}.coaching")
    module = importlib.import_module(module_name)
    if literal_only:
        module.__dict__["eval"] = ast.literal_eval  # comes before the built-in one; those scorers want a list
    dataset = importlib.import_module(f"{PACKAGE}.factory").create_dataset(task, **settings, seed=0, size=1)
    return dataset.score_answer  # type: ignore[no-any-return] # the package is not here when types are checked


def in_a_child(score: "Callable[[], float]", cpu_s: float, wall_s: float) -> "tuple[str, Any]":
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        become_scorer(score, write_fd, cpu_s)
    os.close(write_fd)
    deadline, line = time.monotonic() + wall_s, b""
    poll = select.poll()
    poll.register(read_fd, select.POLLIN)
    while b"\n" not in line and len(line) < MAX_LINE_BYTES:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            break
        part = os.read(read_fd, MAX_LINE_BYTES)
        if not part:
            break
        line += part
    is_late = time.monotonic() >= deadline
    os.close(read_fd)
    for target in (-pid, pid):  # its group, once it has one
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    was_out_of_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
    if not line.endswith(b"\n"):
        return ("late" if is_late or was_out_of_time else "died"), ""
    try:
        kind, value = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return "died", ""
    is_sound = (kind == "score" and type(value) in (int, float)) or (kind == "raised" and isinstance(value, str))
    return (kind, value) if is_sound else ("died", "")


def become_scorer(score: "Callable[[], float]", write_fd: int, cpu_s: float) -> "NoReturn":
    try:
        os.setsid()
        ceiling_s = max(1, round(cpu_s))
        resource.setrlimit(resource.RLIMIT_CPU, (ceiling_s, ceiling_s + 1))
        try:
            reply = ["score", float(score())]
        except BaseException as error:
            reply = ["raised", type(error).__name__[:80]]
        os.write(write_fd, json.dumps(reply).encode() + b"\n")
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
