"""From measured costs to a billion users: bytes, refresh, requests a second, network, machines; arithmetic and a small
simulation of a queue.

    python -m bench.scaling results.json             # writes docs/scaling.md
    python -m bench.scaling results.json --print
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import costs, results
from bench.markdown import table
from bench.page import DOCS
from bench.results import Results
from vista_ext import _C
from vista_ext.models import PRESETS, VistaConfig

SCHEMES = "int8", "int4", "fp8_e4m3"
UTILIZATIONS = 0.3, 0.5, 0.7, 0.8, 0.9, 0.95
SERVERS = 1, 16, 64
PREDICTED = "one H100, bf16, **predicted**"
STORAGE = (
    "rows",
    "bytes a user",
    "TB, one copy",
    "refresh, GB/s a copy",
    "requests read, GB/s",
    "machines of it",
)
HISTORY = "mean events", "core: cached", "not", "factor", "saved", "GPU: cached", "not", "saved"


@dataclass(frozen=True)
class Fleet:
    """What is asked for, and what machines are taken to be. Assumptions, each printed on the page."""

    users: int = 1_000_000_000
    cadence: float = 7200.0  # seconds in which every summary is made anew
    history: int = 7_000  # mean events of a user
    candidates: int = 500  # of a request
    requests: float = 1_000_000.0  # a second, at the peak
    utilization: float = 0.7
    replicas: int = 3  # of the store
    cores: int = 64  # of a machine
    memory: float = 768e9  # of a machine, bytes for rows
    network: float = 3.1e9  # of a machine: 25 Gbit/s
    cached: float = 1.0  # share of requests that find a summary


@dataclass(frozen=True)
class Costs:
    """Seconds of one core, unless it is a GPU's."""

    per_event: float  # stage 1
    per_user: float  # what stage 1 costs a user however short the history is
    per_candidate: float  # stage 2
    per_request: float  # what stage 2 costs a request however few candidates there are

    def refresh(self, history: int) -> float:
        return self.per_user + self.per_event * history

    def request(self, candidates: int) -> float:
        return self.per_request + self.per_candidate * candidates


class NotMeasured(ValueError):
    """The results lack what this needs; says what to run."""


def measured(found: Results) -> Costs:
    """Of one core: a run on several takes as many core-seconds, none of them idle.

    Raises:
        NotMeasured: if the results have no requests over several lengths.
    """
    rows = [row for row in found.of("request") if "recompute_ms" in row]
    if len(rows) < 2:
        raise NotMeasured("no requests in these results: pytest bench/bench_serving.py --results FILE")
    threads = max(row["threads"] for row in rows)
    rows = sorted((row for row in rows if row["threads"] == threads), key=lambda row: row["events"])
    shortest, longest = rows[0], rows[-1]
    request = statistics.median(row["ours_ms"] for row in rows) / 1e3
    seconds = [threads * max(0.0, row["recompute_ms"] / 1e3 - request) for row in (shortest, longest)]
    per_event = (seconds[1] - seconds[0]) / (longest["events"] - shortest["events"])
    per_user = max(0.0, seconds[0] - per_event * shortest["events"])
    # A request's own part cannot be told from one number of candidates: all of it is taken to be theirs.
    return Costs(per_event, per_user, threads * request / longest["items"], 0.0)


def predicted_on_gpu(config: VistaConfig, users: int = 512, events: int = 2_000, candidates: int = 500) -> Costs:
    """Of an H100, bf16, large batches: by bench/costs.py, which no GPU has confirmed."""
    stage1 = sum(part.predicted for part in costs.summarize(users, events, config, 2))
    stage2 = sum(part.predicted for part in costs.scoring_request(users, candidates, config, 2))
    return Costs(stage1 / users / events, 0.0, stage2 / users / candidates, 0.0)


@dataclass(frozen=True)
class Plan:
    """What a fleet needs."""

    row_bytes: int
    stored: float  # bytes of one copy
    refreshed: float  # users a second
    written: float  # bytes a second into the store, one copy
    read: float  # bytes a second out of the store
    refresh_units: float  # cores, or GPUs
    request_units: float
    qps: float  # of a unit, at the utilization
    storage_machines: int


def plan(fleet: Fleet, cost: Costs, row_bytes: int) -> Plan:
    """The arithmetic. A request without a summary in the store pays for stage 1 itself."""
    refreshed = fleet.users / fleet.cadence if fleet.cached else 0.0
    request = cost.request(fleet.candidates) + (1 - fleet.cached) * cost.refresh(fleet.history)
    written, read = refreshed * row_bytes, fleet.requests * fleet.cached * row_bytes
    stored = float(fleet.users * row_bytes) if fleet.cached else 0.0
    by_memory = fleet.replicas * stored / fleet.memory
    by_network = (fleet.replicas * written + read) / (fleet.utilization * fleet.network)
    return Plan(
        row_bytes=row_bytes,
        stored=stored,
        refreshed=refreshed,
        written=written,
        read=read,
        refresh_units=refreshed * cost.refresh(fleet.history) / fleet.utilization,
        request_units=fleet.requests * request / fleet.utilization,
        qps=fleet.utilization / request,
        storage_machines=_up(max(by_memory, by_network)),
    )


def _up(value: float) -> int:
    return -int(-value // 1)


def saving(fleet: Fleet, cost: Costs, row_bytes: int) -> float:
    """The share of compute that caching spares: requests and refreshes with a store, against stage 1 in all."""
    cached, direct = (plan(replace(fleet, cached=share), cost, row_bytes) for share in (1.0, 0.0))
    return 1 - (cached.refresh_units + cached.request_units) / direct.request_units


def simulate(
    servers: int, utilization: float, service: Sequence[float], *, requests: int = 40_000, seed: int = 0
) -> tuple[float, float, float]:
    """p50, p99 and the mean wait of requests that arrive at random (Poisson) and take the first of the servers to be
    free, in the unit of `service`, from which service times are drawn."""
    rng = random.Random(seed)
    mean = sum(service) / len(service)
    rate = utilization * servers / mean
    free = [0.0] * servers
    now, latencies, waited = 0.0, [], 0.0
    for number in range(requests + requests // 10):
        now += rng.expovariate(rate)
        start = max(now, heapq.heappop(free))
        end = start + rng.choice(service)
        heapq.heappush(free, end)
        if number >= requests // 10:  # before that the queue fills
            latencies.append(end - now)
            waited += start - now
    latencies.sort()
    return latencies[requests // 2], latencies[requests * 99 // 100], waited / requests


def page(found: Results, fleet: Fleet | None = None) -> str:
    fleet = fleet or Fleet()
    config = PRESETS["production"]
    cpu, gpu = measured(found), predicted_on_gpu(config)
    rows = {scheme: _C.row_layout(scheme, config.num_seeds, config.dim, 0)["row_bytes"] for scheme in SCHEMES}
    values = fleet.users * config.num_seeds * config.dim
    parts = [
        "# To a billion users",
        "Generated by `python -m bench.scaling` from the results of `pytest bench/ --results`; not typed, do not edit. "
        "Costs of a core are measured ([benchmarks.md](benchmarks.md)); **those of a GPU are predictions** that no GPU "
        "has confirmed ([kernels_layer.md](kernels_layer.md)). The rest is arithmetic on the assumptions below.",
        "## Assumed",
        table(("assumption", ""), _assumptions(fleet)),
        f"Model: the production preset, {config.num_seeds} seeds x {config.dim}, {config.summary_layers} + "
        f"{config.target_layers} layers. {fleet.users:,} users are {values / 1e12:.1f} trillion stored values.",
        "## Costs",
        table(("", "one core, float32, measured", PREDICTED), _cost_lines(cpu, gpu, fleet)),
        f"Measured on {found.machine['cpu']} ({found.machine['isa']}), commit {', '.join(found.commits)}; core-seconds "
        "are the time of a run times its threads. The predictions are of batches of 512 users.",
        "## Stored and moved",
        table((*STORAGE[:3], f"TB, {fleet.replicas} copies", *STORAGE[3:]), _storage_lines(fleet, cpu, rows)),
        "A request reads one user's row, however many candidates it has.",
        "## Computed",
        table(("", "cores, measured", "machines of cores", "H100, **predicted**"), _compute(fleet, cpu, gpu, rows)),
        _cached_text(fleet, cpu, gpu, rows["int8"]),
        "## With and without caching, over the length of a history",
        "Requests a second of one core, and of one GPU (**predicted**). Saved: of all compute, refresh included.",
        table(HISTORY, _by_history(fleet, cpu, gpu, rows["int8"])),
        "## Misses",
        table(("requests without a summary", "cores for requests", "of those with none"), _misses(fleet, cpu, rows)),
        "Who has no summary pays for stage 1 in the request. A policy that scores such a request from the newest "
        "events only, or without a history, does not ([stores.md](stores.md)).",
        "## Waiting",
        _queue_text(found),
        table(("servers", "utilization", "p50", "p99", "mean wait"), _queue_lines(found)),
    ]
    return "\n\n".join(parts) + "\n"


def _assumptions(fleet: Fleet) -> Iterable[Sequence[str]]:
    yield "users", f"{fleet.users:,}"
    yield "every summary is made anew within", f"{fleet.cadence / 3600:.0f} h (the paper's cadence)"
    yield "events of a user, mean", f"{fleet.history:,} (the paper's mean)"
    yield "requests a second, at the peak", f"{fleet.requests:,.0f}, {fleet.candidates} candidates each"
    yield "utilization of cores, GPUs and network", f"{fleet.utilization:.0%}"
    yield "copies in the store", f"{fleet.replicas}"
    machine = f"{fleet.cores} cores like the one measured, {fleet.memory / 1e9:.0f} GB for rows"
    yield "a machine", f"{machine}, {8 * fleet.network / 1e9:.0f} Gbit/s"


def _cost_lines(cpu: Costs, gpu: Costs, fleet: Fleet) -> Iterable[Sequence[str]]:
    yield "an event, stage 1", f"{1e9 * cpu.per_event:,.0f} ns", f"{1e9 * gpu.per_event:,.2f} ns"
    yield "a user beside it", f"{1e3 * cpu.per_user:,.1f} ms", "in the event's"
    yield "a candidate, stage 2", f"{1e6 * cpu.per_candidate:,.1f} us", f"{1e9 * gpu.per_candidate:,.1f} ns"
    refreshes = [f"{1 / cost.refresh(fleet.history):,.2f}" for cost in (cpu, gpu)]
    yield f"users refreshed a second, {fleet.history:,} events each", *refreshes
    requests = [f"{1 / cost.request(fleet.candidates):,.0f}" for cost in (cpu, gpu)]
    yield f"requests a second, {fleet.candidates} candidates each", *requests


def _storage_lines(fleet: Fleet, cpu: Costs, rows: dict[str, int]) -> Iterable[Sequence[str]]:
    for scheme, row_bytes in rows.items():
        found = plan(fleet, cpu, row_bytes)
        copies = f"{found.stored / 1e12:.1f}", f"{fleet.replicas * found.stored / 1e12:.1f}"
        rates = f"{found.written / 1e9:.1f}", f"{found.read / 1e9:.1f}"
        yield scheme, f"{row_bytes:,}", *copies, *rates, f"{found.storage_machines:,}"


def _compute(fleet: Fleet, cpu: Costs, gpu: Costs, rows: dict[str, int]) -> Iterable[Sequence[str]]:
    on_cores, on_gpus = (plan(fleet, cost, rows["int8"]) for cost in (cpu, gpu))
    for name in ("refresh", "request"):
        cores, gpus = (getattr(found, f"{name}_units") for found in (on_cores, on_gpus))
        rate = f"{on_cores.refreshed:,.0f} users/s" if name == "refresh" else f"{fleet.requests:,.0f} requests/s"
        yield f"{name}: {rate}", f"{cores:,.0f}", f"{_up(cores / fleet.cores):,}", f"{gpus:,.1f}"
    without_cores, without_gpus = (plan(replace(fleet, cached=0.0), cost, rows["int8"]) for cost in (cpu, gpu))
    cores, gpus = without_cores.request_units, without_gpus.request_units
    yield "the same requests, stage 1 in each", f"{cores:,.0f}", f"{_up(cores / fleet.cores):,}", f"{gpus:,.0f}"


def _cached_text(fleet: Fleet, cpu: Costs, gpu: Costs, row_bytes: int) -> str:
    on_cpu, on_gpu = (saving(fleet, cost, row_bytes) for cost in (cpu, gpu))
    cached, direct = (plan(replace(fleet, cached=share), cpu, row_bytes).request_units for share in (1.0, 0.0))
    return (
        f"At {fleet.history:,} events and {fleet.requests:,.0f} requests a second caching spares {on_cpu:.1%} of the "
        f"cores and {on_gpu:.1%} of the GPUs (predicted), refresh included; of the cores that serve, as the paper "
        f"counts, {1 - cached / direct:.1%}. The paper reports 94 % fewer inference GPUs, by requests a second, of a "
        "model with other parts, in which both sides share. Refresh costs the same however many requests there are: "
        f"where fewer than {fleet.users / fleet.cadence:,.0f} a second come, making summaries on demand would be "
        "cheaper."
    )


def _by_history(fleet: Fleet, cpu: Costs, gpu: Costs, row_bytes: int) -> Iterable[Sequence[str]]:
    for history in (100, 1_000, 2_000, 7_000, 16_000, 100_000, 1_000_000):
        some = replace(fleet, history=history)
        line: list[str] = [f"{history:,}"]
        for cost in (cpu, gpu):
            cached, direct = (plan(replace(some, cached=share), cost, row_bytes).qps for share in (1.0, 0.0))
            line += [f"{cached:,.1f}", f"{direct:,.2f}"]
            if cost is cpu:
                line.append(f"{cached / direct:,.1f}")
            line.append(f"{saving(some, cost, row_bytes):.1%}")
        yield line


def _misses(fleet: Fleet, cpu: Costs, rows: dict[str, int]) -> Iterable[Sequence[str]]:
    least = plan(fleet, cpu, rows["int8"]).request_units
    for share in (0.0, 0.001, 0.01, 0.06, 0.1):
        cores = plan(replace(fleet, cached=1 - share), cpu, rows["int8"]).request_units
        yield f"{share:.1%}", f"{cores:,.0f}", f"{cores / least:.2f} x"


def _service(found: Results) -> list[float]:
    """Milliseconds of requests after the longest history: the middles of their tenths."""
    row = max((row for row in found.of("request")), key=lambda row: row["events"])
    return list(row["deciles_ms"])


def _queue_text(found: Results) -> str:
    service, threads = _service(found), max(row["threads"] for row in found.of("request"))
    return (
        "Requests arrive at random and take the first free server (one that computes one request at a time); service "
        f"times are drawn from the measured ones, mean {statistics.mean(service):.1f} ms on {threads} threads. "
        "Milliseconds, simulated, 40,000 requests each: many servers behind one queue carry far more before p99 grows."
    )


def _queue_lines(found: Results) -> Iterable[Sequence[str]]:
    service = _service(found)
    for servers in SERVERS:
        for utilization in UTILIZATIONS:
            times = simulate(servers, utilization, service)
            yield str(servers), f"{utilization:.0%}", *(f"{time:,.1f}" for time in times)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="From measured costs to a fleet.")
    parser.add_argument("results", type=Path, nargs="+", help="of `pytest bench/ --results`; read as one")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder to write to")
    parser.add_argument("--print", action="store_true", help="print the page, write nothing")
    chosen = parser.parse_args(arguments)
    try:
        text = page(results.read(chosen.results))
    except (results.ResultsError, NotMeasured) as error:
        print(f"bench.scaling: {error}", file=sys.stderr)
        return 2
    if chosen.print:
        print(text, end="")
    else:
        (chosen.docs / "scaling.md").write_text(text)
        print(f"wrote {chosen.docs / 'scaling.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
