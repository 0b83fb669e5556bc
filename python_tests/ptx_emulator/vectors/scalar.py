"""Instructions of one thread and what they must give, by Python's integers and fractions."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial

from .exact import BF16, F16, F32, FORMATS, TF32, Format, product, quotient, square_root, total
from .vector import Spec

Bits = int


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def as_int(value: int, kind: str) -> int:
    bits = int(kind[1:])
    return signed(value, bits) if kind[0] == "s" else value & ((1 << bits) - 1)


def _divide(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _rem(a: int, b: int) -> int:
    return a - b * _divide(a, b)


def _high(a: int, b: int, bits: int) -> int:
    return (a * b) >> bits


def integers() -> Iterator[Spec]:
    def spec(opcode: str, kinds: list[str], function: Callable[..., int], result: str | None = None, **options) -> Spec:
        result = result or kinds[0]
        operands = ", ".join(f"%i{n}" for n in range(len(kinds)))

        def expected(*values: int) -> list[int]:
            given = [as_int(value, kind) for value, kind in zip(values, kinds, strict=True)]
            return [function(*given) & ((1 << int(result[1:])) - 1)]

        return Spec(opcode, f"{opcode} %o0, {operands};", kinds, [result], expected, **options)

    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        bits = int(kind[1:])
        two, wide = [kind, kind], f"{kind[0]}{2 * bits}"
        yield spec(f"add.{kind}", two, lambda a, b: a + b)
        yield spec(f"sub.{kind}", two, lambda a, b: a - b)
        yield spec(f"mul.lo.{kind}", two, lambda a, b: a * b)
        yield spec(f"mul.hi.{kind}", two, partial(_high, bits=bits))
        yield spec(f"mad.lo.{kind}", [kind] * 3, lambda a, b, c: a * b + c)
        yield spec(f"min.{kind}", two, min)
        yield spec(f"max.{kind}", two, max)
        yield spec(f"div.{kind}", two, _divide, avoid=lambda a, b: b == 0)
        yield spec(f"rem.{kind}", two, _rem, avoid=lambda a, b: b == 0)
        shift = partial(lambda a, n, bits: a >> min(n, bits), bits=bits)
        yield spec(f"shr.{kind}", [kind, "u32"], shift, shift_operand=1)
        if bits < 64:
            yield spec(f"mul.wide.{kind}", two, lambda a, b: a * b, wide)
            yield spec(f"mad.wide.{kind}", [kind, kind, wide], lambda a, b, c: a * b + c, wide)
        if kind[0] == "s":
            yield spec(f"neg.{kind}", [kind], lambda a: -a)
            yield spec(f"abs.{kind}", [kind], abs)
    for kind in ("s32", "u32"):
        yield spec(f"mad.hi.{kind}", [kind] * 3, lambda a, b, c: _high(a, b, 32) + c)
        yield spec(f"sad.{kind}", [kind, kind, "u32"], lambda a, b, c: abs(a - b) + c, "u32")
    for bits in (16, 32, 64):
        kind = f"b{bits}"
        yield spec(f"and.{kind}", [kind, kind], lambda a, b: a & b)
        yield spec(f"or.{kind}", [kind, kind], lambda a, b: a | b)
        yield spec(f"xor.{kind}", [kind, kind], lambda a, b: a ^ b)
        yield spec(f"not.{kind}", [kind], lambda a: ~a)
        yield spec(f"shl.{kind}", [kind, "u32"], lambda a, n: a << min(n, 64), shift_operand=1)
    yield from _bit_fields(spec)


def _bit_fields(spec: Callable[..., Spec]) -> Iterator[Spec]:
    def funnel(low: int, high: int, n: int, left: bool, clamp: bool) -> int:
        n = min(n, 32) if clamp else n & 31
        both = high << 32 | low
        return (both << n) >> 32 if left else both >> n

    for side in "lr":
        for mode in ("wrap", "clamp"):
            function = partial(funnel, left=side == "l", clamp=mode == "clamp")
            yield spec(f"shf.{side}.{mode}.b32", ["b32", "b32", "u32"], function, "b32", shift_operand=2)

    for table in (0x96, 0xE8, 0xC8, 0x1B, 0xF8):

        def lop3(a: int, b: int, c: int, table: int = table) -> list[int]:
            rows = (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1 for i in range(32))
            return [sum(bit << i for i, bit in enumerate(rows))]

        body = f"lop3.b32 %o0, %i0, %i1, %i2, {table:#x};"
        yield Spec(f"lop3.b32 {table:#x}", body, ["b32"] * 3, ["b32"], lop3)

    def permute(a: int, b: int, selector: int) -> int:
        source = (b << 32 | a).to_bytes(8, "little")
        chosen = []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = source[nibble & 7]
            chosen.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(chosen), "little")

    yield spec("prmt.b32", ["b32", "b32", "b32"], permute)

    for kind in ("u32", "s32", "u64", "s64"):
        bits = int(kind[1:])

        def extract(a: int, position: int, length: int, kind: str = kind, bits: int = bits) -> int:
            position, length = position & 255, length & 255
            raw = a & ((1 << bits) - 1)
            sign = 0
            if kind[0] == "s" and length:
                sign = raw >> min(position + length - 1, bits - 1) & 1
            value = 0
            for i in range(bits):
                bit = raw >> (i + position) & 1 if i < length and i + position < bits else sign
                value |= bit << i
            return value

        yield spec(f"bfe.{kind}", [kind, "u32", "u32"], extract, field_operands=(1, 2))

    for bits in (32, 64):

        def insert(a: int, b: int, position: int, length: int, bits: int = bits) -> int:
            position, length = position & 255, length & 255
            for i in range(min(length, max(bits - position, 0))):
                b = b & ~(1 << i + position) | (a >> i & 1) << i + position
            return b

        kind = f"b{bits}"
        yield spec(f"bfi.{kind}", [kind, kind, "u32", "u32"], insert, field_operands=(2, 3))
        yield spec(f"popc.{kind}", [kind], lambda a: a.bit_count(), "u32")
        yield spec(f"clz.{kind}", [kind], lambda a, bits=bits: bits - a.bit_length(), "u32")
        yield spec(f"brev.{kind}", [kind], lambda a, bits=bits: int(f"{a:0{bits}b}"[::-1], 2))
        find = lambda a: (a if a >= 0 else ~a).bit_length() - 1  # noqa: E731
        yield spec(f"bfind.u{bits}", [f"u{bits}"], find, "u32")
        yield spec(f"bfind.s{bits}", [f"s{bits}"], find, "u32")

    def dot(a: int, b: int, c: int) -> list[int]:
        left, right = (struct.unpack("4b", value.to_bytes(4, "little")) for value in (a, b))
        return [(sum(x * y for x, y in zip(left, right, strict=True)) + c) & 0xFFFFFFFF]

    yield Spec("dp4a.s32.s32", "dp4a.s32.s32 %o0, %i0, %i1, %i2;", ["b32", "b32", "b32"], ["b32"], dot)


def floats() -> Iterator[Spec]:
    def spec(opcode: str, kind: str, count: int, function: Callable[..., object], **options) -> Spec:
        """`function` takes fractions and gives bits or "nan"."""
        format_ = FORMATS[kind]
        operands = ", ".join(f"%i{n}" for n in range(count))

        def expected(*bits: int) -> list:
            return [function(*map(format_.value, bits))]

        return Spec(opcode, f"{opcode} %o0, {operands};", [kind] * count, [kind], expected, **options)

    for rounding in ("rn", "rz", "rm", "rp"):
        round_ = partial(F32.round, rounding=rounding)
        zero = _exact_zero(rounding)
        add, fma = partial(_add, round_, zero), partial(_fma, round_, zero)
        yield spec(f"add.{rounding}.f32", "f32", 2, add)
        yield spec(f"sub.{rounding}.f32", "f32", 2, lambda a, b, add=add: add(a, product(b, Fraction(-1))))
        yield spec(f"mul.{rounding}.f32", "f32", 2, lambda a, b, r=round_: r(product(a, b)))
        yield spec(f"fma.{rounding}.f32", "f32", 3, fma)
    yield spec("div.rn.f32", "f32", 2, lambda a, b: F32.round(quotient(a, b)))
    yield spec("rcp.rn.f32", "f32", 1, lambda a: F32.round(quotient(Fraction(1), a)))
    yield spec("sqrt.rn.f32", "f32", 1, lambda a: square_root(a, F32))
    yield spec("fma.rn.f16", "f16", 3, partial(_fma, F16.round, 0))
    yield spec("add.rn.f16", "f16", 2, partial(_add, F16.round, 0))
    yield spec("mul.rn.f16", "f16", 2, lambda a, b: F16.round(product(a, b)))
    yield spec("fma.rn.bf16", "bf16", 3, partial(_fma, BF16.round, 0))
    for kind in ("f32", "f16", "bf16"):
        for opcode in ("min", "max"):
            for nan in ("", ".NaN"):
                pick = partial(_extreme, FORMATS[kind], opcode, bool(nan))
                operands = [kind, kind]
                yield Spec(f"{opcode}{nan}.{kind}", f"{opcode}{nan}.{kind} %o0, %i0, %i1;", operands, [kind], pick)
    yield from _pairs()
    yield from _comparisons()
    yield from _approximations()


def _exact_zero(rounding: str) -> int:
    """The bits of a sum of opposites."""
    return F32.sign if rounding == "rm" else 0


def _add(round_: Callable, zero: int, a, b):
    value = total(a, b)
    if value == 0 and isinstance(value, Fraction) and (a != 0 or isinstance(a, float) or isinstance(b, float)):
        return zero
    return round_(value)


def _fma(round_: Callable, zero: int, a, b, c):
    return _add(round_, zero, product(a, b), c)


def _extreme(format_: Format, opcode: str, keep_nan: bool, a: Bits, b: Bits) -> list:
    x, y = format_.value(a), format_.value(b)
    nans = [isinstance(v, float) and math.isnan(v) for v in (x, y)]
    if all(nans) or (keep_nan and any(nans)):
        return ["nan"]
    if any(nans):
        return [b if nans[0] else a]
    key = {a: (x, not a & format_.sign), b: (y, not b & format_.sign)}  # minus zero is below zero
    return [(min if opcode == "min" else max)((a, b), key=lambda bits: key[bits])]


def _pairs() -> Iterator[Spec]:
    for kind, format_ in (("f16x2", F16), ("bf16x2", BF16)):

        def expected(a: Bits, b: Bits, c: Bits, format_: Format = format_) -> list:
            halves = []
            for shift in (0, 16):
                x, y, z = (format_.value(v >> shift & 0xFFFF) for v in (a, b, c))
                half = _fma(format_.round, 0, x, y, z)
                if half == "nan":
                    return ["skip"]
                halves.append(half)
            return [halves[0] | halves[1] << 16]

        yield Spec(f"fma.rn.{kind}", f"fma.rn.{kind} %o0, %i0, %i1, %i2;", [kind] * 3, [kind], expected)


def _comparisons() -> Iterator[Spec]:
    import operator

    ordered = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge"}
    for kind in ("s32", "u32", "s64", "u64"):
        for name in ordered:
            compare = getattr(operator, name)
            body = f"setp.{name}.{kind} %p0, %i0, %i1; selp.u32 %o0, 1, 0, %p0;"
            function = lambda a, b, k=kind, c=compare: [int(c(as_int(a, k), as_int(b, k)))]  # noqa: E731
            yield Spec(f"setp.{name}.{kind}", body, [kind, kind], ["u32"], function)
    for name in (*ordered, *(f"{n}u" for n in ordered), "num", "nan"):

        def expected(a: Bits, b: Bits, name: str = name) -> list[int]:
            x, y = F32.value(a), F32.value(b)
            unordered = any(isinstance(v, float) and math.isnan(v) for v in (x, y))
            if name in ("num", "nan"):
                return [int(unordered == (name == "nan"))]
            if unordered:
                return [int(name not in ordered)]
            return [int(getattr(operator, name[:2])(x, y))]

        body = f"setp.{name}.f32 %p0, %i0, %i1; selp.u32 %o0, 1, 0, %p0;"
        yield Spec(f"setp.{name}.f32", body, ["f32", "f32"], ["u32"], expected)


def _approximations() -> Iterator[Spec]:
    """Those that the device only approximates, with the error that the manual allows."""

    def spec(opcode: str, function: Callable[[float], float], low: float, high: float, relative: float) -> Spec:
        def expected(bits: Bits) -> list:
            value = F32.value(bits)
            return [F32.round(Fraction(function(float(value))))]

        body = f"{opcode} %o0, %i0;"
        return Spec(opcode, body, ["f32"], ["f32"], expected, relative=relative, span=(low, high))

    yield spec("ex2.approx.f32", lambda x: 2.0**x, -120, 120, 2.0**-22)
    yield spec("ex2.approx.ftz.f32", lambda x: 2.0**x, -120, 120, 2.0**-22)
    yield spec("lg2.approx.f32", math.log2, 2.5, 1e30, 2.0**-21)
    yield spec("rcp.approx.f32", lambda x: 1 / x, 1e-30, 1e30, 2.0**-23)
    yield spec("rcp.approx.ftz.f32", lambda x: 1 / x, 1e-30, 1e30, 2.0**-23)
    yield spec("rsqrt.approx.f32", lambda x: 1 / math.sqrt(x), 1e-30, 1e30, 2.0**-22.4)
    yield spec("sqrt.approx.f32", math.sqrt, 1e-30, 1e30, 2.0**-22)
    yield spec("tanh.approx.f32", math.tanh, -8, 8, 2.0**-10.9)


def conversions() -> Iterator[Spec]:
    for rounding, source, result in (
        ("rn", "f32", "f16"),
        ("rz", "f32", "f16"),
        ("rn", "f32", "bf16"),
        ("rz", "f32", "bf16"),
        ("", "f16", "f32"),
        ("", "f32", "f64"),
        ("rn", "f64", "f32"),
        ("rz", "f64", "f32"),
    ):
        opcode = f"cvt.{rounding}.{result}.{source}".replace("..", ".")

        def expected(bits: Bits, s: str = source, r: str = result, rounding: str = rounding or "rn") -> list:
            return [FORMATS[r].round(FORMATS[s].value(bits), rounding)]

        yield Spec(opcode, f"{opcode} %o0, %i0;", [source], [result], expected)
    for pair, format_ in (("f16x2", F16), ("bf16x2", BF16)):

        def packed(high: Bits, low: Bits, format_: Format = format_) -> list:
            halves = [format_.round(F32.value(bits)) for bits in (low, high)]
            return ["skip"] if "nan" in halves else [halves[0] | halves[1] << 16]

        opcode = f"cvt.rn.{pair}.f32"
        yield Spec(opcode, f"{opcode} %o0, %i0, %i1;", ["f32", "f32"], [pair], packed)

    def tf32(bits: Bits) -> list:
        value = F32.value(bits)
        if isinstance(value, float) and not math.isfinite(value):
            return ["skip"]
        rounded = TF32.round(value, "rna")
        assert isinstance(rounded, int)
        return ["skip"] if rounded & 0x3FFFF == TF32.infinity else [rounded << 13]

    yield Spec("cvt.rna.tf32.f32", "cvt.rna.tf32.f32 %o0, %i0;", ["f32"], ["b32"], tf32)
    yield from _to_integers()
    for source in ("s32", "u32", "s64", "u64"):

        def to_float(bits: Bits, s: str = source) -> list:
            return [F32.round(Fraction(as_int(bits, s)))]

        yield Spec(f"cvt.rn.f32.{source}", f"cvt.rn.f32.{source} %o0, %i0;", [source], ["f32"], to_float)
    yield from _between_integers()


def _to_integers() -> Iterator[Spec]:
    ways = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for way, function in ways.items():
        for kind in ("s32", "u32", "s64"):

            def expected(bits: Bits, kind: str = kind, function: Callable = function) -> list:
                value = F32.value(bits)
                width = int(kind[1:])
                low, high = (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)
                if isinstance(value, float) and math.isnan(value):
                    return [0 if width == 32 else 1 << 63]
                if isinstance(value, float) and math.isinf(value):
                    return [(high if value > 0 else low) & ((1 << width) - 1)]
                return [min(max(function(value), low), high) & ((1 << width) - 1)]

            opcode = f"cvt.{way}.{kind}.f32"
            yield Spec(opcode, f"{opcode} %o0, %i0;", ["f32"], [kind], expected)

        def whole(bits: Bits, function: Callable = function) -> list:
            value = F32.value(bits)
            if isinstance(value, float):
                return [F32.round(value)]
            result = F32.round(Fraction(function(value)))
            return [F32.sign | 0 if result == 0 and value < 0 else result]

        yield Spec(f"cvt.{way}.f32.f32", f"cvt.{way}.f32.f32 %o0, %i0;", ["f32"], ["f32"], whole)


def _between_integers() -> Iterator[Spec]:
    for source, result in (
        ("s8", "s32"),
        ("u8", "u32"),
        ("s16", "s32"),
        ("s32", "s64"),
        ("u32", "u64"),
        ("u64", "u32"),
    ):
        register = "b16" if source[1:] == "8" else f"b{source[1:]}"

        def extended(bits: Bits, source: str = source, result: str = result) -> list:
            return [as_int(bits, source) & ((1 << int(result[1:])) - 1)]

        opcode = f"cvt.{result}.{source}"
        yield Spec(opcode, f"{opcode} %o0, %i0;", [register], [result], extended)

    def saturated(bits: Bits) -> list:
        return [min(max(as_int(bits, "s32"), -128), 127) & 0xFFFFFFFF]

    yield Spec("cvt.sat.s8.s32", "cvt.sat.s8.s32 %o0, %i0;", ["s32"], ["b32"], saturated)
