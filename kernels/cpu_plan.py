"""A sequence of CPU kernel calls, recorded once and run again by one call: on CPU what a CUDA graph is on a GPU.

A decode step makes some forty calls on a few rows each, and the Python, PyTorch and ctypes around them take as long as
half of the kernels. `record` runs the same Python once without executing its kernels, keeps their addresses and
arguments, and lays the buffers that are made on the way into one arena, where those that are never in use together
share their place. `Plan.run` sets the number of rows and runs everything from C++ (kernels/cpu/plan.cpp).

What the code reads and did not make itself, such as inputs, caches and weights, has to stay where it is; other values
of weights are a matter of `Plan.refresh`.
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cispo.kernels import cpu_library
from cispo.kernels.cpu_library import Argument, CpuFunction
from cispo.kernels.product import packed_weight

_ALIGNMENT = 64
_NEW_BUFFER = ("aten::empty", "aten::empty_like", "aten::new_empty")

_run_plan = CpuFunction("run_plan", "pi")


class NotRecordableError(RuntimeError):
    """PyTorch computes part of what was to be recorded."""


@dataclass(slots=True)
class _Buffer:
    """Memory that the recorded code made: where it lay then, the calls that use it, and its place in the arena."""

    tensor: Tensor
    start: int
    size: int
    first_call: int = -1
    last_call: int = -1
    place: int = 0


class _Recorder(TorchDispatchMode):
    """Takes down kernel calls and new buffers, and refuses every operation that a later run would not repeat."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[CpuFunction, tuple[Argument, ...]]] = []
        self.buffers: list[_Buffer] = []
        self.weights: list[tuple[Tensor, int]] = []

    def add(self, function: CpuFunction, arguments: tuple[Argument, ...]) -> None:
        self.calls.append((function, arguments))

    def add_weight(self, weight: Tensor, matrices: int) -> None:
        self.weights.append((weight, matrices))

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_recorded = cpu_library.recording.recorder is self and not func.is_view
        if is_recorded and func._schema.name not in _NEW_BUFFER:
            raise NotRecordableError(f"PyTorch computes {func._schema.name}, which a plan would not repeat")
        result = func(*args, **(kwargs or {}))
        if not is_recorded:
            return result
        storage = result.untyped_storage()
        self.buffers.append(_Buffer(result, storage.data_ptr(), storage.nbytes()))
        return result

    def buffer_at(self, address: int) -> _Buffer | None:
        """The buffer that holds this address."""
        for buffer in self.buffers:
            if buffer.start <= address < buffer.start + buffer.size:
                return buffer
        return None


def _lay_out(buffers: list[_Buffer]) -> int:
    """Give every buffer its place, apart from all that are in use with it, and return the bytes that takes."""
    laid: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda one: one.first_call):
        beside = [one for one in laid if one.last_call >= buffer.first_call and one.first_call <= buffer.last_call]
        for other in sorted(beside, key=lambda one: one.place):
            if buffer.place + buffer.size <= other.place:
                break
            end = other.place + other.size
            buffer.place = max(buffer.place, -(-end // _ALIGNMENT) * _ALIGNMENT)
        laid.append(buffer)
    return max((buffer.place + buffer.size for buffer in laid), default=0)


def _word(argument: Argument) -> int:
    """An argument as kernels/cpu/replay.h reads it."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        return int.from_bytes(struct.pack("<f", argument), "little")
    return argument or 0


class Plan:
    """A recorded program. Not safe to use from two threads at once.

    outputs: what the recorded code returned; `run` overwrites their first rows.
    """

    def __init__(self, recorder: _Recorder, outputs: tuple[Tensor, ...]) -> None:
        for index, (_, arguments) in enumerate(recorder.calls):
            for argument in arguments:
                buffer = recorder.buffer_at(argument.data_ptr()) if isinstance(argument, Tensor) else None
                if buffer is not None:
                    buffer.first_call = index if buffer.first_call < 0 else buffer.first_call
                    buffer.last_call = index
        for output in outputs:
            found = recorder.buffer_at(output.data_ptr())
            assert found is not None, "an output is made by the code that is recorded"
            found.last_call = len(recorder.calls)
        self._arena = torch.zeros(_lay_out(recorder.buffers) + _ALIGNMENT, dtype=torch.uint8)
        self._skipped = -self._arena.data_ptr() % _ALIGNMENT
        self._kept = [
            argument
            for _, arguments in recorder.calls
            for argument in arguments
            if isinstance(argument, Tensor) and recorder.buffer_at(argument.data_ptr()) is None
        ]
        self._calls = len(recorder.calls)
        self._row_words: list[int] = []
        self._thread_words: list[int] = []
        self._program = np.array(self._assemble(recorder), np.int64)
        self._program_tensor = torch.from_numpy(self._program)  # the same memory
        self._threads = 0
        self._weights = recorder.weights
        self.outputs = tuple(self._in_arena(output, recorder) for output in outputs)

    def _assemble(self, recorder: _Recorder) -> list[int]:
        program: list[int] = []
        for function, arguments in recorder.calls:
            program += [function.replay_address(), len(arguments)]
            for letter, argument in zip(function.signature, arguments, strict=True):
                if letter == "n":
                    self._row_words.append(len(program))
                elif letter == "t":
                    self._thread_words.append(len(program))
                word = _word(float(argument) if letter == "f" and isinstance(argument, int) else argument)
                buffer = recorder.buffer_at(word) if letter == "p" else None
                program.append(word if buffer is None else word - buffer.start + self._address(buffer))
        return program

    def _address(self, buffer: _Buffer) -> int:
        return self._arena.data_ptr() + self._skipped + buffer.place

    def _in_arena(self, output: Tensor, recorder: _Recorder) -> Tensor:
        buffer = recorder.buffer_at(output.data_ptr())
        assert buffer is not None and output.is_contiguous()
        start = self._skipped + buffer.place + output.data_ptr() - buffer.start
        return self._arena[start : start + output.nbytes].view(output.dtype).view(output.shape)

    def refresh(self) -> None:
        """Take in changed values of the weights; they are packed again, to where the program reads them."""
        for weight, matrices in self._weights:
            packed_weight(weight, matrices)

    def run(self, rows: int) -> None:
        """Execute the calls on the first `rows` rows."""
        program, threads = self._program, torch.get_num_threads()
        program[self._row_words] = rows
        if threads != self._threads:
            program[self._thread_words] = self._threads = threads
        _run_plan(self._program_tensor, self._calls)


def record(code: Callable[[], tuple[Tensor, ...]]) -> Plan | None:
    """The plan of `code`, which sees as many rows as there can be; None where PyTorch computes any of it.

    That is so wherever no CPU kernel takes the operands (another dtype or device, sizes that are no whole lanes); then
    `code` has to be called each time. It must have no gradients, and no effect but through kernels.
    """
    recorder = _Recorder()
    cpu_library.recording.recorder = recorder
    try:
        with recorder:
            outputs = code()
    except NotRecordableError:
        return None
    finally:
        cpu_library.recording.recorder = None
    return Plan(recorder, outputs)
