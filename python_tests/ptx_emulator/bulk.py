"""cp.async.bulk: copies by the asynchronous proxy, which land as late as the rules allow, or at random.

A load poisons its destination at the issue; its bytes are there, and reported to the mbarrier, when every warp waits
(seed 0) or at any time. A store reads at the issue, but the place counts as being read until it is waited for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .accesses import Accesses
from .memory import IN_FLIGHT
from .tensor_map import Cells

if TYPE_CHECKING:
    from .wave import Wave


@dataclass(eq=False)
class _Load:
    block: int
    index: np.ndarray  # 16-byte places in the wave's shared memory
    cells: Cells
    barrier: int  # address
    ins: object


@dataclass(eq=False)
class _Store:
    index: np.ndarray
    cells: Cells
    accesses: Accesses
    data: np.ndarray
    ins: object
    read: bool = False  # waited for as far as the reading goes


class BulkCopies:
    def __init__(self, wave: Wave):
        self.wave = wave
        self.loads: list[_Load] = []
        self._open: dict[int, list[_Store]] = {}  # by lane, not committed
        self._groups: dict[int, deque[list[_Store]]] = {}

    # Loads

    def load(self, ins, lane: int, target: int, cells: Cells, barrier: int) -> None:
        """`target` and `barrier` count from the start of the block's shared memory."""
        wave = self.wave
        accesses = Accesses(wave, np.full(len(cells.places), lane))
        # The barrier was made, and shown to this proxy.
        one = Accesses(wave, np.array([lane]))
        column, tick = wave.mbarriers.column(ins, lane, barrier)
        wave.shared_races.check_proxy(one, ins, one.unit.shared_offsets(ins, np.array([barrier]), 8, "use")[0], 8)
        index = accesses.unit.claim_shared(ins, target + cells.places, 16, generic=False)
        if index is None or not cells.check_source(ins, accesses):
            return
        wave.shared.fill(index, 16, IN_FLIGHT)
        wave.shared_races.stamp(
            wave.shared_races.granules(index * 16, 16),
            np.full(len(index), column),
            np.full(len(index), tick),
            generic=False,
        )
        self.loads.append(_Load(int(wave.local_block[lane]), index, cells, barrier, ins))

    def _land(self, load: _Load) -> None:
        self.loads.remove(load)
        self.wave.shared.scatter(load.index, 16, load.cells.read(self.wave.unit.memory).view(np.uint64).reshape(-1, 2))
        self.wave.mbarriers.landed(load.block, load.barrier, 16 * len(load.index))

    def land_at_random(self) -> None:
        for load in self.wave.scheduler.landing(self.loads):
            self._land(load)

    def land(self) -> bool:
        """Everybody waits: the oldest load of each block lands."""
        oldest: dict[int, _Load] = {}
        for load in self.loads:
            oldest.setdefault(load.block, load)
        for load in oldest.values():
            self._land(load)
        return bool(oldest)

    # Stores

    def store(self, ins, lane: int, source: int, cells: Cells) -> None:
        accesses = Accesses(self.wave, np.full(len(cells.places), lane))
        unit = accesses.unit
        offsets, sound = unit.shared_offsets(ins, source + cells.places, 16, "read")
        if not sound:
            return
        data = unit.read_shared(ins, source + cells.places, 16, generic=False)
        self.wave.shared.pin(offsets >> 4)
        store = _Store(offsets >> 4, cells, accesses, data, ins)
        self._open.setdefault(lane, []).append(store)

    def commit(self, lanes: np.ndarray) -> None:
        for lane in lanes.tolist():
            self._groups.setdefault(lane, deque()).append(self._open.pop(lane, []))

    def wait(self, lanes: np.ndarray, allowed: int, only_read: bool) -> None:
        for lane in lanes.tolist():
            groups = self._groups.get(lane, deque())
            for group in list(groups)[: max(len(groups) - allowed, 0)]:
                for store in group:
                    self._finish_reading(store)
                if not only_read:
                    self._write(groups.popleft())

    def _finish_reading(self, store: _Store) -> None:
        if store.read:
            return
        store.read = True
        self.wave.shared.unpin(store.index)
        self.wave.shared_races.on_read(store.accesses, store.ins, store.index * 16, 16)

    def _write(self, group: list[_Store]) -> None:
        for store in group:
            store.cells.write(store.ins, store.accesses, store.data)

    def finish(self) -> None:
        """All threads have exited."""
        for load in self.loads:
            detail = "the block ends while the copy is under way"
            self.wave.launch.findings.add("in flight", load.ins.text, detail)  # type: ignore[attr-defined]
        stores = [group for groups in self._groups.values() for group in groups] + list(self._open.values())
        for group in stores:
            for store in group:
                if not store.read:
                    detail = "the block ends without having waited until its shared memory was read"
                    self.wave.launch.findings.add("in flight", store.ins.text, detail)  # type: ignore[attr-defined]
            self._write(group)
