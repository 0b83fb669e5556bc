"""cp.async as unkindly as the rules allow: the destination is poisoned at once and filled at the last moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .memory import IN_FLIGHT, WRITTEN

if TYPE_CHECKING:
    from .wave import Wave


@dataclass
class _Copy:
    lanes: np.ndarray  # the wave's lane numbers
    group: np.ndarray  # per lane: its how manieth group
    destination: np.ndarray  # byte offsets in the wave's shared memory
    source: np.ndarray  # byte offsets in global memory
    filled: np.ndarray  # bytes read from the source; the rest becomes zero
    width: int

    def part(self, which: np.ndarray) -> _Copy:
        return _Copy(
            self.lanes[which],
            self.group[which],
            self.destination[which],
            self.source[which],
            self.filled[which],
            self.width,
        )


class AsyncCopies:
    def __init__(self, wave: Wave):
        self.wave = wave
        self.groups = np.zeros(wave.lanes, np.int64)  # committed so far
        self.pending: list[_Copy] = []

    def issue(self, ins, destination: np.ndarray, source: np.ndarray, width: int, filled: np.ndarray) -> None:
        """All arrays are over the executing lanes; `destination` counts from the start of the block's shared memory."""
        wave, unit = self.wave, self.wave.unit
        index = unit.claim_shared(ins, destination, width)
        if index is None:
            return
        wave.metrics.shared_request(wave, ins, destination, width)
        offsets = self._check_source(ins, source, width, filled)
        if offsets is None:
            return
        wave.shared.fill(index, width, IN_FLIGHT)
        lanes = wave.executing()
        shared_offsets = destination.astype(np.int64) + wave.pick(wave.slice.shared_base)
        self.pending.append(_Copy(lanes, self.groups[lanes], shared_offsets, offsets, filled, width))

    def _check_source(self, ins, source: np.ndarray, width: int, filled: np.ndarray) -> np.ndarray | None:
        wave, memory = self.wave, self.wave.unit.memory
        offsets = (source - np.uint64(memory.base)).view(np.int64)
        # Lanes that fill with zeros need not point anywhere. The rare ones that read a part are checked byte by byte.
        reads = [(filled == width, 0, width)]
        partly = (filled > 0) & (filled < width)
        if partly.any():
            if (source[partly] & np.uint64(width - 1)).any():
                wave.report("misaligned", ins, f"source of a {width}-byte copy", int(np.argmax(partly)))
            reads += [(partly & (filled > byte), byte, 1) for byte in range(width)]
        saved = wave.mask
        sound = True
        for which, byte, size in reads:
            if which.any():
                wave.narrow(which)
                sound &= wave.unit.readable(ins, source[which] + np.uint64(byte), size)[1] is None
                wave.mask = saved
        return offsets if sound else None

    def commit(self) -> None:
        self.groups[self.wave.executing()] += 1

    def wait(self, allowed: int) -> None:
        """The executing lanes wait until at most `allowed` of their newest groups are under way."""
        lanes = self.wave.executing()
        oldest_left = np.full(self.wave.lanes, -1, np.int64)
        oldest_left[lanes] = self.groups[lanes] - allowed
        self._land(oldest_left)

    def wait_all(self) -> None:
        self.commit()
        self.wait(0)

    def _land(self, before: np.ndarray) -> None:
        left = []
        for copy in self.pending:
            lands = copy.group < before[copy.lanes]
            if lands.all():
                self._complete(copy)
            elif lands.any():
                self._complete(copy.part(lands))
                left.append(copy.part(~lands))
            else:
                left.append(copy)
        self.pending = left

    def _complete(self, copy: _Copy) -> None:
        wave = self.wave
        shared, memory = wave.shared, wave.unit.memory
        span = np.arange(copy.width)
        inside = span < copy.filled[:, None]
        source = np.where(inside, copy.source[:, None] + span, 0)
        target = copy.destination[:, None] + span
        shared.data[target] = np.where(inside, memory.data[source], 0)
        shared.state[target] = WRITTEN
        # The bytes appear now, to the threads that waited: others need a barrier from here on, not from the issue.
        warp = wave.warp_in_block[copy.lanes]
        ticks = wave.clock.take(wave.clock_row[copy.lanes] + warp)
        granules = wave.shared_races.granules(copy.destination, copy.width)
        wave.shared_races.stamp(granules, warp, ticks)
