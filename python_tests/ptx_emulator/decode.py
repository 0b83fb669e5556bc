"""Instructions to closures: an operand becomes a slot number, an instruction a function of the wave that runs it.

A slot is a register seen as a type (or a constant, or a special register): the wave holds one array per slot over its
lanes, the slice that runs a view of each. A closure only does `f(r[a], r[b], r[out])`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, SharedLayout
from .parser import (
    TYPE_BYTES,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Module,
    Negated,
    Operand,
    Register,
    Symbol,
    TensorAddress,
    UnsupportedPtx,
    Vector,
)
from .registers import Source

if TYPE_CHECKING:
    from .wave import Wave

Run = Callable[["Wave"], "int | None"]
Build = Callable[["Decoder", Instruction], Run]
HANDLERS: dict[str, Build] = {}

SPECIAL = (
    {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
    | {f"%{name}.{axis}" for name in ("clusterid", "nclusterid", "cluster_ctaid", "cluster_nctaid") for axis in "xyz"}
    | {"%cluster_ctarank", "%cluster_nctarank"}
    | {f"%lanemask_{which}" for which in ("eq", "le", "lt", "ge", "gt")}
    | {"%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%dynamic_smem_size", "%total_smem_size", "%gridid"}
)


def handles(*opcodes: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        for opcode in opcodes:
            HANDLERS[opcode] = build
        return build

    return register


def unsupported(ins: Instruction, why: str = "") -> UnsupportedPtx:
    return UnsupportedPtx(f"the emulator does not know `{ins.text}`" + (f": {why}" if why else ""))


def put(m: Wave, slot: int, value: np.ndarray) -> None:
    """`value` is over the whole slice."""
    if m.mask is None:
        m.r[slot][...] = value
    else:
        mask = m.mask if m.r[slot].ndim == 1 else m.mask[:, None]
        np.copyto(m.r[slot], value, where=mask, casting="unsafe")


def put_executing(m: Wave, slot: int, value: np.ndarray) -> None:
    """`value` is over the executing lanes."""
    if m.mask is None:
        m.r[slot][...] = value
    else:
        m.r[slot][m.mask] = value


_IN_WINDOW = np.uint64((1 << 60) - 1)


def resolve(space: str, addresses: np.ndarray) -> tuple[str, np.ndarray]:
    """The space of generic addresses, and the addresses in it."""
    if space in ("global", "const"):
        return "global", addresses.astype(np.uint64, copy=False)
    if space == "param":
        return space, addresses.astype(np.uint64, copy=False) & _IN_WINDOW
    if space != "generic":
        return space, addresses
    windows = addresses >> np.uint64(60)
    if (windows != windows[0]).any():
        raise UnsupportedPtx("generic addresses of different spaces in one access")
    inside = addresses & _IN_WINDOW
    found = {SHARED_WINDOW >> 60: "shared", LOCAL_WINDOW >> 60: "local", PARAM_WINDOW >> 60: "param"}.get(
        int(windows[0])
    )
    return (found, inside) if found else ("global", addresses)


class Decoder:
    def __init__(self, kernel: Kernel, layout: SharedLayout, local: dict[str, int], variables: set[str]):
        self.kernel = kernel
        self.layout = layout
        self.local = local
        self.variables = variables  # .global and .const ones, whose addresses the device knows
        # By slot: a register, a constant's value, a special register's name or a variable's name; and the type.
        self.sources: list[Source] = []
        self._slots: dict[Source, int] = {}

    # Operands

    def _slot(self, kind: str, key: object, type_: str) -> int:
        source = (kind, key, type_)
        if source not in self._slots:
            self._slots[source] = len(self.sources)
            self.sources.append(source)
        return self._slots[source]

    def read(self, operand: Operand, type_: str) -> int:
        match operand:
            case Register():
                return self._slot("register", operand, type_)
            case Immediate(value, float_bits):
                if float_bits and TYPE_BYTES.get(type_) != float_bits // 8:
                    raise UnsupportedPtx(f"a {float_bits}-bit constant as {type_}")
                return self._slot("constant", value, type_)
            case Symbol(name) if name in SPECIAL:
                return self._slot("special", name, type_)
            case Symbol(name) if name in self.variables:
                return self._slot("variable", name, type_)
            case Symbol(name):
                return self._slot("constant", self.symbol(name), type_)
        raise UnsupportedPtx(f"operand {operand}")

    def write(self, operand: Operand, type_: str) -> int:
        if operand == Symbol("_"):
            return self._slot(
                "register", Register("_" + type_, "pred" if type_ == "pred" else f"b{8 * TYPE_BYTES[type_]}"), type_
            )
        if not isinstance(operand, Register):
            raise UnsupportedPtx(f"result {operand}")
        return self._slot("register", operand, type_)

    def symbol(self, name: str) -> int:
        if name in self.layout.variables:
            return self.layout.variables[name][0]
        if name in self.local:
            return self.local[name]
        if name in self.kernel.parameters:
            return self.kernel.parameters[name].offset
        raise UnsupportedPtx(f"the emulator does not know the symbol {name}")

    def predicate(self, operand: Operand) -> tuple[int, bool]:
        """Slot, and whether it is to be negated."""
        if isinstance(operand, Negated):
            return self.read(operand.operand, "pred"), True
        return self.read(operand, "pred"), False

    def address(self, operand: Operand) -> Callable[[Wave], np.ndarray]:
        """Addresses of the executing lanes, as uint32 or uint64 like the register that holds them."""
        if not isinstance(operand, Address):
            raise UnsupportedPtx(f"address {operand}")
        type_ = operand.base.type.replace("s", "b").replace("u", "b") if isinstance(operand.base, Register) else "b64"
        slot = self.read(operand.base, type_)
        bits = 8 * TYPE_BYTES[type_]
        offset = np.array([operand.offset % (1 << bits)], f"u{bits // 8}") if operand.offset else None

        def addresses(m: Wave) -> np.ndarray:
            base = m.r[slot]
            if offset is not None:
                base = base + offset
            if base.shape[0] == 1:
                base = np.broadcast_to(base, (m.slice.size,))
            return m.pick(base)

        return addresses

    @staticmethod
    def items(operand: Operand) -> list[Operand]:
        return list(operand.items) if isinstance(operand, Vector) else [operand]

    # Instructions

    def decode(self, ins: Instruction) -> Run:
        build = HANDLERS.get(ins.opcode)
        if build is None:
            raise unsupported(ins)
        try:
            run = build(self, ins)
        except UnsupportedPtx as error:
            raise unsupported(ins, str(error)) from error
        except (KeyError, IndexError, ValueError, StopIteration) as error:
            raise unsupported(ins, f"{type(error).__name__} {error}") from error
        return run if ins.guard is None else self._guarded(ins, run)

    def _guarded(self, ins: Instruction, run: Run) -> Run:
        slot, negated = self.read(ins.guard, "pred"), ins.guard_negated
        if ins.opcode == "bra":
            target = self.kernel.labels[ins.operands[0].name]  # type: ignore[union-attr]
            following = ins.index + 1
            if negated:
                return lambda m: m.jump(~m.r[slot], target, following)
            return lambda m: m.jump(m.r[slot], target, following)

        def guarded(m: Wave) -> int | None:
            chosen = ~m.r[slot] if negated else m.r[slot].copy()
            outer = m.mask
            if outer is not None:
                chosen &= outer
            count = np.count_nonzero(chosen)
            if count == 0:
                return None
            m.mask = None if count == chosen.size else chosen
            following = run(m)
            if following is None:  # else the lanes have been given their program counters
                m.mask = outer
            return following

        return guarded


class Program:
    """A kernel ready to run."""

    def __init__(self, module: Module, kernel: Kernel):
        self.kernel = kernel
        self.variables = [v for v in module.variables.values() if v.space in ("global", "const")]
        self.layout = SharedLayout()
        self.dynamic: list[str] = []
        local: dict[str, int] = {}
        local_bytes = 0
        used = {item.name for ins in kernel.instructions for item in _symbols(ins)}
        for variable in [*module.variables.values(), *kernel.variables.values()]:
            if variable.space == "local":
                local_bytes = -(-local_bytes // variable.align) * variable.align
                local[variable.name] = local_bytes
                local_bytes += variable.size
            elif variable.space == "shared" and variable.name in used:
                if variable.size == 0:
                    self.dynamic.append(variable.name)
                else:
                    self.layout.add(variable.name, variable.size, variable.align)
        self.static_shared = sum(size for _, size in self.layout.variables.values())
        self.local_bytes = local_bytes
        aligns = [variable.align for variable in module.variables.values() if variable.name in self.dynamic]
        self.dynamic_align = max(aligns, default=1)  # to which what lies before is rounded up
        for name in self.dynamic:  # all of them start at the same place; each launch gives the size
            if name == self.dynamic[0]:
                self.layout.add(name, 0, 1024)
            else:
                self.layout.alias(name, self.dynamic[0])
        decoder = Decoder(kernel, self.layout, local, {variable.name for variable in self.variables})
        self.code = [decoder.decode(ins) for ins in kernel.instructions]
        self.code.append(lambda m: m.finish(len(self.code) - 1))  # falling off the end is `ret`
        self.end = len(self.code)
        self.sources = decoder.sources
        self.asynchronous = any(ins.opcode in ("mbarrier", "wgmma") or ins.has("bulk") for ins in kernel.instructions)
        self.shared_granule = _granule(kernel, "shared")
        self.global_granule = _granule(kernel, "global")

    def shared_layout(self, dynamic_bytes: int) -> SharedLayout:
        layout = SharedLayout()
        layout.variables = dict(self.layout.variables)
        layout.size = self.layout.size
        for name in self.dynamic:
            start, _ = layout.variables[name]
            layout.variables[name] = (start, dynamic_bytes)
            layout.size = max(layout.size, start + dynamic_bytes + 128)
        return layout


def _symbols(ins: Instruction) -> list[Symbol]:
    found = []
    queue = list(ins.operands)
    while queue:
        operand = queue.pop()
        if isinstance(operand, Symbol):
            found.append(operand)
        elif isinstance(operand, Address):
            queue.append(operand.base)
        elif isinstance(operand, TensorAddress):
            queue.append(operand.map)
        elif isinstance(operand, Vector):
            queue.extend(operand.items)
    return found


def _granule(kernel: Kernel, space: str) -> int:
    """The narrowest access to the space: races are told apart down to it."""
    widths = [16]
    for ins in kernel.instructions:
        if ins.opcode in ("ld", "st", "atom", "red") and (
            ins.has(space) or not ins.one_of("global", "shared", "local", "param", "const")
        ):
            vector = {"v2": 2, "v4": 4}.get(ins.one_of("v2", "v4") or "", 1)
            widths.append(TYPE_BYTES[ins.type] * vector)
        elif ins.opcode == "mbarrier":
            widths.append(8)
        elif ins.opcode == "cp" and ins.has("async") and not ins.has("bulk") and len(ins.operands) > 2:
            widths.append(min(ins.operands[2].value, 4) if len(ins.operands) > 3 else ins.operands[2].value)
    return min(widths)
