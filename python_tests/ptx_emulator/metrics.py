"""Counts that a profiler would give: instructions, shared memory wavefronts, global memory sectors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .wave import Wave

# Requests measured per instruction and launch: patterns repeat, and measuring costs as much as executing.
SAMPLED_REQUESTS = 1024
_SECTOR = np.uint64(5)


@dataclass
class Traffic:
    requests: int = 0  # one per warp and instruction
    actual: int = 0
    ideal: int = 0

    @property
    def ratio(self) -> float:
        """1.0 is as good as it gets."""
        return self.actual / self.ideal if self.ideal else 1.0


@dataclass
class KernelMetrics:
    launches: int = 0
    blocks: int = 0
    warp_instructions: int = 0
    instructions: Counter[str] = field(default_factory=Counter)  # by full opcode, per warp
    shared: dict[str, Traffic] = field(default_factory=dict)  # wavefronts, by instruction text
    global_: dict[str, Traffic] = field(default_factory=dict)  # 32-byte sectors, by instruction text

    @staticmethod
    def _total(parts: dict[str, Traffic]) -> Traffic:
        return Traffic(
            sum(part.requests for part in parts.values()),
            sum(part.actual for part in parts.values()),
            sum(part.ideal for part in parts.values()),
        )

    @property
    def bank_conflict_ratio(self) -> float:
        return self._total(self.shared).ratio

    @property
    def sector_ratio(self) -> float:
        return self._total(self.global_).ratio

    def count(self, opcode: str) -> int:
        """Warp instructions whose opcode starts with this, such as "mma" or "cp.async"."""
        return sum(n for name, n in self.instructions.items() if name.startswith(opcode))

    def worst(self, parts: dict[str, Traffic]) -> list[tuple[float, str]]:
        return sorted(((part.ratio, text) for text, part in parts.items()), reverse=True)

    def global_request(self, wave: Wave, ins, addresses: np.ndarray, width: int) -> None:
        part = self.global_.setdefault(ins.text, Traffic())
        if part.requests >= SAMPLED_REQUESTS:
            return
        sectors = wave.by_warp((addresses >> _SECTOR).astype(np.int64))
        distinct, active = _distinct(sectors)
        part.requests += len(distinct)
        part.actual += int(distinct.sum())
        part.ideal += int(np.minimum(distinct, -(-active * width // 32)).sum())

    def shared_request(self, wave: Wave, ins, addresses: np.ndarray, width: int) -> None:
        """Wide accesses go in phases of as many lanes as fill the 32 banks."""
        part = self.shared.setdefault(ins.text, Traffic())
        if part.requests >= SAMPLED_REQUESTS:
            return
        by_warp = wave.by_warp(addresses.astype(np.int64))
        part.requests += int((by_warp >= 0).any(axis=1).sum())
        self._wavefronts(part, by_warp, width)

    @staticmethod
    def _wavefronts(part: Traffic, by_warp: np.ndarray, width: int) -> None:
        lanes = min(32, 128 // width)
        words = max(width // 4, 1)
        phases = by_warp.reshape(-1, lanes)
        phases = phases[(phases >= 0).any(axis=1)]
        touched = np.where(phases[:, :, None] >= 0, (phases[:, :, None] >> 2) + np.arange(words), -1)
        touched = np.sort(touched.reshape(len(phases), -1), axis=1)
        fresh = np.ones(touched.shape, bool)
        fresh[:, 1:] = touched[:, 1:] != touched[:, :-1]
        fresh &= touched >= 0
        rows = np.broadcast_to(np.arange(len(phases))[:, None], touched.shape)
        banks = np.bincount((rows * 32 + (touched & 31))[fresh], minlength=len(phases) * 32).reshape(-1, 32)
        part.actual += int(banks.max(axis=1).sum())
        part.ideal += len(phases)


def _distinct(by_warp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values and active lanes per warp; -1 stands for an inactive lane."""
    ordered = np.sort(by_warp, axis=1)
    distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    idle = ordered[:, 0] == -1
    active = (by_warp >= 0).sum(axis=1)
    return distinct - idle, active


class MetricsByKernel(dict[str, KernelMetrics]):
    """Keyed by mangled name; any part of a name that fits one kernel finds it too."""

    def __missing__(self, part: str) -> KernelMetrics:
        found = [name for name in self if part in name]
        if len(found) != 1:
            raise KeyError(f"{part!r} fits {found or 'no kernel'} of {list(self)}")
        return self[found[0]]
