"""cvt: between integers, floats, half, bfloat16, tf32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Decoder, Run, handles, put, unsupported
from .elementwise import flush
from .formats import bf16_to_f64, directed, f32_to_bf16, f32_to_tf32, f64_to_bf16
from .parser import TYPE_BYTES, Instruction, Register, Symbol
from .registers import NUMPY

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOATS = ("f16", "bf16", "f32", "f64")


@handles("cvt")
def _convert(d: Decoder, ins: Instruction) -> Run:
    result, source = ins.modifiers[-2:]
    if result in ("f16x2", "bf16x2"):
        return _pack(d, ins, result)
    function = _function(ins, result, source)
    if result in _FLOATS or result == "tf32":
        out = d.write(ins.operands[0], result)
    else:
        # A narrow integer into a wide register is extended by its own sign.
        out = d.write(ins.operands[0], _extended(ins.operands[0], result))
    slot = d.read(ins.operands[1], source)

    def run(m) -> None:
        put(m, out, function(m.r[slot]))

    return run


def _extended(operand, type_: str) -> str:
    if isinstance(operand, Register) and TYPE_BYTES[operand.type] > TYPE_BYTES[type_]:
        return f"{type_[0]}{8 * TYPE_BYTES[operand.type]}"
    if operand == Symbol("_"):
        return type_
    return type_


def _function(ins: Instruction, result: str, source: str) -> Callable[[np.ndarray], np.ndarray]:
    rounding = ins.one_of("rn", "rz", "rm", "rp", "rna", *_TO_INTEGER)
    if result == "tf32":
        if rounding != "rna":
            raise unsupported(ins, "rounding")
        return lambda x: f32_to_tf32(x)
    if source in _FLOATS and result in _FLOATS:
        return _float_to_float(ins, result, source, rounding)
    if source in _FLOATS:
        return _float_to_integer(result, source, rounding or "", ins.has("ftz"))
    if result in _FLOATS:
        return _integer_to_float(ins, result, rounding)
    if ins.has("sat"):
        low, high = np.iinfo(NUMPY[result]).min, np.iinfo(NUMPY[result]).max
        return lambda x: np.clip(x, max(low, np.iinfo(x.dtype).min), min(high, np.iinfo(x.dtype).max)).astype(
            NUMPY[result]
        )
    return lambda x: x.astype(NUMPY[result])


def _widen(x: np.ndarray, source: str) -> np.ndarray:
    return bf16_to_f64(x) if source == "bf16" else x.astype(np.float64)


def _narrow(x: np.ndarray, result: str) -> np.ndarray:
    if result == "bf16":
        return f64_to_bf16(x)
    return x.astype(NUMPY[result])


def _toward_zero(x: np.ndarray, result: str) -> np.ndarray:
    if result != "bf16":
        return directed(x, "rz", NUMPY[result].type)
    single = directed(x, "rz", np.float32)
    cut = (single.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FFF), cut)


def _float_to_float(ins: Instruction, result: str, source: str, rounding: str | None) -> Callable:
    relu, sat, ftz = ins.has("relu"), ins.has("sat"), ins.has("ftz")
    if rounding in ("rm", "rp"):
        raise unsupported(ins, "rounding")
    whole = _TO_INTEGER.get(rounding or "")

    def convert(x: np.ndarray) -> np.ndarray:
        if ftz and source == "f32":
            x = flush(x)
        wide = _widen(x, source)
        if whole:
            wide = whole(wide)
        if relu:
            wide = np.where(wide > 0, wide, np.where(np.isnan(wide), wide, 0.0))
        if sat:
            wide = np.where(np.isnan(wide), 0.0, np.clip(wide, 0.0, 1.0))
        value = _toward_zero(wide, result) if rounding == "rz" else _narrow(wide, result)
        if result == "f16":
            value = np.where(np.isnan(value), np.uint16(0x7FFF), value.view(np.uint16)).view(np.float16)
        return flush(value) if ftz and result == "f32" else value

    if (source, result, relu, sat, rounding) == ("f32", "bf16", False, False, "rn"):
        return f32_to_bf16
    if (source, result) == ("f16", "f32") and not (relu or sat or ftz or whole):
        return lambda x: x.astype(np.float32)
    return convert


def _float_to_integer(result: str, source: str, rounding: str, ftz: bool) -> Callable:
    """Out of range goes to the nearest end; NaN to 0, as 64 bits or from f64 to the top bit alone."""
    dtype = NUMPY[result]
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    whole = _TO_INTEGER[rounding]
    # The ends as float64: 2^63 - 1 and 2^64 - 1 have none, so that the comparison is with one past the end.
    past = float(high) + (1.0 if float(high) == high else 0.0)
    nan = (
        dtype.type(0)
        if (dtype.itemsize < 8 and source != "f64") or dtype.itemsize < 4
        else np.array(1 << (8 * dtype.itemsize - 1), f"u{dtype.itemsize}").view(dtype)[()]
    )

    def convert(x: np.ndarray) -> np.ndarray:
        value = whole(_widen(flush(x) if ftz and source == "f32" else x, source))
        inside = (value >= low) & (value < past)
        integer = np.where(inside, value, 0).astype(dtype)
        integer = np.where(value < low, dtype.type(low), np.where(value >= past, dtype.type(high), integer))
        return np.where(np.isnan(value), nan, integer)

    return convert


def _integer_to_float(ins: Instruction, result: str, rounding: str | None) -> Callable:
    if rounding not in ("rn", "rz"):
        raise unsupported(ins, "rounding")
    source = NUMPY[ins.type]
    if result == "f32" and rounding == "rn":
        return lambda x: x.astype(np.float32)
    if (source.itemsize == 8 and result != "f64") or (result == "f64" and rounding == "rz" and source.itemsize == 8):
        if rounding == "rz":
            raise unsupported(ins, "rounding")
        # Through float64 the value would be rounded twice; float32's own conversion is direct.
        return lambda x: _narrow(x.astype(np.float64), result)
    narrow = _toward_zero if rounding == "rz" else _narrow
    return lambda x: narrow(x.astype(np.float64), result)


def _pack(d: Decoder, ins: Instruction, result: str) -> Run:
    """cvt.rn.bf16x2.f32 d, high, low."""
    if ins.type != "f32":
        raise unsupported(ins)
    single = result.removesuffix("x2")
    out = d.write(ins.operands[0], "b32")
    high, low = d.read(ins.operands[1], "f32"), d.read(ins.operands[2], "f32")
    rounding = ins.one_of("rn", "rz", "rm", "rp")
    one = _float_to_float(ins, single, "f32", rounding)

    def run(m) -> None:
        upper, lower = (one(m.r[s]).view(np.uint16).astype(np.uint32) for s in (high, low))
        put(m, out, (upper << np.uint32(16)) | lower)

    return run
