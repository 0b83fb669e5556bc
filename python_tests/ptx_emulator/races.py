"""Data races by vector clocks.

Each warp has a clock per warp of its block: how much of that warp's past it has waited for. A barrier joins the clocks
of the warps it releases and starts a new tick for each. An access is stamped with its warp and that warp's tick; a
later access that conflicts with it is ordered behind it only if its warp has waited for that tick. This does not depend
on the order in which the emulator happened to run the two: a race is found even when the values come out right.

Blocks of one launch have no order at all. Stamps are kept per granule, the narrowest access of the kernel: two warps
may write neighbouring bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import sparse_zeros

if TYPE_CHECKING:
    from .wave import Wave

_MANY = np.uint32(0xFFFFFFFF)


class _Stamps:
    def __init__(self, size: int, granule: int):
        self.granule = granule
        self.shift = granule.bit_length() - 1
        self.count = -(-size // 16) * 16 // granule + 16

    def granules(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """One row of granule indices per access."""
        first = (offsets >> offsets.dtype.type(self.shift)).astype(np.int64)
        count = max(width // self.granule, 1)
        return first[:, None] + np.arange(count)


class GlobalRaces(_Stamps):
    """Stamps of one launch. Exact between blocks; within a block only the last reader of a place is remembered."""

    def __init__(self, size: int, granule: int):
        super().__init__(size, granule)
        self.writer = sparse_zeros(self.count, np.uint32)  # the grid's warp number plus one
        self.write_tick = sparse_zeros(self.count, np.uint32)
        self.atomic = sparse_zeros(self.count, np.uint8)
        self.reading_block = sparse_zeros(self.count, np.uint32)  # plus one, or _MANY
        self.reader = sparse_zeros(self.count, np.uint32)
        self.read_tick = sparse_zeros(self.count, np.uint32)

    def _unordered(self, wave: Wave, who: np.ndarray, tick: np.ndarray) -> np.ndarray | None:
        """Which earlier accesses the active lanes' warps have not waited for."""
        known = who != 0
        if not known.any():
            return None
        relative = who.astype(np.int64) - wave.pick(wave.slice.first_warp)[:, None] - 1
        same_block = (relative >= 0) & (relative < wave.warps_per_block)
        row = wave.pick(wave.slice.clock_row)[:, None]
        waited = wave.clock.take(row + np.where(same_block, relative, 0))
        return known & (~same_block | (tick > waited))

    def _report(
        self, wave: Wave, ins, bad: np.ndarray, granules: np.ndarray, what: str, who: np.ndarray | None
    ) -> None:
        at = np.unravel_index(int(np.argmax(bad)), bad.shape)
        offset = int(granules[at]) << self.shift
        other = ""
        if who is not None:
            warp = int(who[at]) - 1
            other = f" of warp {warp % wave.warps_per_block} of block {warp // wave.warps_per_block}"
        place = wave.launch.memory.describe(offset)
        wave.report("race", ins, f"{what}{other}, no synchronisation between: {place}", int(at[0]))

    def on_read(self, wave: Wave, ins, offsets: np.ndarray, width: int) -> None:
        granules = self.granules(offsets, width)
        who = self.writer.take(granules)
        bad = self._unordered(wave, who, self.write_tick.take(granules))
        if bad is not None and bad.any():
            self._report(wave, ins, bad, granules, "read after the write", who)
        block = wave.pick(wave.slice.block_number)[:, None]
        readers = self.reading_block.take(granules)
        self.reading_block[granules] = np.where((readers == 0) | (readers == block), block, _MANY)
        # Two blocks of the wave may have read the place in this very instruction.
        lost = self.reading_block.take(granules)
        if not ((lost == block) | (lost == _MANY)).all():
            self.reading_block[granules[(lost != block)]] = _MANY
        self.reader[granules] = wave.pick(wave.slice.warp_number)[:, None]
        self.read_tick[granules] = wave.own_ticks()[:, None]

    def on_write(self, wave: Wave, ins, offsets: np.ndarray, width: int, atomic: bool = False) -> None:
        granules = self.granules(offsets, width)
        who = self.writer.take(granules)
        bad = self._unordered(wave, who, self.write_tick.take(granules))
        if bad is not None and atomic:
            bad &= self.atomic.take(granules) == 0
        if bad is not None and bad.any():
            self._report(wave, ins, bad, granules, "write after the write", who)
        readers = self.reading_block.take(granules)
        if readers.any():
            block = wave.pick(wave.slice.block_number)[:, None]
            bad = (readers != 0) & (readers != block)
            if bad.any():
                self._report(wave, ins, bad, granules, "write of a place that another block has read", None)
            who = self.reader.take(granules)
            bad = self._unordered(wave, np.where(bad, 0, who), self.read_tick.take(granules))
            if bad is not None and bad.any():
                self._report(wave, ins, bad, granules, "write after the read", who)
        me = wave.pick(wave.slice.warp_number)[:, None]
        self.writer[granules] = me
        self.write_tick[granules] = wave.own_ticks()[:, None]
        self.atomic[granules] = atomic
        if not atomic:
            collided = self.writer.take(granules) != me
            if collided.any():
                self._report(wave, ins, collided, granules, "write beside the write", self.writer.take(granules))


class SharedRaces(_Stamps):
    """Stamps of a wave's shared memory, exact: every warp's last read of every granule is kept."""

    def __init__(self, size: int, granule: int, warps: int, readers: int, columns: int):
        super().__init__(size, granule)
        self.warps = warps
        # Of the clocks: warps, products of warpgroups, then copies that report to mbarriers. The latter do not read.
        self.readers = readers
        self.columns = columns
        self.writer = sparse_zeros(self.count, np.int64)
        self.write_tick = sparse_zeros(self.count, np.uint32)
        self.atomic = sparse_zeros(self.count, np.uint8)
        self.reads = sparse_zeros(self.count * readers, np.uint32).reshape(-1, readers)
        self.generic = sparse_zeros(self.count, np.uint8)  # written by ordinary stores
        # The proxy fence that followed them: whose, by column of the clocks, and its tick; 0 for none.
        self.fence_column = sparse_zeros(self.count, np.int64)
        self.fence_tick = sparse_zeros(self.count, np.uint32)

    def _report(self, wave: Wave, ins, bad: np.ndarray, offsets: np.ndarray, what: str, warp: int) -> None:
        lane = int(np.argmax(bad))
        who = f"warp {warp}" if warp < self.warps else "an asynchronous operation"
        detail = f"{what} of {who}, no barrier between: {self._place(wave, int(offsets[lane]), lane)}"
        wave.report("race", ins, detail, lane)

    @staticmethod
    def _place(wave: Wave, offset: int, lane: int) -> str:
        return wave.shared.layout.describe(offset - int(wave.pick(wave.slice.shared_base)[lane]))

    def _after_write(self, wave: Wave, ins, offsets, granules, what: str, atomic: bool = False) -> None:
        who = self.writer.take(granules)
        waited = wave.clock.take(wave.pick(wave.slice.clock_row)[:, None] + who)
        bad = self.write_tick.take(granules) > waited
        if atomic:
            bad &= self.atomic.take(granules) == 0
        if bad.any():
            at = np.unravel_index(int(np.argmax(bad)), bad.shape)
            self._report(wave, ins, bad.any(axis=1), offsets, f"{what} after the write", int(who[at]))

    def on_read(self, wave: Wave, ins, offsets: np.ndarray, width: int) -> None:
        self.check_read(wave, ins, offsets, width)
        self.stamp_reads(offsets, width, wave.pick(wave.slice.warp_in_block)[:, None], wave.own_ticks()[:, None])

    def check_read(self, wave: Wave, ins, offsets: np.ndarray, width: int) -> None:
        self._after_write(wave, ins, offsets, self.granules(offsets, width), "read")

    def stamp_reads(self, offsets: np.ndarray, width: int, column, tick) -> None:
        self.reads.reshape(-1)[self.granules(offsets, width) * self.readers + column] = tick

    def on_write(self, wave: Wave, ins, offsets: np.ndarray, width: int, atomic: bool = False) -> None:
        granules = self.granules(offsets, width)
        self._after_write(wave, ins, offsets, granules, "write", atomic)
        rows = wave.clock.reshape(-1, self.columns).take(wave.pick(wave.slice.clock_row) // self.columns, axis=0)
        bad = self.reads.take(granules, axis=0) > rows[:, None, : self.readers]
        if bad.any():
            at = np.unravel_index(int(np.argmax(bad)), bad.shape)
            self._report(wave, ins, bad.any(axis=(1, 2)), offsets, "write after the read", int(at[2]))
        self.stamp(granules, wave.pick(wave.slice.warp_in_block), wave.own_ticks(), atomic)
        if not atomic:
            warp = wave.pick(wave.slice.warp_in_block)[:, None]
            now = self.writer.take(granules)
            if (now != warp).any():
                at = np.unravel_index(int(np.argmax(now != warp)), now.shape)
                self._report(wave, ins, (now != warp).any(axis=1), offsets, "write beside the write", int(now[at]))

    def stamp(
        self, granules: np.ndarray, warp: np.ndarray, ticks: np.ndarray, atomic: bool = False, generic: bool = True
    ) -> None:
        """`warp`: the column of the clocks that the ticks belong to."""
        self.writer[granules] = warp[:, None]
        self.write_tick[granules] = ticks[:, None]
        self.atomic[granules] = atomic
        self.generic[granules] = generic
        self.fence_tick[granules] = 0

    # The asynchronous proxy, by which TMA and wgmma read: it need not see ordinary stores but for a proxy fence, by
    # whichever warp, between the store and the read.

    def check_proxy(self, wave: Wave, ins, offsets: np.ndarray, width: int) -> None:
        granules = self.granules(offsets, width)
        generic = self.generic.take(granules) != 0
        if not generic.any():
            return
        tick = self.fence_tick.take(granules)
        waited = wave.clock.take(wave.pick(wave.slice.clock_row)[:, None] + self.fence_column.take(granules))
        unseen = generic & ((tick == 0) | (tick > waited))
        if unseen.any():
            lane = int(np.argmax(unseen.any(axis=1)))
            place = self._place(wave, int(offsets[lane]), lane)
            wave.report("proxy", ins, f"no proxy fence between ordinary stores and the use of {place}", lane)

    def publish(self, column: int, clock: np.ndarray, granules: np.ndarray) -> None:
        """A proxy fence of a warp with this clock, for all stores that it made or knows of."""
        granules = granules[self.generic[granules] != 0]
        fresh = (self.fence_tick[granules] == 0) | (self.fence_tick[granules] > clock[self.fence_column[granules]])
        granules = granules[fresh & (self.write_tick[granules] <= clock[self.writer[granules]])]
        self.fence_column[granules] = column
        self.fence_tick[granules] = clock[column]
