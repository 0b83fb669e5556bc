"""Some blocks of a grid, executed together: lanes are the threads of all of them, in block and thread order.

Every register is one array over the lanes, so that one numpy call executes an instruction for many warps. That is sound
because blocks and warps have no order among each other but the one that barriers make; what is lost, the accidental
interleaving that uncovers a race, the race checks do not need (see races.py), and seeds bring some of it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .async_copy import AsyncCopies
from .barriers import Barriers
from .bulk import BulkCopies
from .control import RESELECT, bits
from .findings import Abandoned
from .mbarriers import COLUMNS, Mbarriers
from .memory import POISON, MemoryUnit, SharedMemory
from .products import WARPGROUP, Products
from .races import SharedRaces

if TYPE_CHECKING:
    from .launch import Launch

WARP = 32


class Slice:
    """The lanes of a range of warps: a view of every register and of what the checks need per lane."""

    def __init__(self, wave: Wave, first: int, last: int):
        self.first = first
        self.lanes = slice(first * WARP, last * WARP)
        self.size = (last - first) * WARP
        self.warps = last - first
        lanes = self.lanes
        self.registers = wave.registers.views(lanes.start, lanes.stop)
        self.numbers = np.arange(lanes.start, lanes.stop)
        self.shared_base = wave.shared_base[lanes]
        self.clock_row = wave.clock_row[lanes]
        self.warp_in_block = wave.warp_in_block[lanes]
        self.own_clock = wave.clock_row[lanes] + wave.warp_in_block[lanes]
        self.first_warp = wave.first_warp[lanes]
        self.warp_number = wave.warp_number[lanes]
        self.block_number = wave.block_number[lanes]


class Wave:
    def __init__(self, launch: Launch, blocks: np.ndarray):
        self.launch = launch
        self.program = launch.program
        self.metrics = launch.metrics
        self.scheduler = launch.scheduler
        self.blocks = blocks
        threads = launch.threads
        self.warps_per_block = -(-threads // WARP)
        self.lanes_per_block = self.warps_per_block * WARP
        self.lanes = len(blocks) * self.lanes_per_block
        self.warps = self.lanes // WARP

        block = np.repeat(np.arange(len(blocks)), self.lanes_per_block)
        self.thread = np.tile(np.arange(self.lanes_per_block, dtype=np.uint32), len(blocks))
        self.local_block = block
        self.warp_in_block = (self.thread // WARP).astype(np.int64)
        # Of the clocks below: the block's warps, products of its warpgroups, copies that report to its mbarriers.
        warpgroups = -(-self.warps_per_block // WARPGROUP) if launch.program.asynchronous else 0
        self.readers = self.warps_per_block + warpgroups
        self.columns = self.readers + (COLUMNS if launch.program.asynchronous else 0)
        self.clock_row = (block * self.warps_per_block + self.warp_in_block) * self.columns
        self.first_warp = blocks[block].astype(np.int64) * self.warps_per_block
        self.warp_number = (self.first_warp + self.warp_in_block + 1).astype(np.uint32)
        self.block_number = (blocks[block] + 1).astype(np.uint32)

        self.shared = SharedMemory(len(blocks), launch.shared_layout)
        self.shared_base = block.astype(np.int64) * self.shared.stride
        self.shared_races = SharedRaces(
            self.shared.size, launch.program.shared_granule, self.warps_per_block, self.readers, self.columns
        )
        # clock[block, warp, other]: the tick of `other` up to which `warp` has waited; its own entry is its tick.
        self.clock = np.zeros((len(blocks), self.warps_per_block, self.columns), np.uint32)
        self.clock[:, np.arange(self.warps_per_block), np.arange(self.warps_per_block)] = 1
        self.local = np.full((self.lanes, max(launch.program.local_bytes, 1)), POISON, np.uint8)

        self.registers = launch.registers(self.lanes)
        self.registers.reset(self)
        self._slices: dict[tuple[int, int], Slice] = {}
        self.done = self.thread >= threads
        self.ready = ~self.done
        self.pcs = np.zeros(self.lanes, np.int64)
        self.parked = np.zeros(self.lanes, bool)  # waiting for other threads of the warp at an instruction of all
        self.needs = np.zeros(self.lanes, np.uint32)  # for which ones
        self.progress = 0  # counts what others may have waited for
        self.everybody = Slice(self, 0, self.warps)
        self.barriers = Barriers(self)
        self.mbarriers = Mbarriers(self)
        self.copies = AsyncCopies(self)
        self.bulk = BulkCopies(self)
        self.products = Products(self)
        self.unit = MemoryUnit(self)
        self.pc = 0
        self.limit = 0
        self.select_warps(0, self.warps)
        self.mask: np.ndarray | None = None  # lanes of the slice that the current instruction is executed for
        self.active: np.ndarray | None = None  # lanes of the slice at this program counter; None for all

    # Which lanes run

    def select_warps(self, first: int, last: int) -> None:
        key = (first, last)
        found = self._slices.get(key)
        if found is None:
            if len(self._slices) > 64:
                self._slices.clear()
            found = self._slices[key] = Slice(self, first, last)
        self.slice = found
        self.r = found.registers

    def _select(self) -> bool:
        """Chooses warps by the seed, then the lanes of theirs at the lowest program counter: where they meet again."""
        self.bulk.land_at_random()
        while not self.ready.any():
            # What is under way comes now, or the time of those who sleep is up.
            if self.done.all() or not (self.bulk.land() or self.mbarriers.time_out()):
                return False
        first, last = self.scheduler.choose(self)
        lanes = slice(first * WARP, last * WARP)
        ready, pcs = self.ready[lanes], self.pcs[lanes]
        waiting = pcs[ready]
        self.pc = int(waiting.min())
        active = ready & (pcs == self.pc)
        behind = waiting[waiting > self.pc]
        self.limit = int(behind.min()) if len(behind) else self.program.end
        warps = np.flatnonzero(active.reshape(-1, WARP).any(axis=1))
        start, stop = int(warps[0]), int(warps[-1]) + 1
        self.select_warps(first + start, first + stop)
        active = active[start * WARP : stop * WARP]
        self.mask = self.active = None if active.all() else active
        self.active_warps = len(warps)
        return True

    def pick(self, array: np.ndarray) -> np.ndarray:
        """Of an array over the slice, the entries of the lanes that execute."""
        return array if self.mask is None else array[self.mask]

    def narrow(self, which: np.ndarray) -> None:
        """Lets only some of the executing lanes go on executing. The caller puts the mask back."""
        if which.all():
            return
        executing = np.ones(self.slice.size, bool) if self.mask is None else self.mask.copy()
        executing[executing] = which
        self.mask = executing

    def by_warp(self, values: np.ndarray) -> np.ndarray:
        """Of an array over the executing lanes, one row per warp with -1 for lanes that do not execute."""
        if self.mask is None:
            return values.reshape(-1, WARP)
        rows = np.full(self.slice.size, -1, values.dtype)
        rows[self.mask] = values
        rows = rows.reshape(-1, WARP)
        return rows[(rows >= 0).any(axis=1)]

    def executing(self) -> np.ndarray:
        """The wave's numbers of the lanes that execute."""
        return self.pick(self.slice.numbers)

    def own_ticks(self) -> np.ndarray:
        return self.clock.take(self.pick(self.slice.own_clock))

    def tick(self, warps: np.ndarray) -> None:
        """What these warps (numbers in the wave) do from here on, others do not know of."""
        block, warp = np.divmod(warps, self.warps_per_block)
        self.clock[block, warp, warp] += 1

    def publish(self, warps: np.ndarray, barriers_only: bool = False) -> None:
        """A proxy fence of these warps; one for freshly made barriers does not reach further."""
        for warp in warps.tolist():
            block, own = divmod(warp, self.warps_per_block)
            start = block * self.shared.stride
            places = self.mbarriers.places(block) if barriers_only else np.arange(0, self.shared.stride, 16)
            granules = self.shared_races.granules(start + places, 8 if barriers_only else 16).reshape(-1)
            self.shared_races.publish(own, self.clock[block, own], granules)

    # Program counters

    def set_pcs(self, pc: int, active: np.ndarray | None) -> None:
        lanes = self.slice.lanes
        if active is None:
            self.pcs[lanes] = pc
        else:
            self.pcs[lanes][active] = pc

    def leave(self, pc: int) -> int:
        """All lanes at this program counter go on at `pc` whenever they are chosen again."""
        self.set_pcs(pc, self.active)
        return RESELECT

    def jump(self, taken: np.ndarray, target: int, otherwise: int) -> int:
        """`taken`: lanes of the slice."""
        active = self.active
        taken = taken if active is None else taken & active
        count = np.count_nonzero(taken)
        if count == 0:
            return otherwise
        if count == (self.slice.size if active is None else np.count_nonzero(active)):
            return target
        self.set_pcs(otherwise, active)
        self.set_pcs(target, taken)
        return RESELECT

    def finish(self, pc: int) -> int:
        """The executing lanes exit; the others at this program counter go on."""
        self.set_pcs(pc, self.active)
        lanes = self.executing()
        self.done[lanes] = True
        self.ready[lanes] = False
        if self.parked.any():
            self._unpark(np.unique(lanes // WARP), exited=True)
        self.barriers.release()
        self.progress += 1
        return RESELECT

    def park(self, pc: int, waiting: np.ndarray, needs: np.ndarray) -> None:
        """Lanes of the slice wait at `pc` for other lanes of their warps; all others at `pc` try again."""
        self.set_pcs(pc, self.active)
        lanes = self.slice.numbers[waiting]
        self.ready[lanes] = False
        self.parked[lanes] = True
        self.needs[lanes] = needs[waiting]
        self._unpark(np.unique(lanes // WARP))

    def _unpark(self, warps: np.ndarray, exited: bool = False) -> None:
        """Wakes the lanes of these warps that now are all that they wait for."""
        for warp in warps.tolist():
            lanes = np.arange(warp * WARP, warp * WARP + WARP)
            alive = bits(~self.done[lanes][None])[0]
            for pc in np.unique(self.pcs[lanes][self.parked[lanes]]):
                here = self.parked[lanes] & (self.pcs[lanes] == pc)
                needed = np.bitwise_or.reduce(self.needs[lanes[here]]) & alive
                if needed & ~bits(here[None])[0]:
                    continue
                ins = self.program.kernel.instructions[pc]
                if exited and ins.opcode in ("bar", "barrier"):
                    detail = (
                        f"a barrier in a branch that not all threads of a warp take ({self.who(int(lanes[here][0]))})"
                    )
                    self.launch.findings.add("divergence", ins.text, detail)
                self.parked[lanes[here]] = False
                self.ready[lanes[here]] = True

    def _stuck(self) -> Abandoned:
        if not self.parked.any():
            return self.barriers.deadlock(self.mbarriers.describe() + self.products.describe())
        lane = int(np.argmax(self.parked))
        ins = self.program.kernel.instructions[self.pcs[lane]]
        detail = f"some threads of a warp never come to what it executes as one ({self.who(lane)} does)"
        return self.launch.findings.fatal("divergence", ins.text, detail)

    # Run

    def run(self) -> None:
        code, counts = self.program.code, self.launch.counts
        while self._select():
            pc, limit = self.pc, self.limit
            warps = self.active_warps
            budget = self.scheduler.burst()
            while pc < limit and budget > 0:
                counts[pc] += warps
                budget -= 1
                following = code[pc](self)
                if following is None:
                    pc += 1
                elif following == RESELECT:
                    break
                else:
                    pc = following
            else:
                self.leave(pc)
            self.launch.check_budget()
        if not self.done.all():
            raise self._stuck()
        self.bulk.finish()
        self.products.finish()

    # Findings

    def report(self, kind: str, ins, detail: str, active_lane: int) -> None:
        """`active_lane` counts the executing lanes."""
        lane = int(self.executing()[active_lane])
        self.launch.findings.add(kind, ins.text, f"{detail} ({self.who(lane)})")

    def who(self, lane: int) -> str:
        return f"block {self.launch.block_name(int(self.blocks[self.local_block[lane]]))}, thread {self.thread[lane]}"
