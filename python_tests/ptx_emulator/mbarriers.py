"""mbarrier objects: arrivals, announced bytes, phases, and who sleeps until one ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .wave import Wave

COLUMNS = 64  # of the clocks, for the copies that report to barriers: how many barriers a block may make
PATIENCE = 16  # how often everybody may have waited in vain
MOST_BYTES = (1 << 20) - 1


@dataclass
class _Barrier:
    column: int
    expected: int  # arrivals for a phase
    pending: int
    clock: np.ndarray  # what those knew who have arrived in this phase
    opened: np.ndarray  # what those knew who arrived in the last one that ended
    bytes: int = 0  # announced and not landed
    phase: int = 0  # phases that have ended


class Mbarriers:
    """A barrier is found by block (its number in the wave) and address. Lanes are the wave's numbers.

    Copies that report to a barrier have a column of the clocks to themselves, in which a tick is the number of the
    phase that waits for them: who waits for a phase knows the copies of it.
    """

    def __init__(self, wave: Wave):
        self.wave = wave
        self._barriers: dict[tuple[int, int], _Barrier] = {}
        self._made = np.zeros(len(wave.blocks), np.int64)
        self._asleep: dict[tuple[int, int], list[np.ndarray]] = {}
        self._timed_out = np.zeros(wave.lanes, bool)
        self._vain = 0
        self._seen_progress = -1

    def _find(self, ins, lane: int, address: int) -> tuple[tuple[int, int], _Barrier]:
        key = int(self.wave.local_block[lane]), int(address)
        if key not in self._barriers:
            place = self.wave.shared.layout.describe(int(address))
            raise self.wave.launch.findings.fatal("mbarrier", ins.text, f"no mbarrier was made at {place}")
        return key, self._barriers[key]

    def init(self, ins, lanes: np.ndarray, addresses: np.ndarray, counts: np.ndarray) -> None:
        wave = self.wave
        for lane, address, count in zip(lanes.tolist(), addresses.tolist(), counts.tolist(), strict=True):
            block = int(wave.local_block[lane])
            known = self._barriers.get((block, address))
            column = known.column if known else int(self._made[block])
            self._made[block] += known is None
            if column == COLUMNS or count == 0 or (block, address) in self._asleep:
                detail = f"{count} arrivals, {column} barriers in the block before it, or somebody waits at the old one"
                raise wave.launch.findings.fatal("mbarrier", ins.text, f"{detail} ({wave.who(lane)})")
            zero = np.zeros(wave.columns, np.uint32)
            phase = known.phase if known else 0  # goes on: ticks must not come twice
            phase += phase & 1
            self._barriers[block, address] = _Barrier(column, count, count, zero, zero.copy(), 0, phase)

    def invalidate(self, ins, lanes: np.ndarray, addresses: np.ndarray) -> None:
        for lane, address in zip(lanes.tolist(), addresses.tolist(), strict=True):
            key, barrier = self._find(ins, lane, address)
            if barrier.bytes or key in self._asleep:
                raise self.wave.launch.findings.fatal("mbarrier", ins.text, "somebody still waits, or bytes are due")

    def arrive(self, ins, lanes: np.ndarray, addresses: np.ndarray, counts, announced) -> np.ndarray:
        """Announces first, then arrives, a lane after the other; the phases that they arrived in."""
        wave = self.wave
        counts, announced = (np.broadcast_to(x, lanes.shape).tolist() for x in (counts, announced))
        phases = np.zeros(len(lanes), np.uint64)
        for i, (lane, address) in enumerate(zip(lanes.tolist(), addresses.tolist(), strict=True)):
            key, barrier = self._find(ins, lane, address)
            phases[i] = barrier.phase
            barrier.bytes += announced[i]
            warp = wave.clock[key[0], lane % wave.lanes_per_block // 32]
            if counts[i]:
                np.maximum(barrier.clock, warp, out=barrier.clock)
            barrier.pending -= counts[i]
            if barrier.pending < 0 or abs(barrier.bytes) > MOST_BYTES:
                detail = f"{-barrier.pending} arrivals too many, or {barrier.bytes} bytes due ({wave.who(lane)})"
                raise wave.launch.findings.fatal("mbarrier", ins.text, detail)
            self._advance(key, barrier)
        warps = np.unique(lanes // 32)
        wave.tick(warps)
        wave.progress += 1
        return phases

    def column(self, ins, lane: int, address: int) -> tuple[int, int]:
        """The clocks' column and the tick of copies that report to the barrier's present phase."""
        _, barrier = self._find(ins, lane, address)
        return self.wave.readers + barrier.column, barrier.phase + 1

    def landed(self, block: int, address: int, bytes_: int) -> None:
        barrier = self._barriers[block, address]
        barrier.bytes -= bytes_
        self._advance((block, address), barrier)
        self.wave.progress += 1

    def _advance(self, key: tuple[int, int], barrier: _Barrier) -> None:
        if barrier.pending or barrier.bytes:
            return
        barrier.phase += 1
        barrier.pending = barrier.expected
        np.maximum(barrier.opened, barrier.clock, out=barrier.opened)
        barrier.opened[self.wave.readers + barrier.column] = barrier.phase
        for lanes in self._asleep.pop(key, ()):
            self.wave.ready[lanes] = True

    # Waiting

    def ended(self, ins, lanes: np.ndarray, addresses: np.ndarray, parities: np.ndarray) -> np.ndarray:
        """For which lanes the phase of the parity has ended; they know then what those knew who arrived."""
        wave = self.wave
        result = np.zeros(len(lanes), bool)
        for i, (lane, address) in enumerate(zip(lanes.tolist(), addresses.tolist(), strict=True)):
            key, barrier = self._find(ins, lane, address)
            result[i] = barrier.phase & 1 != parities[i] & 1
            if result[i]:
                warp = wave.clock[key[0], lane % wave.lanes_per_block // 32]
                np.maximum(warp, barrier.opened, out=warp)
        return result

    def excused(self, lanes: np.ndarray) -> np.ndarray:
        """Which of these need not sleep: their time is up."""
        up = self._timed_out[lanes]
        self._timed_out[lanes] = False
        if self.wave.scheduler.gives_up():
            up |= True
        return up

    def sleep(self, lanes: np.ndarray, addresses: np.ndarray) -> None:
        self.wave.ready[lanes] = False
        for address in np.unique(addresses):
            these = lanes[addresses == address]
            for block in np.unique(self.wave.local_block[these]):
                key = int(block), int(address)
                self._asleep.setdefault(key, []).append(these[self.wave.local_block[these] == block])

    def time_out(self) -> bool:
        """Nobody can go on: those who sleep are told that the time is up. False if that has not helped."""
        self._vain = self._vain + 1 if self._seen_progress == self.wave.progress else 0
        self._seen_progress = self.wave.progress
        if not self._asleep or self._vain > PATIENCE:
            return False
        for waiting in self._asleep.values():
            for lanes in waiting:
                self.wave.ready[lanes] = True
                self._timed_out[lanes] = True
        self._asleep.clear()
        return True

    def places(self, block: int) -> np.ndarray:
        """Addresses of the block's barriers."""
        return np.array([address for at, address in self._barriers if at == block], np.int64)

    def describe(self) -> list[str]:
        wave = self.wave
        lines = []
        for (block, address), waiting in self._asleep.items():
            barrier = self._barriers[block, address]
            warps = sorted({int(lane) % wave.lanes_per_block // 32 for lanes in waiting for lane in lanes})
            lines.append(
                f"warps {warps} of block {wave.launch.block_name(int(wave.blocks[block]))} wait at the mbarrier at "
                f"{wave.shared.layout.describe(address)}: {barrier.phase} phases ended, {barrier.pending} of "
                f"{barrier.expected} arrivals and {barrier.bytes} bytes missing"
            )
        return lines
