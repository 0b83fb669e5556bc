"""What quality delivery costs: by precision of the stored rows, and by the age of the summaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from vista_ext import ops
from vista_ext.config import DataConfig
from vista_ext.data.dataset import EventDataset
from vista_ext.models import Vista
from vista_ext.ops.cache_rows import Scheme
from vista_ext.serve.scorer import from_table, predict_from
from vista_ext.serve.summarize import first_moments, summarize_users
from vista_ext.train.evaluate import Predictions, Quality, quality

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


@dataclass(frozen=True)
class Comparison:
    """One way of delivery beside exact summaries.

    Args:
        name: of the way.
        quality: of the main task.
        mean_change, max_change: of the predicted probability of the main task against exact summaries.
    """

    name: str
    quality: Quality
    mean_change: float
    max_change: float


def all_summaries(
    model: Vista, dataset: EventDataset, before: Tensor, *, max_history: int = 0, skip_last: int = 0
) -> Tensor:
    """`[users, seeds, dim]` of everybody, at moments `[users]`."""
    batches = summarize_users(
        model, dataset, torch.arange(dataset.num_users), before=before, max_history=max_history, skip_last=skip_last
    )
    parts = [summaries for _, summaries, _ in batches]
    return torch.cat(parts) if parts else torch.zeros(0, model.config.num_seeds, model.config.dim)


def through_bytes(summaries: Tensor, scheme: Scheme, group: int | None = None) -> Tensor:
    """Summaries as a store gives them back: quantized to bytes and read again."""
    rows = ops.quantize_rows(summaries, scheme=scheme, group=group)
    return ops.dequantize_rows(rows, summaries.shape[1], summaries.shape[2], scheme=scheme, group=group)


def change(name: str, exact: Predictions, other: Predictions) -> Comparison:
    """How predictions differ from those of exact summaries."""
    difference = (other.logits[:, 0].sigmoid() - exact.logits[:, 0].sigmoid()).abs()
    most = float(difference.max()) if difference.numel() else 0.0
    return Comparison(name, quality(other), float(difference.mean()), most)


def by_precision(
    model: Vista, dataset: EventDataset, config: DataConfig, split: str, schemes: Sequence[Scheme] = SCHEMES
) -> list[Comparison]:
    """Exact summaries, then each scheme: read at each user's first sample of the split."""
    summaries = all_summaries(model, dataset, first_moments(dataset, split), max_history=config.max_history)
    exact = predict_from(from_table(summaries), model, dataset, split, config)
    found = [change("float32", exact, exact)]
    for scheme in schemes:
        table = from_table(through_bytes(summaries, scheme))
        found.append(change(scheme, exact, predict_from(table, model, dataset, split, config)))
    return found


def by_staleness(
    model: Vista, dataset: EventDataset, config: DataConfig, split: str, missing: Sequence[int] = (0, 5, 20, 50)
) -> list[Comparison]:
    """Summaries that miss the newest events before the split, against summaries that miss none."""
    before = first_moments(dataset, split)
    exact, found = None, []
    for events in missing:
        stale = all_summaries(model, dataset, before, max_history=config.max_history, skip_last=events)
        predictions = predict_from(from_table(stale), model, dataset, split, config)
        exact = exact or predictions
        found.append(change(f"{events} events old", exact, predictions))
    return found
