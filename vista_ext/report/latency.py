"""Milliseconds a request over the length of the history behind it: from the history itself, and from the store."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vista_ext import ops
from vista_ext.data.batch import Candidates, Histories
from vista_ext.models import Vista
from vista_ext.ops.cache_rows import Scheme
from vista_ext.progress import track
from vista_ext.serve.scorer import from_store, score
from vista_ext.serve.summarize import store_spec
from vista_ext.store import LmdbStore


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a request for `candidates` items of one user with `events` events."""

    events: int
    direct_ms: float
    store_ms: float


@torch.no_grad()
def measure(
    model: Vista,
    *,
    lengths: Sequence[int] = (100, 1_000, 10_000, 100_000),
    candidates: int = 100,
    scheme: Scheme = "int8",
    repeats: int = 15,
    seed: int = 0,
) -> list[Latency]:
    """Time requests on made-up histories. The store is a real one, read through the same path as in serving."""
    model.eval()
    histories = [_history(model, length, seed) for length in lengths]
    asked = _candidates(model, candidates, seed)
    spec = store_spec(model.config, scheme, 0, 1)
    found = []
    with tempfile.TemporaryDirectory() as folder, LmdbStore.create(Path(folder) / "store", spec) as store:
        for user, history in enumerate(track(histories, "timing requests", len(histories))):
            rows = ops.quantize_rows(model.summarize(history), scheme=scheme)
            store.insert(torch.tensor([user]), rows, history.now)
            one, lookup = torch.tensor([user]), from_store(store)
            # Serving keeps just as many raw events of a user as the model attends to.
            most = model.config.recent_events
            read = history.suffix(most) if most else None

            direct = partial(_direct, model, history, asked)
            stored = partial(score, model, lookup, one, asked, read)
            few = 3 if len(history.items) >= 100_000 else repeats
            found.append(Latency(len(history.items), _median_ms(direct, few), _median_ms(stored, repeats)))
    return found


def _direct(model: Vista, history: Histories, asked: Candidates) -> None:
    model.score(model.summarize(history), asked, torch.tensor([0]), recent=history)


def _median_ms(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def _history(model: Vista, length: int, seed: int) -> Histories:
    generator = torch.Generator().manual_seed(seed + length)
    schema, now = model.schema, 1_700_000_000
    items = torch.randint(1, schema.num_items + 1, (length,), generator=generator)
    actions = torch.randint(0, schema.num_actions, (length,), generator=generator)
    times = now - torch.arange(length, 0, -1) * 600
    return Histories(torch.tensor([0, length]), length, items, actions, times, torch.tensor([now]))


def _candidates(model: Vista, count: int, seed: int) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(1, model.schema.num_items + 1, (count,), generator=generator)
    context = torch.zeros(count, len(model.schema.context), dtype=torch.int64)
    return Candidates(torch.tensor([0, count]), count, items, context)
