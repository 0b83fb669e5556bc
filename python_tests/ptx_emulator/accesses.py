"""Stands in for the wave where one thread's or one warp's instruction makes many accesses to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import MemoryUnit

if TYPE_CHECKING:
    from .wave import Wave


class Accesses:
    """What MemoryUnit, the race checks and the metrics ask of a wave, for accesses of given lanes instead of one each.

    `lanes`: for each access the wave's number of the lane that is answerable for it.
    """

    def __init__(self, wave: Wave, lanes: np.ndarray):
        self.lanes = lanes
        self.launch = wave.launch
        self.shared = wave.shared
        self.shared_races = wave.shared_races
        self.metrics = wave.metrics
        self.clock = wave.clock
        self.warps_per_block = wave.warps_per_block
        self.slice = wave.everybody
        self._who = wave.who
        self.unit = MemoryUnit(self)  # type: ignore[arg-type]

    def pick(self, array: np.ndarray) -> np.ndarray:
        return array[self.lanes]

    def own_ticks(self) -> np.ndarray:
        return self.clock.take(self.slice.own_clock[self.lanes])

    def by_warp(self, values: np.ndarray) -> np.ndarray:
        """By 32, as a copy engine goes through them."""
        rows = np.full(-(-len(values) // 32) * 32, -1, values.dtype)
        rows[: len(values)] = values
        return rows.reshape(-1, 32)

    def some(self, which: np.ndarray) -> Accesses:
        part = object.__new__(Accesses)
        part.__dict__.update(self.__dict__)
        part.lanes = self.lanes[which]
        part.unit = MemoryUnit(part)  # type: ignore[arg-type]
        return part

    def report(self, kind: str, ins, detail: str, access: int) -> None:
        self.launch.findings.add(kind, ins.text, f"{detail} ({self._who(int(self.lanes[access]))})")
