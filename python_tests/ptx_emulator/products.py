"""wgmma under way: its registers hold no value until it is waited for, operands in memory must stay as they are."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .wave import Wave

Slots = tuple[int, ...]
WARPGROUP = 4
REGISTERS = 1 << 16  # of a multiprocessor
_NOTHING = np.uint32(0xFFFFFFFF)  # NaN


@dataclass(eq=False)
class Product:
    """One warp's part of a wgmma."""

    ins: object
    warp: int
    sums: Slots
    values: np.ndarray  # what the accumulators come to be: [registers, 32]
    places: np.ndarray  # of shared memory that it reads, by 16 bytes
    fragment: Slots  # A in registers
    held: np.ndarray  # what they hold but for the product: [registers, 32]


class Products:
    """Each warp computes its rows when it comes by.

    But a product is one of the warpgroup, and so is a group of them, as the manual has it: complete when all four warps
    have committed it, and for all of them. So one thread may release what the whole warpgroup has read, which is how
    CUTLASS's pipelines do it between the blocks of a cluster.
    """

    def __init__(self, wave: Wave):
        self.wave = wave
        self._open: dict[int, list[Product]] = defaultdict(list)  # by warp
        self._groups: dict[tuple[int, int], list[Product]] = {}  # by warp and ordinal
        self._committed = np.zeros(wave.warps, np.int64)
        self._delivered = np.zeros(wave.warps, np.int64)  # groups whose accumulators are there
        self._read = np.zeros(wave.warps, np.int64)  # groups that have read their operands, the same for a warpgroup
        self._waiting: set[int] = set()
        self._last: dict[tuple[int, Slots], Product] = {}  # under way, by accumulators
        self._values: dict[tuple[int, Slots], np.ndarray] = {}  # as they were delivered
        self._users: dict[tuple[int, int], int] = defaultdict(int)  # products under way by warp and register of A
        self._lent: dict[tuple[int, int], np.ndarray] = {}  # and what these registers hold
        self._fenced = np.zeros(wave.warps, bool)
        self._issued = np.zeros(wave.warps, np.int64)
        self._kept = np.zeros(wave.warps, np.int64)  # registers, by setmaxnreg

    def _warpgroup(self, warp: int) -> range:
        block, own = divmod(warp, self.wave.warps_per_block)
        first = own // WARPGROUP * WARPGROUP
        start = block * self.wave.warps_per_block
        return range(start + first, start + min(first + WARPGROUP, self.wave.warps_per_block))

    def registers(self, warps: np.ndarray, slots: Slots) -> np.ndarray:
        """[warps, slots, 32]"""
        return np.stack([self.wave.registers.all(slot).reshape(-1, 32)[warps] for slot in slots], axis=1)

    def fragments(self, warps: np.ndarray, slots: Slots) -> np.ndarray:
        """A in registers, which may be under way already: another product may read them. [warps, slots, 32]"""
        values = self.registers(warps, slots)
        for i, warp in enumerate(warps.tolist()):
            for j, slot in enumerate(slots):
                values[i, j] = self._lent.get((warp, slot), values[i, j])
        return values

    def _assign(self, warps, slots: Slots, values) -> None:
        for i, slot in enumerate(slots):
            self.wave.registers.all(slot).reshape(-1, 32)[warps] = values[i]

    def fence(self, warps: np.ndarray) -> None:
        self._fenced[warps] = True

    def accumulators(self, ins, warps: np.ndarray, slots: Slots, used: np.ndarray, fragment: Slots) -> np.ndarray:
        """What the products of these warps add to, where `used`."""
        values = self.registers(warps, slots)
        for i, warp in enumerate(warps.tolist()):
            under_way = self._last.get((warp, slots))
            if under_way is not None:
                values[i] = under_way.values
            if self._fenced[warp]:
                continue
            touched = used[i] and under_way is None and not self._same(values[i], self._values.get((warp, slots)))
            if fragment or touched or not self._issued[warp]:
                detail = f"no wgmma.fence since its registers were written ({self.wave.who(warp * 32)})"
                self.wave.launch.findings.add("wgmma", ins.text, detail)
        return values.view(np.float32)

    @staticmethod
    def _same(values: np.ndarray, other: np.ndarray | None) -> bool:
        return other is not None and np.array_equal(values, other)

    def issue(self, products: list[Product]) -> None:
        for product in products:
            self._open[product.warp].append(product)
            self._last[product.warp, product.sums] = product
            self.wave.shared.pin(product.places)
            for slot, held in zip(product.fragment, product.held, strict=True):
                self._users[product.warp, slot] += 1
                self._lent[product.warp, slot] = held
                self._assign(product.warp, (slot,), [_NOTHING])
        warps = np.array([product.warp for product in products])
        self._issued[warps] += 1
        self._assign(warps, products[0].sums, np.broadcast_to(_NOTHING, len(products[0].sums)))

    def commit(self, warps: np.ndarray) -> None:
        for warp in warps.tolist():
            self._groups[warp, int(self._committed[warp])] = self._open.pop(warp, [])
            self._committed[warp] += 1
            for waiting in self._waiting.intersection(self._warpgroup(warp)):
                self._waiting.discard(waiting)
                self.wave.ready[waiting * 32 : waiting * 32 + 32] = ~self.wave.done[waiting * 32 : waiting * 32 + 32]
        self.wave.progress += 1

    def wait(self, warps: np.ndarray, allowed: int) -> np.ndarray:
        """Which warps cannot go on: a product is one of the warpgroup, and other warps have not come to it yet."""
        late = []
        for warp in warps.tolist():
            warpgroup = self._warpgroup(warp)
            upto = int(self._committed[warp]) - allowed
            if any(self._committed[other] < upto for other in warpgroup):
                late.append(warp)
                continue
            for ordinal in range(int(self._read[warp]), upto):
                self._finish_reading(warpgroup, ordinal)
            for ordinal in range(int(self._delivered[warp]), upto):
                for product in self._groups.pop((warp, ordinal)):
                    self._deliver(product)
            self._delivered[warp] = max(upto, self._delivered[warp])
            block, own = divmod(warp, self.wave.warps_per_block)
            clock = self.wave.clock[block, own]
            column = self._column(warp)
            clock[column] = max(clock[column], upto, 0)
            self._fenced[warp] = False
        self._waiting.update(late)
        return np.array(late, np.int64)

    def _column(self, warp: int) -> int:
        """The clocks' for the products of its warpgroup, in which a tick is a group's ordinal, from 1."""
        return self.wave.warps_per_block + warp % self.wave.warps_per_block // WARPGROUP

    def _finish_reading(self, warpgroup: range, ordinal: int) -> None:
        """Who overwrites the operands from here on must know of a warp's wait for this group."""
        for warp in warpgroup:
            for product in self._groups[warp, ordinal]:
                self.wave.shared.unpin(product.places)
                self.wave.shared_races.stamp_reads(product.places * 16, 16, self._column(warp), ordinal + 1)
            self._read[warp] = ordinal + 1

    def _deliver(self, product: Product) -> None:
        wave, warp = self.wave, product.warp
        for slot in product.fragment:
            self._users[warp, slot] -= 1
            if self._users[warp, slot]:
                continue
            held = self._lent.pop((warp, slot))
            if (self.registers(np.array([warp]), (slot,)) == _NOTHING).all():
                self._assign(warp, (slot,), [held])
            else:
                detail = f"registers of A were written before the wait ({wave.who(warp * 32)})"
                wave.launch.findings.add("wgmma", product.ins.text, detail)  # type: ignore[attr-defined]
        key = warp, product.sums
        if self._last.get(key) is product:
            del self._last[key]
            self._assign(warp, product.sums, product.values)
            self._values[key] = product.values

    def describe(self) -> list[str]:
        return [
            f"a wgmma is waited for that not all warps of the warpgroup have issued ({self.wave.who(warp * 32)})"
            for warp in sorted(self._waiting)
        ]

    # What is the same for all of a block

    def keep_registers(self, warps: np.ndarray, count: int) -> None:
        self._kept[warps] = count

    def finish(self) -> None:
        """All threads have exited."""
        wave = self.wave
        per_block = self._issued.reshape(len(wave.blocks), -1)
        for first in range(0, wave.warps_per_block, WARPGROUP):
            group = per_block[:, first : first + WARPGROUP]
            if group.any() and (group.shape[1] < WARPGROUP or (group != group[:, :1]).any()):
                detail = f"the warps from {first} on issued {group.tolist()} wgmma, not the same number each of four"
                wave.launch.findings.add("divergence", "wgmma", detail)
        if self._kept.any():
            threads = wave.lanes_per_block
            launched = min(REGISTERS // threads // 8 * 8, 255)
            kept = np.where(self._kept > 0, self._kept, launched).reshape(len(wave.blocks), -1).sum(axis=1) * 32
            if kept.max() > launched * threads:
                detail = f"{kept.max()} registers asked for, {launched} for each of {threads} threads at the launch"
                wave.launch.findings.add("deadlock", "setmaxnreg", detail)
