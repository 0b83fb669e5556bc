"""End to end: a request from the store over the length of the history behind it, and the job that fills the store.

A request is what a service does for it: look the user up in a store on disk, dequantize, `Vista.score`. The lengths
take turns, request by request, so that a noisy machine disturbs all alike; what remains between them is the history's.
"""

from __future__ import annotations

import statistics
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import costs
from bench.cpu_cases import SMALL
from bench.cpu_timing import spread
from bench.floors import Floors
from bench.machine import Neighbours
from bench.model_cases import PRODUCTION, SCHEMA, make_request
from vista_ext import ops
from vista_ext.data.dataset import EventDataset
from vista_ext.data.synthetic import make_synthetic
from vista_ext.models import Vista
from vista_ext.serve.scorer import from_store, score
from vista_ext.serve.summarize import refresh, store_spec
from vista_ext.store import LmdbStore

LENGTHS, CANDIDATES, REQUESTS = (100, 1_000, 10_000, 100_000, 1_000_000), 500, 150
QUICK_LENGTHS, QUICK_CANDIDATES, QUICK_REQUESTS = (20, 200, 1_000), 20, 10
LONG = 50_000  # events from which on stage 1 is timed once: it takes seconds
JOBS, QUICK_JOBS = (250, 1_000, 4_000), (20, 40, 80)  # users of EVENTS_EACH events
EVENTS_EACH, QUICK_EVENTS_EACH = 200, 60


@pytest.fixture(autouse=True)
def _on_a_cpu(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--device") != "cpu":
        pytest.skip("the store is read by the CPU")


@pytest.mark.op("request")
@torch.no_grad()
def bench_request(benchmark: Any, floors: Floors, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    quick = request.config.getoption("--quick")
    lengths, candidates = (QUICK_LENGTHS, QUICK_CANDIDATES) if quick else (LENGTHS, CANDIDATES)
    config = SMALL if quick else PRODUCTION
    torch.manual_seed(0)
    model = Vista(SCHEMA, config).eval()
    asked = make_request(1, 0, candidates, "cpu").candidates
    recomputed = {}
    with LmdbStore.create(tmp_path / "store", store_spec(config, "int8", 0, 1)) as store:
        lookup = from_store(store)

        def ask(user: int) -> torch.Tensor:
            return score(model, lookup, torch.tensor([user]), asked)

        for user, events in enumerate(lengths):
            histories = make_request(1, events, 0, "cpu").histories
            summary = model.summarize(histories) if events < LONG else torch.empty(0)  # warm, where that takes no time
            seconds = []
            for _ in range(5 if events < LONG else 1):
                begin = time.perf_counter()
                summary = model.summarize(histories)
                model.score(summary, asked, torch.tensor([0]))
                seconds.append(time.perf_counter() - begin)
            recomputed[user] = min(seconds)
            rows = ops.quantize_rows(summary)
            store.insert(torch.tensor([user]), rows, histories.now)
            exact = model.score(ops.dequantize_rows(rows, config.num_seeds, config.dim), asked, torch.tensor([0]))
            if not torch.equal(ask(user), exact):
                raise AssertionError(f"the request after {events} events is wrong, nothing was timed")

        times: dict[int, list[float]] = {user: [] for user in recomputed}

        moved, flops = costs.total(costs.scoring_request(1, candidates, config, 4))
        probe = floors.probe(moved, torch.float32, torch.get_num_threads())

        def round_of_all() -> None:
            probe.run()
            ask(0)  # not counted: the caches are the probe's
            for user, seconds in times.items():
                begin = time.perf_counter()
                ask(user)
                seconds.append(time.perf_counter() - begin)

        benchmark.group, neighbours = "request", Neighbours()
        benchmark.pedantic(round_of_all, rounds=QUICK_REQUESTS if quick else REQUESTS)
        others = neighbours.cores()
    floor = probe.seconds(flops)
    benchmark.extra_info["rows"] = []
    for user, events in enumerate(lengths):
        parts = statistics.quantiles(times[user], n=100, method="inclusive")
        p50, p99 = parts[49], parts[98]
        of_stage1 = costs.total(costs.summarize(1, events, config, 4))[1]
        benchmark.extra_info["rows"].append(
            {
                "op": "request",
                "case": f"{events} events, {candidates} candidates",
                "threads": torch.get_num_threads(),
                "events": events,
                "items": candidates,
                "item": "candidate",
                "ns_per_item": 1e9 * p50 / candidates,
                "bytes": moved,
                "flops": flops,
                "floor_ms": 1e3 * floor,
                "ratio_to_floor": p50 / floor,
                "rounds": len(times[user]),
                "ours_ms": 1e3 * p50,
                "ours_spread": spread(times[user]),
                "others": others,
                "p99_ms": 1e3 * p99,
                "deciles_ms": [1e3 * seconds for seconds in parts[4::10]],  # the middles of tenths: 5 %, 15 %, ...
                "recompute_ms": 1e3 * recomputed[user],
                "ratio_to_recompute": recomputed[user] / p50,
                "predicted_by_flops": (of_stage1 + flops) / flops,
            }
        )


@pytest.mark.op("summarize_job")
@torch.no_grad()
def bench_summarize_job(benchmark: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    quick = request.config.getoption("--quick")
    jobs, each = (QUICK_JOBS, QUICK_EVENTS_EACH) if quick else (JOBS, EVENTS_EACH)
    datasets = {}
    for users in jobs:
        make_synthetic(tmp_path / f"{users}", users=users, events_per_user=each, requests_per_user=3, candidates=2)
        datasets[users] = EventDataset(tmp_path / f"{users}")
    torch.manual_seed(0)
    first = next(iter(datasets.values()))
    model = Vista(first.schema, SMALL, first.item_features).eval()
    spec = store_spec(SMALL, "int8", 0, 1)
    times: dict[int, list[float]] = {users: [] for users in jobs}
    numbers = count()

    def run(users: int) -> float:
        with LmdbStore.create(tmp_path / f"store-{next(numbers)}", spec) as store:
            begin = time.perf_counter()
            written = refresh(model, datasets[users], store)
            seconds = time.perf_counter() - begin
        if written != users:
            raise AssertionError(f"{written} of {users} users were written")
        return seconds

    def round_of_all() -> None:
        for users, seconds in times.items():
            seconds.append(run(users))

    run(jobs[0])  # warm
    benchmark.group, neighbours = "summarize_job", Neighbours()
    benchmark.pedantic(round_of_all, rounds=2 if quick else 3)
    others = neighbours.cores()
    benchmark.extra_info["rows"] = [_job_row(users, each, times[users]) | {"others": others} for users in jobs]


def _job_row(users: int, each: int, seconds: list[float]) -> dict[str, Any]:
    events, best = users * each, min(seconds)
    moved, flops = costs.total(costs.summarize(users, each, SMALL, 4))
    return {
        "op": "summarize_job",
        "case": f"{users} users x {each}",
        "threads": torch.get_num_threads(),
        "users": users,
        "items": events,
        "item": "event",
        "ns_per_item": 1e9 * best / events,
        "bytes": moved,
        "flops": flops,
        "ours_ms": 1e3 * best,
        "rounds": len(seconds),
    }
