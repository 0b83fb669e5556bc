"""Moving data: mov, cvta, ld, st, atomics, cp.async."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .decode import Decoder, Run, handles, put, put_executing, resolve, unsupported
from .hopper import bulk_instruction
from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from .parser import (
    TYPE_BYTES,
    Address,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Register,
    Symbol,
    UnsupportedPtx,
    Vector,
)
from .registers import NUMPY

_SPACES = ("global", "shared", "local", "param", "const")
_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW, "global": 0, "const": 0}


def _space(ins: Instruction) -> str:
    for modifier in ins.modifiers:
        space = modifier.split("::")[0]
        if space in _SPACES:
            return space
    return "generic"


@handles("mov")
def _move(d: Decoder, ins: Instruction) -> Run:
    target, source = ins.operands
    if isinstance(target, Vector):
        return _unpack(d, ins, target.items, source)
    if isinstance(source, Vector):
        return _pack(d, ins, target, source.items)
    kind = ins.type
    if kind != "pred":
        kind = "b" + kind.lstrip("busf") if kind not in NUMPY else f"b{8 * TYPE_BYTES[kind]}"
    out, slot = d.write(target, kind), d.read(source, kind)

    def run(m) -> None:
        if m.mask is None:
            m.r[out][...] = m.r[slot]
        else:
            put(m, out, m.r[slot])

    return run


def _unpack(d: Decoder, ins: Instruction, targets: tuple[Operand, ...], source: Operand) -> Run:
    total = TYPE_BYTES[ins.type]
    part = total // len(targets)
    slot = d.read(source, f"b{8 * total}")
    outs = [
        (d.write(t, f"b{8 * part}"), np.array([8 * part * i], f"u{total}"))
        for i, t in enumerate(targets)
        if t != Symbol("_")
    ]

    def run(m) -> None:
        whole = m.r[slot].copy()
        for out, shift in outs:
            put(m, out, (whole >> shift).astype(f"u{part}"))

    return run


def _pack(d: Decoder, ins: Instruction, target: Operand, sources: tuple[Operand, ...]) -> Run:
    total = TYPE_BYTES[ins.type]
    part = total // len(sources)
    out = d.write(target, f"b{8 * total}")
    slots = [(d.read(s, f"b{8 * part}"), np.array([8 * part * i], f"u{total}")) for i, s in enumerate(sources)]

    def run(m) -> None:
        value = np.zeros(1, f"u{total}")
        for slot, shift in slots:
            value = value | (m.r[slot].astype(f"u{total}") << shift)
        put(m, out, value)

    return run


@handles("cvta")
def _convert_address(d: Decoder, ins: Instruction) -> Run:
    kind = "b" + ins.type[1:]
    out, slot = d.write(ins.operands[0], kind), d.read(ins.operands[1], kind)
    window = np.uint64(_WINDOWS[_space(ins)])
    if ins.type != "u64":
        raise unsupported(ins)
    if ins.has("to"):
        return lambda m: put(m, out, m.r[slot] - window)
    return lambda m: put(m, out, m.r[slot] + window)


@handles("isspacep")
def _is_space(d: Decoder, ins: Instruction) -> Run:
    out, slot = d.write(ins.operands[0], "pred"), d.read(ins.operands[1], "b64")
    window = np.uint64(_WINDOWS[_space(ins)] >> 60)
    return lambda m: put(m, out, (m.r[slot] >> np.uint64(60)) == window)


# Loads and stores

_Addresses = Callable[..., np.ndarray]


def _local_index(m, ins: Instruction, addresses: np.ndarray, width: int) -> np.ndarray:
    addresses = addresses.astype(np.int64)
    if int(addresses.max()) + width > m.local.shape[1] or int(addresses.min()) < 0:
        lane = int(np.argmax((addresses + width > m.local.shape[1]) | (addresses < 0)))
        m.report("out of bounds", ins, f"local address {int(addresses[lane])} of {m.local.shape[1]}", lane)
        addresses = np.clip(addresses, 0, m.local.shape[1] - width)
    return addresses[:, None] + np.arange(width)


def _read(m, ins: Instruction, space: str, addresses: np.ndarray, width: int) -> np.ndarray:
    space, addresses = resolve(space, addresses)
    if space == "global":
        return m.unit.read_global(ins, addresses, width)
    if space == "shared":
        m.metrics.shared_request(m, ins, addresses, width)
        return m.unit.read_shared(ins, addresses, width)
    if space == "local":
        return np.ascontiguousarray(m.local[m.executing()[:, None], _local_index(m, ins, addresses, width)])
    index = addresses.astype(np.int64)[:, None] + np.arange(width)
    return np.ascontiguousarray(m.launch.parameters[index])


def _width(ins: Instruction, count: int) -> int:
    width = TYPE_BYTES[ins.type] * count
    if width > 16:
        raise unsupported(ins)
    return width


def _extended(operand: Operand, kind: str) -> str:
    """The type by which a loaded value enters its register, which may be wider."""
    if isinstance(operand, Register):
        return ("s" if kind[0] == "s" else "b") + str(8 * TYPE_BYTES[operand.type])
    return "b" + str(8 * TYPE_BYTES[kind])


@handles("ld", "ldu")
def _load(d: Decoder, ins: Instruction) -> Run:
    space, kind = _space(ins), ins.type
    targets = d.items(ins.operands[0])
    outs = [d.write(t, _extended(t, kind)) for t in targets]
    width = _width(ins, len(targets))
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{TYPE_BYTES[kind]}")
    address = ins.operands[1]
    if space == "param" and isinstance(address, Address) and isinstance(address.base, Symbol):
        return _load_parameter(d, address, outs, dtype)
    addresses = d.address(address)

    def run(m) -> None:
        values = _read(m, ins, space, addresses(m), width).view(dtype).reshape(-1, len(outs))
        for i, out in enumerate(outs):
            put_executing(m, out, values[:, i])

    return run


def _load_parameter(d: Decoder, address: Address, outs: list[int], dtype: np.dtype) -> Run:
    assert isinstance(address.base, Symbol)
    start = d.kernel.parameters[address.base.name].offset + address.offset

    def run(m) -> None:
        values = m.launch.parameters[start : start + len(outs) * dtype.itemsize].view(dtype)
        for i, out in enumerate(outs):
            put(m, out, values[i])

    return run


@handles("st")
def _store(d: Decoder, ins: Instruction) -> Run:
    space, kind = _space(ins), ins.type
    addresses = d.address(ins.operands[0])
    bits = f"b{8 * TYPE_BYTES[kind]}"
    slots = [d.read(source, bits) for source in d.items(ins.operands[1])]
    width = _width(ins, len(slots))
    dtype = NUMPY[bits]

    def run(m) -> None:
        where = addresses(m)
        values = np.empty((len(where), len(slots)), dtype)
        for i, slot in enumerate(slots):
            value = m.r[slot]
            values[:, i] = value if value.shape[0] == 1 else m.pick(value)
        target, where = resolve(space, where)
        raw = values.view(np.uint64) if width == 16 else values.view(f"u{width}")[:, 0]
        if target == "global":
            m.unit.write_global(ins, where, width, raw)
        elif target == "shared":
            m.metrics.shared_request(m, ins, where, width)
            m.unit.write_shared(ins, where, width, raw)
        elif target == "local":
            m.local[m.executing()[:, None], _local_index(m, ins, where, width)] = values.view(np.uint8)
        else:
            raise UnsupportedPtx(f"store to {target} memory")

    return run


# Atomics: integers only, since a float atomic makes results depend on the order.

_ATOMIC = {
    "add": lambda old, value: old + value,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, value: value,
    "inc": lambda old, value: np.where(old >= value, 0, old + 1).astype(old.dtype),
    "dec": lambda old, value: np.where((old == 0) | (old > value), value, old - 1).astype(old.dtype),
}


@handles("atom", "red")
def _atomic(d: Decoder, ins: Instruction) -> Run:
    space, kind = _space(ins), ins.type
    if kind[0] == "f" or kind in ("bf16", "bf16x2"):
        raise unsupported(ins, "float atomics make results depend on the order of threads")
    returns = ins.opcode == "atom"
    operands = ins.operands[1:] if returns else ins.operands
    out = d.write(ins.operands[0], "b" + kind[1:]) if returns else None
    addresses = d.address(operands[0])
    slots = [d.read(operand, kind) for operand in operands[1:]]
    operation = ins.one_of("cas", *_ATOMIC)
    if operation is None or (operation == "cas") != (len(slots) == 2):
        raise unsupported(ins)
    width = TYPE_BYTES[kind]

    def run(m) -> None:
        target, where = resolve(space, addresses(m))
        values = [m.pick(np.broadcast_to(m.r[slot], (m.slice.size,))) for slot in slots]
        if target == "global":
            index, memory = m.unit.atomic_global(ins, where, width), m.unit.memory
        elif target == "shared":
            index, memory = m.unit.claim_shared(ins, where, width, atomic=True), m.shared
        else:
            raise UnsupportedPtx(f"atomic on {target} memory")
        if index is None:
            return
        cells = memory.data.view(NUMPY[kind])
        old = np.empty(len(index), cells.dtype)
        for lane in m.scheduler.order(len(index)):  # any order is allowed: the seed's
            cell = index[lane]
            old[lane] = cells[cell]
            if operation == "cas":
                if cells[cell] == values[0][lane]:
                    cells[cell] = values[1][lane]
            else:
                cells[cell] = _ATOMIC[operation](old[lane], values[0][lane])
        if out is not None:
            put_executing(m, out, old.view(f"u{width}"))

    return run


# cp.async


@handles("cp")
def _copy_async(d: Decoder, ins: Instruction) -> Run:
    if ins.has("bulk"):
        return bulk_instruction(d, ins)
    if ins.modifiers[0] != "async" or ins.has("mbarrier"):
        raise unsupported(ins)
    if ins.has("commit_group"):
        return lambda m: m.copies.commit()
    if ins.has("wait_all"):
        return lambda m: m.copies.wait_all()
    if ins.has("wait_group"):
        allowed = ins.operands[0]
        assert isinstance(allowed, Immediate)
        count = allowed.value
        return lambda m: m.copies.wait(count)
    destination, source = d.address(ins.operands[0]), d.address(ins.operands[1])
    size = ins.operands[2]
    if not isinstance(size, Immediate) or size.value not in ((16,) if ins.has("cg") else (4, 8, 16)):
        raise unsupported(ins)
    width = size.value
    last = ins.operands[3] if len(ins.operands) > 3 and not ins.has("L2::cache_hint") else None
    ignored = isinstance(last, (Register, Negated)) and (isinstance(last, Negated) or last.type == "pred")
    filled = None
    if ignored:
        slot, negated = d.predicate(last)  # the source is ignored where it holds
        filled = lambda m: np.where(m.r[slot] != negated, 0, width)  # noqa: E731
    elif last is not None:
        bytes_read = d.read(last, "u32")
        filled = lambda m: np.minimum(m.r[bytes_read], width).astype(np.int64)  # noqa: E731

    def run(m) -> None:
        _, target = resolve("shared", destination(m))
        counts = np.full(m.slice.size, width) if filled is None else np.broadcast_to(filled(m), (m.slice.size,))
        m.copies.issue(ins, target, source(m).astype(np.uint64), width, m.pick(counts))

    return run


@handles("prefetch", "prefetchu", "createpolicy", "discard", "applypriority")
def _hint(d: Decoder, ins: Instruction) -> Run:
    if ins.opcode == "createpolicy":
        out = d.write(ins.operands[0], "b64")
        return lambda m: put(m, out, np.zeros(1, np.uint64))
    return lambda m: None
