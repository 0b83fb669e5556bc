"""Counts and latencies as plain numbers, in the form that Prometheus takes: counters and cumulative buckets."""

from __future__ import annotations

import bisect
import threading
from dataclasses import dataclass, field

# Seconds, from a lookup in memory to a server in trouble.
BOUNDS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Latency:
    """Durations that were observed.

    Args:
        counts: how many took at most each of `BOUNDS`, and in the end how many there were.
        total: seconds, of all together.
    """

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    total: float = 0.0

    @property
    def count(self) -> int:
        """How many there were."""
        return self.counts[-1]

    def quantile(self, q: float) -> float:
        """An upper bound of the q-quantile: the bucket that it lies in; infinity behind the last, 0 of none."""
        if self.count == 0:
            return 0.0
        at = bisect.bisect_left(self.counts, q * self.count)
        return BOUNDS[at] if at < len(BOUNDS) else float("inf")


@dataclass
class LatencyRecorder:
    """Where threads put durations."""

    _counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    _total: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        with self._lock:
            self._counts[bisect.bisect_left(BOUNDS, seconds)] += 1
            self._total += seconds

    def snapshot(self) -> Latency:
        """What was observed until now."""
        with self._lock:
            counts, total = list(self._counts), self._total
        for i in range(1, len(counts)):
            counts[i] += counts[i - 1]
        return Latency(tuple(counts), total)


@dataclass(frozen=True)
class CacheStats:
    """What a cache has done until now.

    Args:
        hits, misses: users of requests (each counted once in a request) whose summary was in a slot, or had to be read.
        stale: users whose summary was overdue and served all the same, because the store did not answer.
        unknown: users that the store has no usable summary of.
        failures: reads that the store did not answer.
        refreshed: summaries replaced by `update`.
        evictions: users who lost their slot to others.
        users: who have a slot now.
        gather: durations of `gather`, reads included; read: of the reads from the store alone.
    """

    hits: int
    misses: int
    stale: int
    unknown: int
    failures: int
    refreshed: int
    evictions: int
    users: int
    gather: Latency
    read: Latency

    @property
    def hit_rate(self) -> float:
        """Hits of all; 0 of none."""
        return self.hits / max(1, self.hits + self.misses)
