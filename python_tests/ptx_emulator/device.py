"""A device that is not there: memory to pass to launch functions, and what came of their launches."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .decode import Program
from .findings import DeviceTrap, EmulationError, Problem
from .launch import Launch, Scheduler
from .library import EmulatedLibrary
from .memory import GlobalMemory
from .metrics import KernelMetrics, MetricsByKernel

_SHARED_KB = {(8, 0): 164, (9, 0): 228}  # of a multiprocessor: A100, H100
_MULTIPROCESSORS = 16


def _attributes(capability: tuple[int, int]) -> dict[int, int]:
    """cudaDeviceAttr by number."""
    shared = _SHARED_KB[capability] * 1024
    return {
        1: 1024,  # threads per block
        8: 48 * 1024,  # shared memory per block
        10: 32,  # warp size
        39: 2048,  # threads per multiprocessor
        75: capability[0],
        76: capability[1],
        81: shared,  # per multiprocessor
        97: shared - 1024,  # per block when opted in
    }


_INVALID_VALUE, _LAUNCH_FAILURE = 1, 719  # cudaError_t


class _LaunchRequest(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("dynamic_shared", ctypes.c_uint64),
        ("most_dynamic_shared", ctypes.c_int64),
    )


_LaunchCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_LaunchRequest))
_MemoryCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)


class DeviceArray:
    def __init__(self, memory: GlobalMemory, pointer: int, shape: tuple[int, ...], dtype: np.dtype, name: str):
        self._memory = memory
        self.pointer = pointer
        self.shape = shape
        self.dtype = dtype
        self.name = name

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def numpy(self, partly: bool = False) -> np.ndarray:
        """A copy of the contents; an error where bytes were never written, unless `partly`."""
        missing = self.unwritten()
        if len(missing) and not partly:
            detail = (
                f"{len(missing)} of {self.nbytes} bytes of {self.name} were never written, the first is {missing[0]}"
            )
            raise EmulationError([Problem("uninitialised read", "the host", "numpy()", detail)])
        return self._memory.view(self.pointer, self.nbytes).view(self.dtype).reshape(self.shape).copy()

    def unwritten(self) -> np.ndarray:
        """Numbers of the bytes that nobody has written."""
        return self._memory.unwritten(self.pointer, self.nbytes)

    def fill(self, values: np.ndarray) -> None:
        flat = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8)
        self._memory.view(self.pointer, self.nbytes)[:] = flat
        self._memory.mark_written(self.pointer, self.nbytes)


class Device:
    def __init__(
        self,
        library: EmulatedLibrary,
        seed: int = 0,
        raise_on_problems: bool = True,
        multiprocessors: int = 8,
        blocks_per_multiprocessor: int = 1,
        memory_bytes: int = 1 << 36,
        capability: tuple[int, int] = (8, 0),
    ):
        """Few multiprocessors make for small tests. Kernels of a folder sm90/ run on any; host code may ask first."""
        self.library = library
        self.memory = GlobalMemory(memory_bytes)
        self.problems: list[Problem] = []
        self.metrics = MetricsByKernel()
        self.launches: list[
            tuple[str, tuple[int, int, int], tuple[int, int, int], int]
        ] = []  # name, grid, block, shared
        self.raise_on_problems = raise_on_problems
        self.attributes = _attributes(capability) | {_MULTIPROCESSORS: multiprocessors}
        self.number = list(_SHARED_KB).index(capability)
        self.blocks_per_multiprocessor = blocks_per_multiprocessor
        self._scheduler = Scheduler(seed)
        self._variables: dict[str, int] = {}
        self._arrays = 0
        self._failure: BaseException | None = None

    # Memory

    def array(self, values: Any, name: str | None = None, misalign: int = 0) -> DeviceArray:
        """A copy of `values` on the device. `misalign` moves it off the 256-byte boundary that allocators give."""
        values = np.asarray(values)
        array = self.empty(values.shape, values.dtype, name, misalign)
        array.fill(values)
        return array

    def empty(
        self, shape: int | tuple[int, ...], dtype: Any, name: str | None = None, misalign: int = 0
    ) -> DeviceArray:
        """Memory whose reading before a write is a finding. Costs nothing until written, whatever its size."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        self._arrays += 1
        name = name or f"array {self._arrays} {shape} {dtype}"
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return DeviceArray(self.memory, self.memory.allocate(size, name, misalign), shape, dtype, name)

    # Calls

    def call(self, function: str, *arguments: Any) -> int:
        """Calls an `extern "C"` function of the library and runs every launch it makes; its result as an int.

        Arrays go as their pointers, ints as 64 bits, bools as int, None as a null pointer, floats as double: give a
        ctypes value for anything else, such as `ctypes.c_float(0.5)`.
        """
        host = self.library.host
        launch_callback, memory_callback = _LaunchCallback(self._on_launch), _MemoryCallback(self._on_memory)
        ctypes.c_void_p.in_dll(host, "emulator_launch").value = ctypes.cast(launch_callback, ctypes.c_void_p).value
        ctypes.c_void_p.in_dll(host, "emulator_memory").value = ctypes.cast(memory_callback, ctypes.c_void_p).value
        ctypes.c_int.in_dll(host, "emulator_blocks_per_multiprocessor").value = self.blocks_per_multiprocessor
        ctypes.c_int.in_dll(host, "emulator_device").value = self.number
        attributes = (ctypes.c_int * 256).in_dll(host, "emulator_attributes")
        for attribute, value in self.attributes.items():
            attributes[attribute] = value
        self._failure = None
        before = len(self.problems)
        result = getattr(host, function)(*map(_argument, arguments))
        if self._failure is not None:
            raise self._failure
        if self.raise_on_problems and len(self.problems) > before:
            raise EmulationError(self.problems[before:])
        return int(result)

    def _on_launch(self, request: Any) -> int:
        # An exception cannot pass the C++ frames of the caller: it is kept and raised when they have returned.
        if self._failure is not None:
            return _LAUNCH_FAILURE
        try:
            return self._launch(request.contents)
        except BaseException as error:
            self._failure = error
            return _LAUNCH_FAILURE

    def _launch(self, request: _LaunchRequest) -> int:
        name = request.kernel.decode()
        program = self.library.program(name)
        grid, block = tuple(request.grid), tuple(request.block)
        self.launches.append((name, grid, block, request.dynamic_shared))
        wrong = self._wrong_launch(program, grid, block, request)
        if wrong:
            self.problems.append(Problem("launch", name, "<<<...>>>", wrong))
            return _INVALID_VALUE
        parameters = bytearray(program.kernel.parameter_bytes)
        for i, parameter in enumerate(program.kernel.parameters.values()):
            value = ctypes.string_at(request.arguments[i], parameter.size)
            parameters[parameter.offset : parameter.offset + parameter.size] = value
        metrics = self.metrics.setdefault(name, KernelMetrics())
        launch = Launch(
            program,
            self.memory,
            metrics,
            self._scheduler,
            grid,
            block,
            bytes(parameters),
            request.dynamic_shared,
            self._addresses(program),
        )
        findings = launch.run()
        self.problems += findings.problems
        return _LAUNCH_FAILURE if findings.problems else 0

    def _wrong_launch(self, program: Program, grid, block, request: _LaunchRequest) -> str | None:
        threads = block[0] * block[1] * block[2]
        static = -(-program.static_shared // program.dynamic_align) * program.dynamic_align
        allowed = request.most_dynamic_shared if request.most_dynamic_shared >= 0 else self.attributes[8] - static
        if not 0 < threads <= (program.kernel.max_threads or 1024):
            return f"{threads} threads per block, {program.kernel.max_threads or 1024} allowed"
        if 0 in grid or grid[0] >= 1 << 31 or max(grid[1:]) >= 1 << 16:
            return f"grid {grid}"
        if request.dynamic_shared > max(allowed, self.attributes[8] - static):
            return f"{request.dynamic_shared} bytes of dynamic shared memory, {allowed} allowed by cudaFuncSetAttribute"
        if request.dynamic_shared + static > self.attributes[97]:
            return f"{request.dynamic_shared} + {static} bytes of shared memory, {self.attributes[97]} on the device"
        return None

    def _addresses(self, program: Program) -> dict[str, int]:
        for variable in program.variables:
            if variable.name not in self._variables:
                address = self.memory.allocate(variable.size, variable.name)
                contents = variable.initial.ljust(variable.size, b"\0")
                self.memory.view(address, variable.size)[:] = np.frombuffer(contents, np.uint8)
                self.memory.mark_written(address, variable.size)
                self._variables[variable.name] = address
        return self._variables

    def _on_memory(self, target: int | None, source: int | None, value: int, size: int) -> int:
        wrong = self.memory.check_range(target or 0, size)
        from_device = source is not None and self.memory.base <= source < self.memory.base + self.memory.size
        if source is not None and from_device:
            wrong = wrong or self.memory.check_range(source, size)
        if wrong:
            self.problems.append(Problem("out of bounds", "the host", "cudaMemcpy or cudaMemset", wrong))
            return _INVALID_VALUE
        if size == 0 or target is None:
            return 0
        if source is None:
            self.memory.view(target, size)[:] = value & 0xFF
            self.memory.mark_written(target, size)
        else:
            self.memory.view(target, size)[:] = np.frombuffer(ctypes.string_at(source, size), np.uint8)
            if from_device:
                states = self.memory.state[source - self.memory.base :][:size].copy()
                self.memory.state[target - self.memory.base :][:size] = states
            else:
                self.memory.mark_written(target, size)
        return 0


def _argument(value: Any) -> Any:
    if isinstance(value, DeviceArray):
        return ctypes.c_void_p(value.pointer)
    if isinstance(value, bool):
        return ctypes.c_int(value)
    if isinstance(value, int | np.integer):
        return ctypes.c_int64(int(value))
    if isinstance(value, float):
        return ctypes.c_double(value)
    if value is None:
        return ctypes.c_void_p(0)
    return value


__all__ = ["Device", "DeviceArray", "DeviceTrap", "EmulationError"]
