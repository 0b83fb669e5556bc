"""How most instructions are built: a function of the operands' arrays, executed for the lanes that the mask has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Decoder, Run, put
from .formats import bf16_to_f64, f64_to_bf16
from .parser import Instruction
from .registers import PAIRS

BFLOATS = ("bf16", "bf16x2")
FLOATS = ("f16", "f16x2", "f32", "f64", *BFLOATS)


def elementwise(d: Decoder, ins: Instruction, ufunc: Callable, *types: str, result: str | None = None) -> Run:
    """A numpy ufunc of one or two operands, straight into the result."""
    out = d.write(ins.operands[0], result or ins.type)
    slots = [d.read(operand, type_) for operand, type_ in zip(ins.operands[1:], types, strict=True)]
    pairs = (result or ins.type) in PAIRS

    def run(m) -> None:
        r, mask = m.r, m.mask
        if mask is None:
            ufunc(*[r[s] for s in slots], out=r[out])
        else:
            ufunc(*[r[s] for s in slots], out=r[out], where=mask[:, None] if pairs else mask)

    if len(slots) == 2 and not pairs:  # the common case, without the list
        a, b = slots

        def run_two(m) -> None:
            r = m.r
            if m.mask is None:
                ufunc(r[a], r[b], out=r[out])
            else:
                ufunc(r[a], r[b], out=r[out], where=m.mask)

        return run_two
    return run


def computed(d: Decoder, ins: Instruction, function: Callable, *types: str, result: str | None = None) -> Run:
    """Any function of the operands' arrays."""
    out = d.write(ins.operands[0], result or ins.type)
    slots = [d.read(operand, type_) for operand, type_ in zip(ins.operands[1:], types, strict=True)]

    def run(m) -> None:
        put(m, out, function(*[m.r[s] for s in slots]))

    return run


def flush(values: np.ndarray) -> np.ndarray:
    """.ftz: subnormals become zeros of their sign."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def float_function(d: Decoder, ins: Instruction, function: Callable, count: int) -> Run:
    """`function` on floats, with .ftz, .sat and bfloat16 around it."""
    kind, ftz, sat = ins.type, ins.has("ftz"), ins.has("sat")
    if kind in BFLOATS:
        return computed(d, ins, lambda *x: f64_to_bf16(function(*map(bf16_to_f64, x))), *[kind] * count)
    if not (ftz or sat):
        if isinstance(function, np.ufunc):
            return elementwise(d, ins, function, *[kind] * count)
        return computed(d, ins, function, *[kind] * count)

    def wrapped(*x):
        value = function(*(map(flush, x) if ftz and kind == "f32" else x))
        if sat:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
        return flush(value) if ftz and kind == "f32" else value

    return computed(d, ins, wrapped, *[kind] * count)
