"""Logic, shifts, fields of bits."""

from __future__ import annotations

import numpy as np

from .decode import Decoder, Run, handles, put, unsupported
from .elementwise import computed, elementwise
from .parser import TYPE_BYTES, Immediate, Instruction

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
