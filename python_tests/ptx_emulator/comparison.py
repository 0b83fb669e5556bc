"""Comparison and selection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Decoder, Run, handles, put, unsupported
from .elementwise import FLOATS, computed, elementwise
from .formats import bf16_to_f64
from .parser import Instruction, Pair
from .registers import PAIRS

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
    name, floats = ins.modifiers[0], ins.type in FLOATS
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
