"""Scoring from stored summaries: what a request costs does not depend on the history behind the summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vista_ext import ops
from vista_ext.config import DataConfig
from vista_ext.data.batch import Candidates
from vista_ext.data.dataset import EventDataset
from vista_ext.models import Histories, Vista
from vista_ext.progress import track
from vista_ext.store import STRICT, HotCache, ReadPolicy, SummaryStore
from vista_ext.train.evaluate import Predictions, collect, read_batches

Lookup = Callable[[Tensor], Tensor]


def from_store(store: SummaryStore) -> Lookup:
    """Summaries of users `[n]` as float32 `[n, seeds, dim]`; whom the store does not know is its policy."""
    spec = store.spec

    def lookup(users: Tensor) -> Tensor:
        rows = store.find(users).rows
        return ops.dequantize_rows(rows, spec.tokens, spec.dim, scheme=spec.scheme, group=spec.group)

    return lookup


def from_cache(cache: HotCache, policy: ReadPolicy = STRICT) -> Lookup:
    """The same through a hot cache, on its device; zeros for whom the policy makes a miss."""

    def lookup(users: Tensor) -> Tensor:
        with cache.gather(users.cpu(), policy) as lease:
            return lease.dequantize()

    return lookup


def from_table(summaries: Tensor) -> Lookup:
    """Summaries held in memory, by user: `[users, seeds, dim]`."""
    return lambda users: summaries[users]


@torch.no_grad()
def score(
    model: Vista, lookup: Lookup, users: Tensor, candidates: Candidates, recent: Histories | None = None
) -> Tensor:
    """Logits `[m, tasks]` of requests.

    Args:
        users: int64 `[requests]`; a user's summary is read once, however many requests ask for it.
        recent: of each request, for a model that attends to recent events.
    """
    distinct, index = torch.unique(users, return_inverse=True)
    summaries = lookup(distinct).to(next(model.parameters()))
    if recent is not None:
        # Each request has recent events of its own, so each gets its own copy of the summary.
        summaries, index = summaries[index], torch.arange(len(users))
    return model.score(summaries, candidates, index, recent=recent)


@torch.no_grad()
def predict_from(
    lookup: Lookup, model: Vista, dataset: EventDataset, split: str, config: DataConfig, requests: int = 512
) -> Predictions:
    """Score a split from summaries instead of histories."""
    model.eval()
    logits, labels, users = [], [], []
    wanted = model.config.recent_events
    batches = read_batches(dataset, split, replace(config, max_history=max(wanted, 1)), requests)
    total = dataset.split_size(split)
    for batch in track(batches, f"scoring {split} from summaries", total, unit="rows", size=lambda b: len(b.users)):
        asking = batch.users[batch.candidates.offsets[:-1]]
        recent = batch.histories if wanted else None
        logits.append(score(model, lookup, asking, batch.candidates, recent).float())
        labels.append(batch.labels)
        users.append(batch.users)
    return collect(logits, labels, users, len(dataset.schema.tasks))
