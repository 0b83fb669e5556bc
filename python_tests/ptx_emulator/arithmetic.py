"""Integer, float, half and bfloat16 arithmetic, comparison, selection, bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from .decode import Decoder, Run, handles, put, unsupported
from .formats import bf16_to_f64, directed, f64_to_bf16, fma_f32, fma_f64
from .parser import TYPE_BYTES, Immediate, Instruction, Pair
from .registers import PAIRS

_BFLOAT = ("bf16", "bf16x2")
_FLOAT = ("f16", "f16x2", "f32", "f64", *_BFLOAT)


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


def _flush(values: np.ndarray) -> np.ndarray:
    """.ftz: subnormals become zeros of their sign."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def float_function(d: Decoder, ins: Instruction, function: Callable, count: int) -> Run:
    """`function` on floats, with .ftz, .sat and bfloat16 around it."""
    kind, ftz, sat = ins.type, ins.has("ftz"), ins.has("sat")
    if kind in _BFLOAT:
        return computed(d, ins, lambda *x: f64_to_bf16(function(*map(bf16_to_f64, x))), *[kind] * count)
    if not (ftz or sat):
        if isinstance(function, np.ufunc):
            return elementwise(d, ins, function, *[kind] * count)
        return computed(d, ins, function, *[kind] * count)

    def wrapped(*x):
        value = function(*(map(_flush, x) if ftz and kind == "f32" else x))
        if sat:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
        return _flush(value) if ftz and kind == "f32" else value

    return computed(d, ins, wrapped, *[kind] * count)


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
    if kind in _FLOAT:
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
    if kind in _FLOAT:
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
    if kind in _BFLOAT:
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
    if kind in _FLOAT:
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
    if kind in _FLOAT:
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
    if kind in _BFLOAT:
        mask = np.uint16(0x8000)
        change = (lambda a: a ^ mask) if ins.opcode == "neg" else (lambda a: a & ~mask)
        return computed(d, ins, change, kind)
    if kind in _FLOAT:
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
    if kind in _BFLOAT or kind == "f64":
        return float_function(d, ins, function, 1)
    return float_function(d, ins, lambda x: function(x.astype(np.float64)).astype(x.dtype), 1)


@handles("copysign")
def _copysign(d: Decoder, ins: Instruction) -> Run:
    return computed(d, ins, lambda a, b: np.copysign(b, a), ins.type, ins.type)


# Bits

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@handles(*_LOGIC)
def _logic(d: Decoder, ins: Instruction) -> Run:
    return elementwise(d, ins, _LOGIC[ins.opcode], ins.type, ins.type)


@handles("not")
def _not(d: Decoder, ins: Instruction) -> Run:
    return elementwise(d, ins, np.invert, ins.type)


@handles("cnot")
def _cnot(d: Decoder, ins: Instruction) -> Run:
    return computed(d, ins, lambda a: a == 0, ins.type)


@handles("shl", "shr")
def _shift(d: Decoder, ins: Instruction) -> Run:
    kind, bits = ins.type, 8 * TYPE_BYTES[ins.type]
    ufunc = np.left_shift if ins.opcode == "shl" else np.right_shift
    amount = ins.operands[2]
    if isinstance(amount, Immediate) and 0 <= amount.value < bits:
        return elementwise(d, ins, ufunc, kind, kind)

    def shifted(a, n):
        clamped = np.minimum(n, bits - 1).astype(a.dtype)
        value = ufunc(a, clamped)
        if ufunc is np.right_shift and kind[0] == "s":
            return value
        return np.where(n >= bits, a.dtype.type(0), value)

    return computed(d, ins, shifted, kind, "u32")


@handles("shf")
def _funnel(d: Decoder, ins: Instruction) -> Run:
    """The 64 bits high:low shifted; the upper word of a left shift, the lower word of a right one."""
    left, clamp = ins.has("l"), ins.has("clamp")

    def funnel(low, high, n):
        n = np.minimum(n, 32) if clamp else n & np.uint32(31)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        n = n.astype(np.uint64)
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return computed(d, ins, funnel, "b32", "b32", "u32", result="b32")


@handles("lop3")
def _lop3(d: Decoder, ins: Instruction) -> Run:
    table = ins.operands[4]
    if not isinstance(table, Immediate):
        raise unsupported(ins)
    rows = [row for row in range(8) if table.value >> row & 1]
    out = d.write(ins.operands[0], "b32")
    slots = [d.read(operand, "b32") for operand in ins.operands[1:4]]

    def run(m) -> None:
        a, b, c = (m.r[s] for s in slots)
        value = np.zeros(1, np.uint32)
        for row in rows:
            value = value | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        put(m, out, value)

    return run


@handles("prmt")
def _permute(d: Decoder, ins: Instruction) -> Run:
    if ins.one_of("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        raise unsupported(ins)

    def permute(a, b, selector):
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        value = np.zeros(1, np.uint32)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = ((both >> (np.uint64(8) * (nibble & np.uint32(7)))) & np.uint64(0xFF)).astype(np.uint32)
            sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
            value = value | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i))
        return value

    return computed(d, ins, permute, "b32", "b32", "b32", result="b32")


def _ones(count: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As many low bits set."""
    bits = 8 * dtype.itemsize
    some = (dtype.type(1) << np.minimum(count, dtype.type(bits - 1))) - dtype.type(1)
    return np.where(count >= bits, ~dtype.type(0), some)


@handles("bfe")
def _extract(d: Decoder, ins: Instruction) -> Run:
    kind, bits = ins.type, 8 * TYPE_BYTES[ins.type]
    wide = np.dtype(f"u{bits // 8}")

    def extract(a, position, length):
        position, length = (np.minimum(x & np.uint32(0xFF), bits).astype(wide) for x in (position, length))
        raw, top = a.view(wide), wide.type(bits - 1)
        ones = _ones(np.minimum(length, wide.type(bits) - position), wide)
        value = (raw >> np.minimum(position, top)) & ones
        if kind[0] == "s":
            sign = (raw >> np.minimum(position + length - wide.type(1), top)) & wide.type(1)
            value = np.where((length > 0) & (sign == 1), value | ~ones, value)
        return value.view(a.dtype)

    return computed(d, ins, extract, kind, "u32", "u32")


@handles("bfi")
def _insert(d: Decoder, ins: Instruction) -> Run:
    bits = 8 * TYPE_BYTES[ins.type]

    def insert(a, b, position, length):
        kind = a.dtype.type
        position, length = (np.minimum(x & np.uint32(0xFF), bits).astype(a.dtype) for x in (position, length))
        ones = _ones(length, a.dtype)
        field = np.where(position >= bits, kind(0), ones << np.minimum(position, kind(bits - 1)))
        return (b & ~field) | ((a << np.minimum(position, kind(bits - 1))) & field)

    return computed(d, ins, insert, ins.type, ins.type, "u32", "u32")


def _leading_zeros(a: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    count = np.full(a.shape, bits, np.uint32)
    for bit in range(bits):
        count[(a >> a.dtype.type(bit)) & a.dtype.type(1) == 1] = bits - 1 - bit
    return count


@handles("clz")
def _clz(d: Decoder, ins: Instruction) -> Run:
    return computed(d, ins, _leading_zeros, ins.type, result="u32")


@handles("bfind")
def _bfind(d: Decoder, ins: Instruction) -> Run:
    bits = 8 * TYPE_BYTES[ins.type]
    shift_amount = ins.has("shiftamt")

    def find(a):
        raw = np.where(a < 0, ~a, a).view(f"u{bits // 8}")
        zeros = _leading_zeros(raw)
        value = zeros if shift_amount else np.uint32(bits - 1) - zeros
        return np.where(raw == 0, np.uint32(0xFFFFFFFF), value)

    return computed(d, ins, find, ins.type, result="u32")


@handles("popc")
def _popc(d: Decoder, ins: Instruction) -> Run:
    return computed(d, ins, np.bitwise_count, ins.type, result="u32")


@handles("brev")
def _reverse(d: Decoder, ins: Instruction) -> Run:
    bits = 8 * TYPE_BYTES[ins.type]

    def reverse(a):
        value = np.zeros_like(a)
        for bit in range(bits):
            value |= ((a >> a.dtype.type(bit)) & a.dtype.type(1)) << a.dtype.type(bits - 1 - bit)
        return value

    return computed(d, ins, reverse, ins.type)


# Comparison and selection

_SIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_OPPOSITE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}


def _comparison(ins: Instruction) -> Callable:
    name, floats = ins.modifiers[0], ins.type in _FLOAT
    if not floats:
        return _ORDERED[_SIGNED_NAMES.get(name, name)]
    if name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if name in _ORDERED:
        return _ORDERED[name]
    if name == "neu":
        return np.not_equal
    if name in _OPPOSITE:
        opposite = _comparison_by_name(_OPPOSITE[name])
        return lambda a, b: ~opposite(a, b)
    if name in ("num", "nan"):
        wanted = name == "nan"
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == wanted
    raise unsupported(ins)


def _comparison_by_name(name: str) -> Callable:
    if name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _ORDERED[name]


_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@handles("setp")
def _setp(d: Decoder, ins: Instruction) -> Run:
    kind = ins.type
    compare = _comparison(ins)
    if kind in PAIRS:
        raise unsupported(ins)
    if kind == "bf16":
        plain = compare
        compare = lambda a, b: plain(bf16_to_f64(a), bf16_to_f64(b))  # noqa: E731
    combine = ins.one_of("and", "or", "xor")
    target = ins.operands[0]
    first = target.first if isinstance(target, Pair) else target
    if combine is None and not isinstance(target, Pair) and isinstance(compare, np.ufunc):
        plain_ins = Instruction(ins.text, ins.opcode, ["pred"], [first, *ins.operands[1:]], None, False, ins.index)
        return elementwise(d, plain_ins, compare, kind, kind)
    out = d.write(first, "pred")
    second = d.write(target.second, "pred") if isinstance(target, Pair) else None
    a, b = d.read(ins.operands[1], kind), d.read(ins.operands[2], kind)
    other, negated = d.predicate(ins.operands[3]) if combine else (0, False)

    def run(m) -> None:
        holds = compare(m.r[a], m.r[b])
        fails = ~holds
        if combine:
            with_ = ~m.r[other] if negated else m.r[other]
            holds, fails = _COMBINE[combine](holds, with_), _COMBINE[combine](fails, with_)
        put(m, out, holds)
        if second is not None:
            put(m, second, fails)

    return run


@handles("set")
def _set(d: Decoder, ins: Instruction) -> Run:
    result, kind = ins.modifiers[-2], ins.type
    if ins.one_of("and", "or", "xor") or result in PAIRS:
        raise unsupported(ins)
    compare = _comparison(ins)
    true = np.float32(1) if result == "f32" else np.uint32(0xFFFFFFFF)
    out = "f32" if result == "f32" else "u32"
    return computed(d, ins, lambda a, b: np.where(compare(a, b), true, type(true)(0)), kind, kind, result=out)


@handles("selp")
def _selp(d: Decoder, ins: Instruction) -> Run:
    out = d.write(ins.operands[0], ins.type)
    a, b = d.read(ins.operands[1], ins.type), d.read(ins.operands[2], ins.type)
    condition, negated = d.predicate(ins.operands[3])
    if negated:
        a, b = b, a

    def run(m) -> None:
        put(m, out, np.where(m.r[condition], m.r[a], m.r[b]))

    return run


@handles("slct")
def _slct(d: Decoder, ins: Instruction) -> Run:
    kind, by = ins.modifiers[-2], ins.type
    return computed(d, ins, lambda a, b, c: np.where(c >= 0, a, b), kind, kind, by, result=kind)


@handles("testp")
def _testp(d: Decoder, ins: Instruction) -> Run:
    test = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x)}
    return computed(d, ins, test[ins.modifiers[0]], ins.type, result="pred")


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
