"""Runs inside the sandbox, beside the program it calls: a script of its own that imports nothing of ours.

It is handed to the interpreter as text (Python 3.9 or later), so that nothing needs to be readable from inside.
It reads one marshalled request from stdin (source, entry point, one pair of positional and named arguments a call, and
whether answers are tagged), defines the program as the module `program`, makes the calls and writes one line of JSON
for each answer:

    ["loaded"]  ["rejected", why]  ["failed", error type]            about the module
    ["value", i, value]  ["other", i, type]  ["error", i, error type]   about test i

Tagged answers hold more than JSON knows, each such value as a dict of one item (see encode_tagged).

It never knows an expected value, so it needs no defence: a program that takes this process over can only answer, which
it could have done by returning. It speaks JSON by hand because importing `json` would double the time a program takes.
Lines go to a copy of stdout, which the program itself finds replaced by stderr; stdin is empty for it.
"""

import builtins
import marshal
import posix
import sys
from _json import encode_basestring_ascii

TYPE_CHECKING = False  # `typing` is slow to import, and annotations in quotes are never evaluated
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_DEPTH = 60
MAX_ITEMS = 200_000
# EAGAIN (of a fork), EFBIG, ENOSPC, EDQUOT.
REFUSED = {11: ": no process", 27: ": no space", 28: ": no space", 122: ": no space"}


class NotPlain(Exception):
    """A returned value that is no JSON value, with the name of what it is."""


def main() -> None:
    sys.path[:] = [folder for folder in sys.path if folder.startswith("/usr") or folder.startswith(sys.base_prefix)]
    source, entry_point, calls, is_tagged = marshal.loads(read_all(0))
    answers = posix.dup(1)
    posix.dup2(2, 1)
    posix.dup2(posix.open("/dev/null", posix.O_RDONLY), 0)
    exit_now, write = posix._exit, posix.write

    def answer(line: str) -> None:
        data = memoryview(line.encode("ascii") + b"\n")
        while data:
            data = data[write(answers, data) :]

    function = load(source, entry_point, answer)
    if function is not None:
        for index, (positional, named) in enumerate(calls):
            answer(call(function, index, positional, named, is_tagged))
    exit_now(0)


def read_all(fd: int) -> bytes:
    parts = []
    while part := posix.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def load(source: str, entry_point: str, answer: "Callable[[str], None]") -> "Callable[..., Any] | None":
    """Define the program; None when it is rejected or fails, which the answer says."""
    try:
        code = compile(source, "program.py", "exec", dont_inherit=True)
    except BaseException as error:  # MemoryError too, by which the parser refuses deep nesting
        answer(f'["rejected", {quote(type(error).__name__)}]')
        return None
    builtins.__dict__.update(exit=sys.exit, quit=sys.exit)  # usually made by `site`, which is not loaded
    if "random" in source:
        import random

        random.seed(0)  # a program's verdict should not change between runs
    module = type(sys)("program")
    sys.modules["program"] = module
    try:
        exec(code, module.__dict__)
        function: Callable[..., Any] | None = module.__dict__.get(entry_point)
        is_callable = callable(function)
    except BaseException as error:
        answer(f'["failed", {quote(name_of(error))}]')
        return None
    answer('["loaded"]' if is_callable else '["rejected", "no entry point"]')
    return function if is_callable else None


def call(
    function: "Callable[..., Any]", index: int, positional: "list[Any]", named: "dict[str, Any]", is_tagged: bool
) -> str:
    try:
        value = function(*positional, **named)
        return f'["value", {index}, {encode(value, is_tagged)}]'
    except NotPlain as error:
        return f'["other", {index}, {quote(error.args[0])}]'
    except BaseException as error:
        return f'["error", {index}, {quote(name_of(error))}]'


def name_of(error: BaseException) -> str:
    """The type, and which limit the kernel has refused by it."""
    name = type(error).__name__
    if isinstance(error, MemoryError):
        return "MemoryError"
    if isinstance(error, OSError) and error.errno in REFUSED:
        return name + REFUSED[error.errno]
    return name + REFUSED[11] if name == "RuntimeError" and str(error) == "can't start new thread" else name


def quote(text: str) -> str:
    return encode_basestring_ascii(str(text)[:80])


def encode(value: "Any", is_tagged: bool = False) -> str:
    parts: list[str] = []
    encode_into(value, parts, MAX_DEPTH, is_tagged)
    return "".join(parts)


def encode_into(value: "Any", parts: "list[str]", depth: int, is_tagged: bool) -> None:
    """Exact types only: a subclass may compare and print as it likes."""
    kind = type(value)
    if len(parts) > MAX_ITEMS or depth == 0:
        raise NotPlain("too large" if depth else "too deep")
    if value is None or value is True or value is False:
        parts.append("null" if value is None else "true" if value else "false")
    elif kind is str:
        parts.append(encode_basestring_ascii(value))
    elif kind is int:
        parts.append(int.__repr__(value))
    elif is_tagged and kind not in (list, float):
        encode_tagged(value, parts, depth, is_tagged)
    elif kind is float:
        if value - value == 0:
            parts.append(float.__repr__(value))
        elif is_tagged:
            parts.append('{"float":"' + float.__repr__(value) + '"}')
        else:
            raise NotPlain("a float that is not finite")
    elif kind is list:
        parts.append("[")
        for place, item in enumerate(value):
            parts.append("," if place else "")
            encode_into(item, parts, depth - 1, is_tagged)
        parts.append("]")
    elif kind is dict:
        parts.append("{")
        for place, (key, item) in enumerate(value.items()):
            if type(key) is not str:
                raise NotPlain("a dict with keys that are not all str")
            parts.append(("," if place else "") + encode_basestring_ascii(key) + ":")
            encode_into(item, parts, depth - 1, is_tagged)
        parts.append("}")
    else:
        raise NotPlain(kind.__name__)


def encode_tagged(value: "Any", parts: "list[str]", depth: int, is_tagged: bool) -> None:
    """A dict as a list of pairs, and what JSON lacks."""
    kind = type(value)
    if kind in (tuple, set, frozenset):
        parts.append('{"' + kind.__name__ + '":')
        encode_into(list(value), parts, depth, is_tagged)
    elif kind is dict:
        parts.append('{"dict":')
        encode_into([list(pair) for pair in value.items()], parts, depth, is_tagged)
    elif kind is bytes:
        parts.append('{"bytes":' + encode_basestring_ascii(value.decode("latin-1")))
    elif kind is complex:
        parts.append('{"complex":')
        encode_into([value.real, value.imag], parts, depth, is_tagged)
    else:
        raise NotPlain(kind.__name__)
    parts.append("}")


if __name__ == "__main__":
    main()
