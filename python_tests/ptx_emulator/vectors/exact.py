"""Floating point by fractions: what an instruction must give, by other means than the emulator's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    bits: int
    mantissa: int  # stored bits of it

    @property
    def exponent_bits(self) -> int:
        return self.bits - 1 - self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.mantissa

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    def value(self, bits: int) -> Fraction | float:
        """A fraction, or a float for what is none: infinities, NaN and minus zero."""
        negative = bool(bits & self.sign)
        magnitude = bits & (self.sign - 1)
        if magnitude > self.infinity:
            return math.nan
        if magnitude == self.infinity:
            return -math.inf if negative else math.inf
        if magnitude == 0:
            return -0.0 if negative else Fraction(0)
        exponent, fraction = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        if exponent:
            fraction += 1 << self.mantissa
        value = Fraction(fraction) * Fraction(2) ** (max(exponent, 1) - self.bias - self.mantissa)
        return -value if negative else value

    def round(self, value: Fraction | float, rounding: str = "rn") -> int | str:
        """Bits of the nearest value (ties to even), or of the one that rz, rm, rp ask for; "nan" for any NaN."""
        if isinstance(value, float):
            if math.isnan(value):
                return "nan"
            sign = self.sign if math.copysign(1, value) < 0 else 0
            return sign | (self.infinity if math.isinf(value) else 0)
        negative = value < 0
        magnitude = abs(value)
        if magnitude == 0:
            return 0
        exponent = max(_floor_log2(magnitude), 1 - self.bias)
        scaled = magnitude / Fraction(2) ** (exponent - self.mantissa)
        whole = math.floor(scaled)
        rest = scaled - whole
        if rounding == "rn":
            up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
        elif rounding == "rna":
            up = rest >= Fraction(1, 2)
        else:
            up = rest > 0 and rounding == ("rm" if negative else "rp")
        whole += up
        bits = whole + ((exponent + self.bias - 1) << self.mantissa)  # a carry moves into the exponent by itself
        if bits >= self.infinity and rounding != "rn" and not up:
            bits = self.infinity - 1
        return (self.sign if negative else 0) | min(bits, self.infinity)


F16, BF16, F32, F64 = Format(16, 10), Format(16, 7), Format(32, 23), Format(64, 52)
TF32 = Format(19, 10)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def _floor_log2(value: Fraction) -> int:
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def number(value: Fraction | float) -> Fraction | float:
    """Minus zero as a fraction, for arithmetic; the rest as it is."""
    return Fraction(0) if value == 0 else value


def total(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    if isinstance(a, float) and isinstance(b, float) and a == b == 0:
        return -0.0  # both are minus zero
    x, y = number(a), number(b)
    return _or_float(x, y, lambda x, y: x + y)


def product(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    value = _or_float(number(a), number(b), lambda x, y: x * y)
    if value == 0 and (_negative(a) != _negative(b)):
        return -0.0
    return value


def quotient(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    if _is_nan(a) or _is_nan(b) or (b == 0 and a == 0) or (_is_infinite(a) and _is_infinite(b)):
        return math.nan
    sign = -1.0 if _negative(a) != _negative(b) else 1.0
    if b == 0 or _is_infinite(a):
        return sign * math.inf
    if a == 0 or _is_infinite(b):
        return -0.0 if sign < 0 else Fraction(0)
    return Fraction(a) / Fraction(b)


def square_root(a: Fraction | float, format_: Format) -> int | str:
    """Rounded to nearest: the root of a fraction has no fraction, so that it is found between neighbours."""
    if _is_nan(a) or (a != 0 and a < 0):
        return "nan"
    if a == 0 or _is_infinite(a):
        return format_.round(a)
    scale = 2 * (format_.mantissa + 200)
    root = Fraction(math.isqrt(math.floor(Fraction(a) * (1 << scale))), 1 << (scale // 2))
    exact = root * root == a
    return format_.round(root if exact else root + Fraction(1, 1 << (scale // 2 + 1)))


def _or_float(
    x: Fraction | float,
    y: Fraction | float,
    operation: Callable[[Fraction | float, Fraction | float], Fraction | float],
) -> Fraction | float:
    """Fractions where both are; else only what is infinite or NaN matters, for which signs stand in."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return operation(x, y)
    stand_in = [v if isinstance(v, float) else float((v > 0) - (v < 0)) for v in (x, y)]
    return operation(*stand_in)


def _negative(a: Fraction | float) -> bool:
    return math.copysign(1, a) < 0 if isinstance(a, float) else a < 0


def _is_nan(a: Fraction | float) -> bool:
    return isinstance(a, float) and math.isnan(a)


def _is_infinite(a: Fraction | float) -> bool:
    return isinstance(a, float) and math.isinf(a)
