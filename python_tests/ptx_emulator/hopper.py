"""What sm_90 adds beside wgmma: mbarrier, bulk copies, proxy fences, clusters (of one block), register counts."""

from __future__ import annotations

import numpy as np

from .control import RESELECT, together
from .decode import Decoder, Run, handles, put, put_executing, resolve, unsupported
from .parser import Address, Immediate, Instruction, Pair, TensorAddress, UnsupportedPtx
from .tensor_map import Cells, TensorMap
from .wgmma import executing_warps

# mbarrier


def _shared(d: Decoder, ins: Instruction, operand):
    """Addresses in shared memory, of whatever kind the operand is."""
    addresses = d.address(operand)
    space = "generic" if not any(m.startswith("shared") for m in ins.modifiers) else "shared"

    def shared(m) -> np.ndarray:
        found, where = resolve(space, addresses(m))
        if found != "shared":
            raise UnsupportedPtx(f"an address of {found} memory in `{ins.text}`")
        return where.astype(np.int64)

    return shared


@handles("mbarrier")
def _mbarrier(d: Decoder, ins: Instruction) -> Run:
    kind = ins.modifiers[0]
    if (ins.one_of("noComplete", "shared::cluster") and kind not in ("arrive", "expect_tx")) or ins.has("noComplete"):
        raise unsupported(ins)
    build = {
        "init": _make,
        "inval": _invalidate,
        "arrive": _arrive,
        "expect_tx": _expect,
        "try_wait": _wait,
        "test_wait": _wait,
    }.get(kind)
    if build is None:
        raise unsupported(ins)
    return build(d, ins)


def _over_lanes(m, slot: int) -> np.ndarray:
    return m.pick(np.broadcast_to(m.r[slot], (m.slice.size,)))


def _make(d: Decoder, ins: Instruction) -> Run:
    addresses, count = _shared(d, ins, ins.operands[0]), d.read(ins.operands[1], "u32")

    def run(m) -> None:
        where = addresses(m)
        m.unit.write_shared(ins, where, 8, np.zeros(len(where), np.uint64))
        m.mbarriers.init(ins, m.executing(), where, _over_lanes(m, count))

    return run


def _invalidate(d: Decoder, ins: Instruction) -> Run:
    addresses = _shared(d, ins, ins.operands[0])
    return lambda m: m.mbarriers.invalidate(ins, m.executing(), addresses(m))


def _arrive(d: Decoder, ins: Instruction) -> Run:
    addresses, state = _shared(d, ins, ins.operands[1]), d.write(ins.operands[0], "b64")
    number = d.read(ins.operands[2], "u32") if len(ins.operands) > 2 else None
    announces = ins.has("expect_tx")

    def run(m) -> None:
        where = addresses(m)
        given = 1 if number is None else _over_lanes(m, number).astype(np.int64)
        m.unit.read_shared(ins, where, 8)
        counts, bytes_ = (1, given) if announces else (given, 0)
        put_executing(m, state, m.mbarriers.arrive(ins, m.executing(), where, counts, bytes_))

    return run


def _expect(d: Decoder, ins: Instruction) -> Run:
    addresses, number = _shared(d, ins, ins.operands[0]), d.read(ins.operands[1], "u32")

    def run(m) -> None:
        where = addresses(m)
        m.unit.read_shared(ins, where, 8)
        m.mbarriers.arrive(ins, m.executing(), where, 0, _over_lanes(m, number).astype(np.int64))

    return run


def _wait(d: Decoder, ins: Instruction) -> Run:
    """May come back without success at any time, and does (see Scheduler.gives_up), but else sleeps."""
    out, addresses = d.write(ins.operands[0], "pred"), _shared(d, ins, ins.operands[1])
    parity = d.read(ins.operands[2], "b32" if ins.has("parity") else "b64")

    def run(m) -> int | None:
        where, lanes = addresses(m), m.executing()
        m.unit.read_shared(ins, where, 8)
        ended = m.mbarriers.ended(ins, lanes, where, _over_lanes(m, parity).astype(np.int64))
        put_executing(m, out, ended)
        sleeps = ~ended
        if sleeps.any():
            sleeps[sleeps] = ~m.mbarriers.excused(lanes[sleeps])
        if not sleeps.any():
            return m.leave(ins.index + 1) if not ended.all() else None  # others get a turn
        result = m.leave(ins.index + 1)
        m.pcs[lanes[sleeps]] = ins.index
        m.mbarriers.sleep(lanes[sleeps], where[sleeps])
        return result

    return run


# Bulk copies


def bulk_instruction(d: Decoder, ins: Instruction) -> Run:
    if ins.modifiers[0] != "async" or ins.has("multicast::cluster"):
        raise unsupported(ins)
    if ins.has("prefetch"):
        return lambda m: None
    if ins.has("commit_group"):
        return lambda m: m.bulk.commit(m.executing())
    if ins.has("wait_group"):
        allowed, only_read = ins.operands[0], ins.has("read")
        assert isinstance(allowed, Immediate)
        count = allowed.value
        return lambda m: m.bulk.wait(m.executing(), count, only_read)
    if ins.has("mbarrier::complete_tx::bytes"):
        return _bulk_load(d, ins)
    if ins.has("bulk_group"):
        return _bulk_store(d, ins)
    raise unsupported(ins)


def _bulk_load(d: Decoder, ins: Instruction) -> Run:
    tensor = ins.has("tensor")
    target, barrier = d.address(ins.operands[0]), d.address(ins.operands[2 if tensor else 3])
    cells = _box(d, ins, ins.operands[1]) if tensor else _line(d, ins.operands[1], ins.operands[2])

    def run(m) -> None:
        targets, barriers = target(m).tolist(), barrier(m).tolist()
        for i, (lane, tile) in enumerate(zip(m.executing().tolist(), targets, strict=True)):
            if _aligned(m, ins, lane, tile, 128 if tensor else 16):
                m.bulk.load(ins, lane, tile, cells(m, i, tile), barriers[i])

    return run


def _bulk_store(d: Decoder, ins: Instruction) -> Run:
    tensor = ins.has("tensor")
    source = d.address(ins.operands[1])
    cells = _box(d, ins, ins.operands[0]) if tensor else _line(d, ins.operands[0], ins.operands[2])

    def run(m) -> None:
        for i, (lane, tile) in enumerate(zip(m.executing().tolist(), source(m).tolist(), strict=True)):
            if _aligned(m, ins, lane, tile, 128 if tensor else 16):
                m.bulk.store(ins, lane, tile, cells(m, i, tile))

    return run


def _aligned(m, ins: Instruction, lane: int, tile: int, to: int) -> bool:
    if tile % to:
        place = m.shared.layout.describe(tile)
        m.launch.findings.add("misaligned", ins.text, f"{place}, not a multiple of {to} bytes ({m.who(lane)})")
    return tile % to == 0


def _box(d: Decoder, ins: Instruction, operand):
    """The cells of the box that an executing lane names."""
    assert isinstance(operand, TensorAddress)
    address = d.address(operand.map)
    coordinates = [d.read(coordinate, "s32") for coordinate in operand.coordinates]
    if len(coordinates) != int(next(m for m in ins.modifiers if m in ("1d", "2d", "3d", "4d", "5d"))[0]):
        raise unsupported(ins, "coordinates")

    def cells(m, lane: int, tile: int) -> Cells:
        space, where = resolve("generic", address(m)[lane : lane + 1])
        at = int(where[0])
        if space == "param":
            record = m.launch.parameters[at : at + 128]
        elif space == "global" and m.unit.memory.check_range(at, 128) is None:
            record = m.unit.memory.view(at, 128)
        else:
            raise UnsupportedPtx(f"a tensor map in {space} memory at {at:#x}")
        map_ = TensorMap.from_record(record.tobytes())
        return map_.cells(tile, [int(_over_lanes(m, slot)[lane]) for slot in coordinates])

    return cells


def _line(d: Decoder, operand, size):
    address, count = d.address(operand), d.read(size, "u32")
    return lambda m, lane, tile: Cells.line(int(address(m)[lane]), int(_over_lanes(m, count)[lane]))


# Fences, clusters, registers


@handles("fence")
def _fence(d: Decoder, ins: Instruction) -> Run:
    """Execution is sequentially consistent, but for what the asynchronous proxy sees."""
    if ins.has("mbarrier_init"):
        return lambda m: m.publish(executing_warps(m), barriers_only=True)
    if not ins.has("proxy"):
        return lambda m: None
    if not ins.has("async"):
        raise unsupported(ins)
    if ins.has("global"):
        return lambda m: None
    return lambda m: m.publish(executing_warps(m))


@handles("elect")
def _elect(d: Decoder, ins: Instruction) -> Run:
    target = ins.operands[0]
    assert isinstance(target, Pair)
    lane, chosen = d.write(target.first, "b32"), d.write(target.second, "pred")
    members = d.read(ins.operands[1], "b32")

    def run(m) -> int | None:
        if not together(m, ins, m.r[members]):
            return RESELECT
        executing = np.ones(m.slice.size, bool) if m.mask is None else m.mask
        first = np.repeat(np.argmax(executing.reshape(-1, 32), axis=1), 32)
        put(m, lane, first.astype(np.uint32))
        put(m, chosen, np.tile(np.arange(32), m.slice.warps) == first)
        return None

    return run


@handles("setmaxnreg")
def _set_registers(d: Decoder, ins: Instruction) -> Run:
    count = ins.operands[0]
    if not isinstance(count, Immediate) or count.value % 8 or not 24 <= count.value <= 256:
        raise unsupported(ins)
    number = count.value

    def run(m) -> int | None:
        if not together(m, ins):
            return RESELECT
        m.products.keep_registers(executing_warps(m), number)
        return None

    return run


@handles("mapa")
def _map_to_cluster(d: Decoder, ins: Instruction) -> Run:
    """A shared address as another block of the cluster sees it: there is but this one."""
    kind = "b" + ins.type[1:]
    if not isinstance(ins.operands[1], Address) and ins.has("shared::cluster"):
        out, source, rank = (
            d.write(ins.operands[0], kind),
            d.read(ins.operands[1], kind),
            d.read(ins.operands[2], "u32"),
        )
    else:
        raise unsupported(ins)

    def run(m) -> None:
        others = _over_lanes(m, rank) != 0
        if others.any():
            m.report("out of bounds", ins, "another block than the only one of the cluster", int(np.argmax(others)))
        put(m, out, m.r[source])

    return run


@handles("griddepcontrol")
def _dependent_grids(d: Decoder, ins: Instruction) -> Run:
    return lambda m: None  # launches run one after the other
