"""A vector: an instruction, operands and what must come out, as data that emulator and GPU are both held to."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from ..parser import TYPE_BYTES
from .exact import FORMATS

Rows = list[list[int]]
CASES = 24


@dataclass
class Vector:
    name: str
    body: str  # PTX: see micro.kernel
    inputs: list[str]
    outputs: list[str]
    relative: float | None  # error that is allowed; None: these very bits
    rows: list[list[str]]  # operands by thread, hexadecimal
    results: list[list[str]]  # "nan": any NaN; "skip": not specified
    confirmed_on_gpu: str | None = None  # the device that gave these results
    arch: str = "80"  # or "90a"

    @property
    def operands(self) -> np.ndarray:
        return np.array([[int(word, 16) for word in row] for row in self.rows], np.uint64).reshape(len(self.rows), -1)

    def mismatches(self, found: np.ndarray) -> list[str]:
        wrong = []
        for row, wanted_row, found_row in zip(self.rows, self.results, found.tolist(), strict=True):
            for type_, wanted, bits in zip(self.outputs, wanted_row, found_row, strict=True):
                if not self._agrees(type_, wanted, bits):
                    wrong.append(f"{self.name}: {', '.join(row)} gives {bits:x}, not {wanted}")
        return wrong

    def _agrees(self, type_: str, wanted: str, bits: int) -> bool:
        if wanted == "skip":
            return True
        if wanted == "nan":
            format_ = FORMATS[type_]
            return bits & (format_.sign - 1) > format_.infinity
        if self.relative is None:
            return bits == int(wanted, 16)
        value, exact = (FORMATS[type_].value(b) for b in (bits, int(wanted, 16)))
        return math.isfinite(value) and abs(value - exact) <= self.relative * abs(exact)

    def as_json(self) -> dict:
        entry = asdict(self)
        if self.arch == "80":
            del entry["arch"]
        return entry


def _hex(values: list) -> list[str]:
    return [value if isinstance(value, str) else f"{value:x}" for value in values]


@dataclass
class WarpSpec:
    name: str
    body: str
    inputs: list[str]
    outputs: list[str]
    rows: Rows
    results: Rows
    arch: str = "80"

    def vector(self) -> Vector:
        rows, results = [_hex(row) for row in self.rows], [_hex(row) for row in self.results]
        return Vector(self.name, self.body, self.inputs, self.outputs, None, rows, results, arch=self.arch)


@dataclass
class Spec:
    name: str
    body: str
    inputs: list[str]
    outputs: list[str]
    expected: Callable[..., list]
    relative: float | None = None
    span: tuple[float, float] | None = None  # of a float operand
    shift_operand: int | None = None  # kept near the width of a word
    field_operands: tuple[int, ...] = ()  # likewise
    avoid: Callable[..., bool] | None = None

    def vector(self) -> Vector:
        source = random.Random(zlib.crc32(self.name.encode()))
        rows: Rows = []
        while len(rows) < CASES:
            row = [self._operand(source, n, type_) for n, type_ in enumerate(self.inputs)]
            if not (self.avoid and self.avoid(*row)) and row not in rows:
                rows.append(row)
        results = [_hex(self.expected(*row)) for row in rows]
        return Vector(self.name, self.body, self.inputs, self.outputs, self.relative, [_hex(r) for r in rows], results)

    def _operand(self, source: random.Random, position: int, type_: str) -> int:
        if position == self.shift_operand or position in self.field_operands:
            return source.choice(
                [0, 1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, source.randrange(64), source.randrange(256)]
            )
        if self.span:
            format_ = FORMATS[type_]
            low, _ = self.span
            magnitudes = low > 0
            value = source.uniform(*(map(math.log, self.span) if magnitudes else self.span))
            return _nearest(format_, math.exp(value) if magnitudes else value)
        if type_.endswith("x2"):
            single = type_.removesuffix("x2")
            return self._operand(source, -1, single) | self._operand(source, -1, single) << 16
        bits = 8 * TYPE_BYTES[type_]
        if type_ in FORMATS:
            return _float_operand(source, type_)
        edges = [0, 1, 2, 3, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1, (1 << bits) - 2, 10, 0x55 << bits - 8]
        return source.choice([*edges, *(source.randrange(1 << bits) for _ in range(8)), source.randrange(256)])


def _nearest(format_, value: float) -> int:
    from fractions import Fraction

    bits = format_.round(Fraction(value))
    assert isinstance(bits, int)
    return bits


def _float_operand(source: random.Random, type_: str) -> int:
    format_ = FORMATS[type_]
    one = format_.bias << format_.mantissa
    edges = [0, format_.sign, one, one | format_.sign, format_.infinity, format_.infinity | format_.sign]
    edges += [format_.infinity + 1 | 1 << format_.mantissa - 1, format_.infinity - 1, 1, 1 << format_.mantissa, one + 1]
    near = [one + source.randrange(-20 << format_.mantissa, 20 << format_.mantissa) for _ in range(20)]
    near = [min(max(bits, 0), format_.infinity - 1) | source.choice((0, format_.sign)) for bits in near]
    halves = [_nearest(format_, source.randrange(-40, 40) / 2) for _ in range(6)]
    return source.choice([*edges, *near, *halves])
