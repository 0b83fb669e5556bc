"""bar.sync, bar.arrive and what becomes of warps that nobody releases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .findings import Abandoned

if TYPE_CHECKING:
    from .wave import Wave

BARRIERS = 16
CLUSTER = 16  # a number of its own for barrier.cluster: clusters have one block


class Barriers:
    def __init__(self, wave: Wave):
        self.wave = wave
        blocks, warps = len(wave.blocks), wave.warps_per_block
        self.arrived = np.zeros((BARRIERS + 1, blocks, warps), bool)
        self.waiting = np.zeros((BARRIERS + 1, blocks, warps), bool)  # arrived by bar.sync, not by bar.arrive
        self.expected = np.zeros((BARRIERS + 1, blocks), np.int64)  # threads; 0 means every thread that has not exited
        self.opened = np.zeros((blocks, wave.columns), np.uint32)  # what the cluster barrier's arrivals knew
        self.in_use: set[int] = set()

    def arrive(self, ins, lanes: np.ndarray, barrier: int, threads: int, wait: bool) -> None:
        """These lanes, whole warps, arrive at a barrier of their blocks."""
        wave = self.wave
        executing = np.zeros(wave.lanes, bool)
        executing[lanes] = True
        warps = executing.reshape(-1, 32).any(axis=1)
        here = warps.reshape(-1, wave.warps_per_block)
        if not 0 <= barrier <= CLUSTER or threads % 32:
            raise wave.launch.findings.fatal("divergence", ins.text, f"barrier {barrier} for {threads} threads")
        self.in_use.add(barrier)
        again = self.arrived[barrier] & here
        if again.any():
            raise wave.launch.findings.fatal(
                "divergence", ins.text, f"a warp arrives at barrier {barrier} twice before it opens"
            )
        self.arrived[barrier] |= here
        self.expected[barrier][here.any(axis=1)] = threads
        if wait:
            self.waiting[barrier] |= here
            wave.ready[lanes] = False
        self.release()

    def wait_cluster(self, lanes: np.ndarray) -> None:
        """These lanes, whole warps, have arrived before."""
        wave = self.wave
        for warp in np.unique(lanes // 32).tolist():
            block, own = divmod(warp, wave.warps_per_block)
            if self.arrived[CLUSTER, block, own]:
                self.waiting[CLUSTER, block, own] = True
                wave.ready[warp * 32 : warp * 32 + 32] = False
            else:
                np.maximum(wave.clock[block, own], self.opened[block], out=wave.clock[block, own])

    def release(self) -> None:
        """Opens the barriers whose last warp has arrived or exited."""
        wave = self.wave
        if not self.in_use:
            return
        alive = ~wave.done.reshape(len(wave.blocks), wave.warps_per_block, 32).all(axis=2)
        for barrier in sorted(self.in_use):
            arrived = self.arrived[barrier]
            everyone = (arrived | ~alive).all(axis=1)
            counted = arrived.sum(axis=1) * 32 >= self.expected[barrier]
            opens = np.where(self.expected[barrier] > 0, counted, everyone) & arrived.any(axis=1)
            if not opens.any():
                continue
            joined = self._join(arrived & opens[:, None], self.waiting[barrier] & opens[:, None])
            if barrier == CLUSTER:
                np.maximum(self.opened, joined, out=self.opened)
            wave.progress += 1
            released = np.repeat((self.waiting[barrier] & opens[:, None]).reshape(-1), 32)
            wave.ready |= released & ~wave.done
            arrived[opens] = False
            self.waiting[barrier][opens] = False
            if not arrived.any():
                self.in_use.discard(barrier)

    def _join(self, arrived: np.ndarray, waiting: np.ndarray) -> np.ndarray:
        """Those who wait learn what those who arrived knew; everyone who arrived starts a new tick."""
        clock = self.wave.clock
        joined = np.where(arrived[:, :, None], clock, 0).max(axis=1)
        np.maximum(clock, joined[:, None, :], out=clock, where=waiting[:, :, None])
        diagonal = np.arange(clock.shape[1])
        clock[:, diagonal, diagonal] += arrived
        return joined

    def deadlock(self, lines: list[str]) -> Abandoned:
        """`lines`: what is known of those who wait elsewhere."""
        wave = self.wave
        for barrier in sorted(self.in_use):
            block = int(np.argmax(self.arrived[barrier].any(axis=1)))
            waiting = np.flatnonzero(self.waiting[barrier, block]).tolist()
            expected = int(self.expected[barrier, block]) or "all"
            lines.append(
                f"warps {waiting} of block {wave.launch.block_name(int(wave.blocks[block]))} wait at barrier {barrier} "
                f"for {expected} threads"
            )
        stuck = int(np.argmax(~wave.done))
        at = wave.program.kernel.instructions[max(int(wave.pcs[stuck]) - 1, 0)]
        return wave.launch.findings.fatal("deadlock", at.text, "; ".join(lines))
