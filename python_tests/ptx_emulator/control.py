"""Branches, exits, barriers."""

from __future__ import annotations

import numpy as np

from .barriers import CLUSTER
from .decode import Decoder, Run, handles, unsupported
from .findings import DeviceTrap
from .parser import Instruction, Symbol

RESELECT = -1  # returned by an instruction that has itself seen to the program counters
LANE = np.arange(32, dtype=np.uint32)


@handles("bra")
def _branch(d: Decoder, ins: Instruction) -> Run:
    target = d.kernel.labels[ins.operands[0].name]  # type: ignore[union-attr]
    return lambda m: target  # guarded branches are the decoder's


@handles("brx")
def _branch_table(d: Decoder, ins: Instruction) -> Run:
    slot = d.read(ins.operands[0], "u32")
    table = ins.operands[1]
    assert isinstance(table, Symbol)
    targets = np.array([d.kernel.labels[name] for name in d.kernel.branch_targets[table.name]])

    def run(m) -> int:
        index = np.broadcast_to(m.r[slot], (m.slice.size,))
        if int(m.pick(index).max()) >= len(targets):
            m.report("out of bounds", ins, "branch table", int(np.argmax(m.pick(index) >= len(targets))))
        following = targets[np.minimum(index, len(targets) - 1)]
        m.leave(ins.index + 1)
        m.pcs[m.executing()] = m.pick(following)
        return RESELECT

    return run


@handles("ret", "exit")
def _exit(d: Decoder, ins: Instruction) -> Run:
    following = ins.index + 1
    return lambda m: m.finish(following)


@handles("trap", "brkpt")
def _trap(d: Decoder, ins: Instruction) -> Run:
    def run(m) -> None:
        raise DeviceTrap(d.kernel.name, m.who(int(m.executing()[0])))

    return run


@handles("call")
def _call(d: Decoder, ins: Instruction) -> Run:
    if "__assertfail" in ins.text:
        return _trap(d, ins)
    raise unsupported(ins, "device functions must be inlined")


@handles("bar", "barrier")
def _barrier(d: Decoder, ins: Instruction) -> Run:
    if ins.has("warp"):
        return _warp_barrier(d, ins)
    if ins.has("cluster"):
        return _cluster_barrier(ins)
    if ins.has("red"):
        raise unsupported(ins)
    wait = ins.has("sync")
    number = d.read(ins.operands[0], "u32")
    threads = d.read(ins.operands[1], "u32") if len(ins.operands) > 1 else None
    following = ins.index + 1

    def run(m) -> int:
        if not together(m, ins):
            return RESELECT
        chosen = m.pick(np.broadcast_to(m.r[number], (m.slice.size,)))
        counts = np.zeros(1, np.int64) if threads is None else m.pick(np.broadcast_to(m.r[threads], (m.slice.size,)))
        arriving = m.executing()
        result = m.leave(following)
        for barrier in np.unique(chosen):
            count = int(counts[0] if threads is None else counts[chosen == barrier][0])
            m.barriers.arrive(ins, arriving[chosen == barrier], int(barrier), count, wait)
        return result

    return run


def _cluster_barrier(ins: Instruction) -> Run:
    waits, following = ins.has("wait"), ins.index + 1

    def run(m) -> int:
        if not together(m, ins):
            return RESELECT
        lanes = m.executing()
        result = m.leave(following)
        if waits:
            m.barriers.wait_cluster(lanes)
        else:
            m.barriers.arrive(ins, lanes, CLUSTER, 0, False)
        return result

    return run


def _warp_barrier(d: Decoder, ins: Instruction) -> Run:
    """Orders the lanes of a warp, which have no clocks of their own here: only who takes part is checked."""
    member = d.read(ins.operands[0], "u32")

    def run(m) -> int | None:
        return None if together(m, ins, m.r[member]) else RESELECT

    return run


EVERYONE = np.array([0xFFFFFFFF], np.uint32)


def together(m, ins: Instruction, members: np.ndarray = EVERYONE) -> bool:
    """Whether all threads that the masks name, but for exited ones, execute the instruction.

    If not, those that are here have been parked until the others come, and the handler must return RESELECT: the lowest
    program counter first, which is how diverged lanes run here, may reach the instruction by a shorter way.
    """
    if m.mask is None and members.shape[0] == 1 and members[0] == EVERYONE[0]:
        return True
    lanes = np.ones((m.slice.warps, 32), bool) if m.mask is None else m.mask.reshape(-1, 32)
    masks = np.where(lanes, np.broadcast_to(members, (m.slice.size,)).reshape(-1, 32), np.uint32(0))
    own = (masks >> LANE) & np.uint32(1) == 0
    if (own & lanes).any():
        strangers = m.pick((own & lanes).reshape(-1))
        m.report("divergence", ins, "a thread that its own mask does not name", int(np.argmax(strangers)))
    named = np.bitwise_or.reduce(masks, axis=1)
    alive = bits(~m.done[m.slice.lanes].reshape(-1, 32))
    missing = named & alive & ~bits(lanes)
    if not missing.any():
        return True
    m.park(ins.index, (lanes & (missing != 0)[:, None]).reshape(-1), np.repeat(named, 32))
    return False


def bits(flags: np.ndarray) -> np.ndarray:
    """One word per row of 32 flags."""
    return np.packbits(flags, axis=1, bitorder="little").view(np.uint32)[:, 0]


@handles("membar", "nanosleep", "pragma")
def _nothing(d: Decoder, ins: Instruction) -> Run:
    return lambda m: None  # execution is sequentially consistent
