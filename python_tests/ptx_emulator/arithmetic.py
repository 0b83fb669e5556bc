"""Integer, float, half and bfloat16 arithmetic, comparison, selection, bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from .decode import Decoder, Run, handles, unsupported
from .elementwise import BFLOATS, FLOATS, computed, elementwise, float_function
from .formats import directed, fma_f32, fma_f64
from .parser import TYPE_BYTES, Instruction

_DIRECTED = ("rz", "rm", "rp")


def _sum(a: np.ndarray, b: np.ndarray, rounding: str) -> np.ndarray:
    """A float64 that rounds as the exact sum does; opposites give minus zero when rounding down."""
    total = fma_f64(a, np.ones(1), b)
    if rounding != "rm":
        return total
    plus_zeros = (a == 0) & (b == 0) & ~np.signbit(a) & ~np.signbit(b)
    return np.where((total == 0) & ~plus_zeros, -0.0, total)


def _directed(d: Decoder, ins: Instruction, exact: Callable, count: int) -> Run:
    """The instruction in a rounding other than to nearest."""
    rounding = str(ins.one_of(*_DIRECTED))
    if ins.type != "f32":
        raise unsupported(ins, "rounding")

    def function(*x):
        return directed(exact(*(v.astype(np.float64) for v in x), rounding), rounding, np.float32)

    return float_function(d, ins, function, count)


def _only_nearest(ins: Instruction) -> None:
    if ins.one_of(*_DIRECTED):
        raise unsupported(ins, "rounding")


@handles("add", "sub", "mul")
def _arithmetic(d: Decoder, ins: Instruction) -> Run:
    ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[ins.opcode]
    kind = ins.type
    if kind in FLOATS:
        if ins.one_of(*_DIRECTED):
            exact = {"add": _sum, "sub": lambda a, b, rounding: _sum(a, -b, rounding), "mul": lambda a, b, _: a * b}
            return _directed(d, ins, exact[ins.opcode], 2)
        return float_function(d, ins, ufunc, 2)
    if ins.has("cc") or ins.has("sat"):
        raise unsupported(ins)
    if ins.opcode == "mul" and ins.has("wide"):
        return _wide(d, ins, kind)
    if ins.opcode == "mul" and ins.has("hi"):
        return computed(d, ins, _high(kind), kind, kind)
    return elementwise(d, ins, ufunc, kind, kind)


def _wide(d: Decoder, ins: Instruction, kind: str) -> Run:
    double = f"{kind[0]}{16 * TYPE_BYTES[kind]}"
    return elementwise(
        d, ins, partial(np.multiply, dtype=f"{_numpy_kind(kind)}{2 * TYPE_BYTES[kind]}"), kind, kind, result=double
    )


def _numpy_kind(kind: str) -> str:
    return "i" if kind[0] == "s" else "u"


def _high(kind: str) -> Callable:
    bits = 8 * TYPE_BYTES[kind]
    if bits < 64:
        double = np.dtype(f"{_numpy_kind(kind)}{bits // 4}")
        return lambda a, b: (a.astype(double) * b.astype(double)) >> double.type(bits)

    def high64(a, b):
        low = np.uint64(0xFFFFFFFF)
        s = np.uint64(32)
        x, y = np.broadcast_arrays(a.view(np.uint64), b.view(np.uint64))
        xl, xh, yl, yh = x & low, x >> s, y & low, y >> s
        middle = (xl * yl >> s) + (xh * yl & low) + (xl * yh & low)
        product = xh * yh + (xh * yl >> s) + (xl * yh >> s) + (middle >> s)
        if kind[0] == "s":
            product = product - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
            return product.view(np.int64)
        return product

    return high64


@handles("mad")
def _mad(d: Decoder, ins: Instruction) -> Run:
    kind = ins.type
    if kind in FLOATS:
        return _fma(d, ins)
    if ins.has("cc") or ins.has("sat"):
        raise unsupported(ins)
    if ins.has("wide"):
        double = f"{kind[0]}{16 * TYPE_BYTES[kind]}"
        big = np.dtype(f"{_numpy_kind(kind)}{2 * TYPE_BYTES[kind]}")
        return computed(d, ins, lambda a, b, c: np.multiply(a, b, dtype=big) + c, kind, kind, double, result=double)
    product = _high(kind) if ins.has("hi") else np.multiply
    return computed(d, ins, lambda a, b, c: product(a, b).astype(c.dtype) + c, kind, kind, kind)


@handles("fma")
def _fma(d: Decoder, ins: Instruction) -> Run:
    kind = ins.type
    if ins.one_of(*_DIRECTED):
        return _directed(d, ins, lambda a, b, c, rounding: _sum(a * b, c, rounding), 3)

    def half(a, b, c):
        return fma_f64(a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)).astype(np.float16)

    function = {"f32": fma_f32, "f16": half, "f16x2": half}.get(kind)
    if kind in BFLOATS:
        function = fma_f64
    if function is None:
        raise unsupported(ins)
    if ins.has("relu"):
        plain = function
        function = lambda a, b, c: _maximum(plain(a, b, c), np.zeros(1, a.dtype))  # noqa: E731
    return float_function(d, ins, function, 3)


@handles("div")
def _divide(d: Decoder, ins: Instruction) -> Run:
    kind = ins.type
    if kind in FLOATS:
        _only_nearest(ins)
        return float_function(d, ins, np.divide, 2)

    def quotient(a, b):
        safe = np.where(b == 0, b.dtype.type(1), b)
        if kind[0] == "s":
            return np.where(b == 0, b.dtype.type(-1), (a - np.fmod(a, safe)) // safe)
        return np.where(b == 0, b.dtype.type(np.iinfo(b.dtype).max), a // safe)

    return computed(d, ins, quotient, kind, kind)


@handles("rem")
def _remainder(d: Decoder, ins: Instruction) -> Run:
    return computed(
        d, ins, lambda a, b: np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b))), ins.type, ins.type
    )


def _zero_aware(floats: Callable, on_equal: Callable) -> Callable:
    """min and max tell -0 from +0, which numpy does not."""

    def function(a, b):
        bits = f"u{a.itemsize}"
        equal = on_equal(a.view(bits), b.view(bits)).view(a.dtype)
        return np.where(a == b, equal, floats(a, b))

    return function


_maximum = _zero_aware(np.fmax, np.bitwise_and)
_EXTREMES = {
    ("max", False): _maximum,
    ("min", False): _zero_aware(np.fmin, np.bitwise_or),
    ("max", True): _zero_aware(np.maximum, np.bitwise_and),
    ("min", True): _zero_aware(np.minimum, np.bitwise_or),
}


@handles("min", "max")
def _extreme(d: Decoder, ins: Instruction) -> Run:
    kind = ins.type
    if kind in FLOATS:
        if ins.has("xorsign"):
            raise unsupported(ins)
        count = len(ins.operands) - 1
        pick = _EXTREMES[ins.opcode, ins.has("NaN")]
        function = pick if count == 2 else lambda a, b, c: pick(pick(a, b), c)
        return float_function(d, ins, function, count)
    return elementwise(d, ins, np.maximum if ins.opcode == "max" else np.minimum, kind, kind)


@handles("neg", "abs")
def _sign(d: Decoder, ins: Instruction) -> Run:
    kind = ins.type
    if kind in BFLOATS:
        mask = np.uint16(0x8000)
        change = (lambda a: a ^ mask) if ins.opcode == "neg" else (lambda a: a & ~mask)
        return computed(d, ins, change, kind)
    if kind in FLOATS:
        return float_function(d, ins, np.negative if ins.opcode == "neg" else np.absolute, 1)
    return elementwise(d, ins, np.negative if ins.opcode == "neg" else np.absolute, kind)


# Approximations are computed in float64 and rounded once: at least as exact as the device, never bitwise the same.
_UNARY = {
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@handles(*_UNARY)
def _unary(d: Decoder, ins: Instruction) -> Run:
    _only_nearest(ins)
    function, kind = _UNARY[ins.opcode], ins.type
    if kind in BFLOATS or kind == "f64":
        return float_function(d, ins, function, 1)
    return float_function(d, ins, lambda x: function(x.astype(np.float64)).astype(x.dtype), 1)


@handles("copysign")
def _copysign(d: Decoder, ins: Instruction) -> Run:
    return computed(d, ins, lambda a, b: np.copysign(b, a), ins.type, ins.type)


@handles("sad")
def _sad(d: Decoder, ins: Instruction) -> Run:
    return computed(d, ins, lambda a, b, c: np.where(a < b, b - a, a - b) + c, *[ins.type] * 3)


@handles("dp4a")
def _dp4a(d: Decoder, ins: Instruction) -> Run:
    """Four products of bytes, each operand's signedness by itself, added to a 32-bit sum."""
    kinds = ["i1" if kind == "s32" else "u1" for kind in ins.modifiers[-2:]]

    def dot(a, b, c):
        x, y = (
            np.ascontiguousarray(v).view(k).reshape(-1, 4).astype(np.int64) for v, k in zip((a, b), kinds, strict=True)
        )
        return ((x * y).sum(axis=1) + c).astype(np.uint32)

    return computed(d, ins, dot, "b32", "b32", "s32", result="b32")
