"""Instructions that a warp executes as one: shuffles, votes, ldmatrix, mma."""

from __future__ import annotations

import numpy as np

from .control import RESELECT, bits, together
from .decode import Decoder, Run, handles, put, unsupported
from .formats import bf16_to_f64
from .parser import Instruction, Pair

LANE = np.arange(32)


@handles("shfl")
def _shuffle(d: Decoder, ins: Instruction) -> Run:
    mode = ins.one_of("up", "down", "bfly", "idx")
    target = ins.operands[0]
    out = d.write(target.first if isinstance(target, Pair) else target, "b32")
    valid = d.write(target.second, "pred") if isinstance(target, Pair) else None
    source, by, clamp, members = (d.read(operand, "b32") for operand in ins.operands[1:5])

    def run(m) -> int | None:
        if not together(m, ins, m.r[members]):
            return RESELECT
        lane = np.tile(LANE, m.slice.warps)
        amount, c = m.r[by].astype(np.int64) & 31, m.r[clamp].astype(np.int64)
        segment, bound = (c >> 8) & 31, c & 31
        lowest = lane & segment
        highest = lowest | (bound & ~segment)
        if mode == "up":
            other = lane - amount
            inside = other >= highest
        elif mode == "idx":
            other = lowest | (amount & ~segment)
            inside = other <= highest
        else:
            other = lane + amount if mode == "down" else lane ^ amount
            inside = other <= highest
        other = np.where(inside, other, lane)
        if m.mask is not None:
            heard = np.take_along_axis(m.mask.reshape(-1, 32), other.reshape(-1, 32), axis=1).reshape(-1)
            deaf = m.mask & ~heard
            if deaf.any():
                m.report(
                    "divergence", ins, "shuffle from a thread that does not take part", int(np.argmax(m.pick(deaf)))
                )
        values = np.broadcast_to(m.r[source], (m.slice.size,)).reshape(-1, 32)
        put(m, out, np.take_along_axis(values, other.reshape(-1, 32), axis=1).reshape(-1))
        if valid is not None:
            put(m, valid, inside)
        return None

    return run


def _voting(m, slot: int, negated: bool) -> tuple[np.ndarray, np.ndarray]:
    """Per warp: the predicate where it is executed, and where that is."""
    value = np.broadcast_to(m.r[slot], (m.slice.size,))
    executing = np.ones(m.slice.size, bool) if m.mask is None else m.mask
    return (value != negated).reshape(-1, 32), executing.reshape(-1, 32)


@handles("vote")
def _vote(d: Decoder, ins: Instruction) -> Run:
    mode = ins.one_of("all", "any", "uni", "ballot")
    out = d.write(ins.operands[0], "b32" if mode == "ballot" else "pred")
    slot, negated = d.predicate(ins.operands[1])
    members = d.read(ins.operands[2], "b32")

    def run(m) -> int | None:
        if not together(m, ins, m.r[members]):
            return RESELECT
        value, executing = _voting(m, slot, negated)
        every, some = (value | ~executing).all(axis=1), (value & executing).any(axis=1)
        votes = {"all": every, "any": some, "uni": every | ~some}
        result = bits(value & executing) if mode == "ballot" else votes[str(mode)]
        put(m, out, np.repeat(result, 32))
        return None

    return run


@handles("activemask")
def _active_mask(d: Decoder, ins: Instruction) -> Run:
    out = d.write(ins.operands[0], "b32")

    def run(m) -> None:
        executing = np.ones(m.slice.size, bool) if m.mask is None else m.mask
        put(m, out, np.repeat(bits(executing.reshape(-1, 32)), 32))

    return run


@handles("match")
def _match(d: Decoder, ins: Instruction) -> Run:
    if not ins.has("any"):
        raise unsupported(ins)
    out, slot = d.write(ins.operands[0], "b32"), d.read(ins.operands[1], ins.type)
    members = d.read(ins.operands[2], "b32")

    def run(m) -> int | None:
        if not together(m, ins, m.r[members]):
            return RESELECT
        values = np.broadcast_to(m.r[slot], (m.slice.size,)).reshape(-1, 32)
        executing = (np.ones(m.slice.size, bool) if m.mask is None else m.mask).reshape(-1, 32)
        same = (values[:, :, None] == values[:, None, :]) & executing[:, None, :]
        put(m, out, bits(same.reshape(-1, 32)))
        return None

    return run


_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@handles("redux")
def _redux(d: Decoder, ins: Instruction) -> Run:
    ufunc = _REDUCTIONS[str(ins.one_of(*_REDUCTIONS))]
    out, slot, members = (
        d.write(ins.operands[0], ins.type),
        d.read(ins.operands[1], ins.type),
        d.read(ins.operands[2], "b32"),
    )

    def run(m) -> int | None:
        if not together(m, ins, m.r[members]):
            return RESELECT
        values = np.broadcast_to(m.r[slot], (m.slice.size,)).reshape(-1, 32)
        executing = True if m.mask is None else m.mask.reshape(-1, 32)
        if ufunc in (np.minimum, np.maximum):
            limits = np.iinfo(values.dtype)
            neutral = limits.max if ufunc is np.minimum else limits.min
        else:
            neutral = -1 if ufunc is np.bitwise_and and values.dtype.kind == "i" else 0
            if ufunc is np.bitwise_and and values.dtype.kind == "u":
                neutral = np.iinfo(values.dtype).max
        reduced = ufunc.reduce(values, axis=1, dtype=values.dtype, where=executing, initial=values.dtype.type(neutral))
        put(m, out, np.repeat(reduced, 32))
        return None

    return run


@handles("ldmatrix")
def _load_matrix(d: Decoder, ins: Instruction) -> Run:
    count = {"x1": 1, "x2": 2, "x4": 4}[str(ins.one_of("x1", "x2", "x4"))]
    if not (ins.has("m8n8") and ins.type == "b16"):
        raise unsupported(ins)
    outs = [d.write(target, "b32") for target in d.items(ins.operands[0])]
    addresses = d.address(ins.operands[1])
    transposed = ins.has("trans")
    rows = 8 * count

    def run(m) -> int | None:
        if not together(m, ins):
            return RESELECT
        where = addresses(m)
        # Only the first 8 lanes per matrix give addresses.
        outer = m.mask
        giving = np.tile(rows > LANE, m.slice.warps)
        m.mask = giving if outer is None else giving & outer
        if m.mask.all():
            m.mask = None
        where = where if rows == 32 else where[giving if outer is None else giving[outer]]
        m.metrics.shared_request(m, ins, where, 16)
        values = m.unit.read_shared(ins, where, 16)
        m.mask = outer
        matrices = np.ascontiguousarray(values).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for i, out in enumerate(outs):
            value = words[:, i].reshape(-1)
            if outer is None:
                m.r[out][...] = value
            else:
                m.r[out][outer] = value
        return None

    return run


@handles("stmatrix")
def _store_matrix(d: Decoder, ins: Instruction) -> Run:
    count = {"x1": 1, "x2": 2, "x4": 4}[str(ins.one_of("x1", "x2", "x4"))]
    if not (ins.has("m8n8") and ins.type == "b16"):
        raise unsupported(ins)
    addresses = d.address(ins.operands[0])
    sources = [d.read(source, "b32") for source in d.items(ins.operands[1])]
    transposed = ins.has("trans")

    def run(m) -> int | None:
        if not together(m, ins):
            return RESELECT
        where = addresses(m)
        words = np.stack([m.pick(np.broadcast_to(m.r[s], (m.slice.size,))).reshape(-1, 32) for s in sources], axis=1)
        matrices = words.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        # Only the first 8 lanes per matrix give addresses.
        giving = np.tile(8 * count > LANE, len(words))
        outer = m.mask
        m.narrow(giving)
        rows = np.ascontiguousarray(matrices).view(np.uint64).reshape(-1, 2)
        m.metrics.shared_request(m, ins, where[giving], 16)
        m.unit.write_shared(ins, where[giving], 16, rows)
        m.mask = outer
        return None

    return run


class _Fragments:
    """Where the lanes of a warp hold the elements of an m x n x k product: row and column by register and lane."""

    def __init__(self, k: int, element_bytes: int):
        group, thread = LANE >> 2, LANE & 3
        per_word = 4 // element_bytes
        part = np.arange(per_word)
        half = k // 2  # of k, per pair of registers of A
        registers = np.arange(2 * half // (4 * per_word) * 2)  # A: rows and rows + 8 alternate
        along = thread[:, None] * per_word + part
        a_rows = group[None, :, None] + 8 * (registers & 1)[:, None, None] + 0 * part
        a_columns = along[None] + (4 * per_word) * (registers >> 1)[:, None, None]
        self.a_index = a_rows * k + a_columns
        registers = np.arange(k // (4 * per_word))
        b_rows = along[None] + (4 * per_word) * registers[:, None, None]
        self.b_index = b_rows * 8 + group[None, :, None]
        registers = np.arange(4)
        self.c_index = (group + 8 * (registers >> 1)[:, None]) * 8 + 2 * thread + (registers & 1)[:, None]
        self.k = k


@handles("mma")
def _mma(d: Decoder, ins: Instruction) -> Run:
    kinds = ins.modifiers[-4:]  # d, a, b, c
    k = {"m16n8k16": 16, "m16n8k8": 8, "m16n8k4": 4}.get(str(ins.one_of("m16n8k16", "m16n8k8", "m16n8k4")))
    if (
        k is None
        or kinds[0] != "f32"
        or kinds[3] != "f32"
        or kinds[1] != kinds[2]
        or not (ins.has("row") and ins.has("col"))
    ):
        raise unsupported(ins)
    kind = kinds[1]
    if kind not in ("bf16", "f16", "tf32") or (kind == "tf32") != (k in (4, 8) and kind == "tf32"):
        raise unsupported(ins)
    fragments = _Fragments(k, 4 if kind == "tf32" else 2)
    read = lambda operand: [d.read(item, "b32") for item in d.items(operand)]  # noqa: E731
    a, b = read(ins.operands[1]), read(ins.operands[2])
    outs = [d.write(item, "f32") for item in d.items(ins.operands[0])]
    if (len(a), len(b)) != (len(fragments.a_index), len(fragments.b_index)):
        raise unsupported(ins, "operand count")
    accumulators = [d.read(item, "f32") for item in d.items(ins.operands[3])]

    def matrix(m, slots: list[int], index: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        words = np.empty((m.slice.warps, len(slots), 32), np.uint32)
        for i, slot in enumerate(slots):
            words[:, i] = m.r[slot].reshape(-1, 32) if m.r[slot].shape[0] > 1 else m.r[slot]
        flat = np.empty((m.slice.warps, shape[0] * shape[1]))
        flat[:, index.reshape(-1)] = _elements(words, kind).reshape(m.slice.warps, -1)
        return flat.reshape(m.slice.warps, *shape)

    def run(m) -> int | None:
        if not together(m, ins):
            return RESELECT
        left = matrix(m, a, fragments.a_index, (16, k))
        right = matrix(m, b, fragments.b_index, (k, 8))
        product = np.matmul(left, right).reshape(m.slice.warps, -1)[:, fragments.c_index]
        for i, out in enumerate(outs):
            total = product[:, i].reshape(-1) + m.r[accumulators[i]]
            put(m, out, total.astype(np.float32))
        return None

    return run


def _elements(words: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tf32":  # the low bits of a word that was not rounded are ignored
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    halves = words.view(np.uint16)
    return bf16_to_f64(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float64)
