"""Kernels of one instruction: thread i loads its operands, executes a body of PTX and stores what comes out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..decode import Program
from ..findings import EmulationError
from ..launch import Launch, Scheduler
from ..memory import GlobalMemory
from ..metrics import KernelMetrics
from ..parser import TYPE_BYTES, parse

HEADERS = {
    "80": ".version 7.8\n.target sm_80\n.address_size 64\n",
    "90a": ".version 8.0\n.target sm_90a\n.address_size 64\n",
}


def kernel(name: str, body: str, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """`body` reads %i0, %i1, ... and writes %o0, ...; all pass through memory as 64-bit words, one row per thread."""
    lines = [f".visible .entry {name}(.param .u64 from, .param .u64 to)", "{"]
    lines += [".reg .b64 %from, %to, %row, %word;", ".reg .b32 %thread;", ".reg .pred %p<4>;", ".reg .b32 %r<8>;"]
    lines += [f".reg .b{8 * TYPE_BYTES[t]} %i{n};" for n, t in enumerate(inputs)]
    lines += [f".reg .b{8 * TYPE_BYTES[t]} %o{n};" for n, t in enumerate(outputs)]
    lines += ["ld.param.u64 %from, [from];", "ld.param.u64 %to, [to];", "mov.u32 %thread, %tid.x;"]
    lines += [f"mul.wide.u32 %row, %thread, {8 * len(inputs)};", "add.u64 %from, %from, %row;"]
    lines += [f"mul.wide.u32 %row, %thread, {8 * len(outputs)};", "add.u64 %to, %to, %row;"]
    for n, type_ in enumerate(inputs):
        bits = 8 * TYPE_BYTES[type_]
        lines.append(f"ld.global.u64 %word, [%from+{8 * n}];")
        lines.append(f"cvt.u{bits}.u64 %i{n}, %word;" if bits < 64 else f"mov.b64 %i{n}, %word;")
    lines.append(body)
    for n, type_ in enumerate(outputs):
        bits = 8 * TYPE_BYTES[type_]
        lines.append(f"cvt.u64.u{bits} %word, %o{n};" if bits < 64 else f"mov.b64 %word, %o{n};")
        lines.append(f"st.global.u64 [%to+{8 * n}], %word;")
    return "\n".join([*lines, "ret;", "}", ""])


def emulate(text: str, name: str, rows: np.ndarray, outputs: int, seed: int = 0) -> np.ndarray:
    """Runs one block of as many threads as there are rows of operands."""
    module = parse(text)
    memory = GlobalMemory(1 << 24)
    source = memory.allocate(rows.nbytes, "operands")
    target = memory.allocate(8 * len(rows) * outputs, "results")
    memory.view(source, rows.nbytes)[:] = np.ascontiguousarray(rows, np.uint64).reshape(-1).view(np.uint8)
    memory.mark_written(source, rows.nbytes)
    parameters = np.array([source, target], np.uint64).tobytes()
    program = Program(module, module.kernel(name))
    block = (len(rows), 1, 1)
    launch = Launch(program, memory, KernelMetrics(), Scheduler(seed), (1, 1, 1), block, parameters, 0, {})
    problems = launch.run().problems
    if problems:
        raise EmulationError(problems)
    return memory.view(target, 8 * len(rows) * outputs).view(np.uint64).reshape(len(rows), outputs).copy()
