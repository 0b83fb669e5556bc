"""Counts of caches and of the service in the form of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vista_ext._extras import require
from vista_ext.store.metrics import BOUNDS, CacheStats, Latency

prometheus = require("prometheus_client", extra="serve")
_core = require("prometheus_client.core", extra="serve")

_COUNTS = {
    "hits": "users whose summary was in a slot",
    "misses": "users whose summary had to be read from the store",
    "stale": "users whose summary was overdue and served all the same, because the store did not answer",
    "unknown": "users that the store has no usable summary of",
    "failures": "reads that the store did not answer",
    "refreshed": "summaries replaced by pushed ones",
    "evictions": "users who lost their slot to others",
}


class CacheCollector:
    """What hot caches have done, asked at each scrape: `registry.register(CacheCollector(lambda: [cache.stats()]))`.

    Args:
        stats: of the caches of this process, or of its workers; they are summed.
        name: of the metrics' beginning.
    """

    def __init__(self, stats: Callable[[], Iterable[CacheStats]], name: str = "vista_cache") -> None:
        self._stats, self._name = stats, name

    def collect(self) -> Iterator[Any]:
        """As prometheus_client asks a collector."""
        all_stats = list(self._stats())
        for name, what in _COUNTS.items():
            count = sum(getattr(stats, name) for stats in all_stats)
            yield _core.CounterMetricFamily(f"{self._name}_{name}", what, value=count)
        users = sum(stats.users for stats in all_stats)
        yield _core.GaugeMetricFamily(f"{self._name}_users", "users who have a slot", value=users)
        for name, what in (("gather", "bringing users into slots, reads included"), ("read", "reading the store")):
            yield _histogram(f"{self._name}_{name}_seconds", what, [getattr(stats, name) for stats in all_stats])


def _histogram(name: str, what: str, latencies: list[Latency]) -> Any:
    counts = [sum(latency.counts[i] for latency in latencies) for i in range(len(BOUNDS) + 1)]
    buckets = [*zip(map(str, BOUNDS), counts, strict=False), ("+Inf", counts[-1])]
    total = sum(latency.total for latency in latencies)
    return _core.HistogramMetricFamily(name, what, buckets=buckets, sum_value=total)


class ServiceMetrics:
    """The service's own counts, and those of its workers' caches.

    Args:
        waiting: how many calls are waiting or worked on.
        stats: of the workers' caches.
    """

    def __init__(self, waiting: Callable[[], int], stats: Callable[[], Iterable[CacheStats]]) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        registry.register(CacheCollector(stats))
        counter, histogram = prometheus.Counter, prometheus.Histogram
        self.calls = counter("vista_calls", "calls of /score by status", ["status"], registry=registry)
        self.seconds = histogram("vista_call_seconds", "from arrival to answer", registry=registry, buckets=BOUNDS)
        self.work = histogram("vista_work_seconds", "in a worker", registry=registry, buckets=BOUNDS)
        self.candidates = counter("vista_candidates", "candidates scored", registry=registry)
        self.degraded = counter("vista_degraded_users", "users by reason", ["reason"], registry=registry)
        self.rejected = counter("vista_rejected", "calls refused or given up", ["reason"], registry=registry)
        ages = (60, 600, 3600, 7200, 14400, 86400, 604800)
        self.ages = histogram("vista_summary_age_seconds", "since event times", registry=registry, buckets=ages)
        prometheus.Gauge("vista_open_calls", "calls waiting or at work", registry=registry).set_function(waiting)
        self.ready = prometheus.Gauge("vista_ready", "1 if workers are ready", registry=registry)
        self.model = prometheus.Info("vista_model", "what is served", registry=registry)

    def text(self) -> tuple[bytes, str]:
        """The page for a scrape, and its content type."""
        return prometheus.generate_latest(self.registry), prometheus.CONTENT_TYPE_LATEST
