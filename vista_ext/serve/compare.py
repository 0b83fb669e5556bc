"""What quality delivery costs: by precision of the stored rows, by the age of the summaries, by history length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vista_ext import ops
from vista_ext.config import DataConfig
from vista_ext.data.dataset import EventDataset
from vista_ext.models import Vista
from vista_ext.ops.cache_rows import Scheme
from vista_ext.progress import track
from vista_ext.serve.staleness import Age, history_lengths
from vista_ext.serve.summarize import summarize_users
from vista_ext.train.evaluate import Predictions, Quality, quality, read_batches

Precision = Literal["float32", Scheme]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
PRECISIONS: tuple[Precision, ...] = ("float32", *SCHEMES)
FRESH = Age()
AGES = tuple(map(Age.parse, ["0", "1", "5", "20", "100", "1h", "2h", "1d"]))


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


@dataclass(frozen=True)
class Delivery:
    """Logits of the main task for the m rows of a split.

    Args:
        labels, users, lengths, direct: `[m]`. Lengths are the events that a row's user had before its request, however
            many of them are read; `direct` is scored from the history as it is then.
        ways: `[m]` for each precision and age of the summaries.
    """

    labels: Tensor
    users: Tensor
    lengths: Tensor
    direct: Tensor
    ways: dict[tuple[Precision, Age], Tensor]

    def quality(self, logits: Tensor, rows: Tensor | None = None) -> Quality:
        """What logits `[m]` are worth, on all rows or on those of a bool `[m]`."""
        index = slice(None) if rows is None else rows
        return quality(Predictions(logits[index, None], self.labels[index, None], self.users[index]))


def all_summaries(
    model: Vista, dataset: EventDataset, before: Tensor, *, max_history: int = 0, skip_last: int = 0
) -> Tensor:
    """`[users, seeds, dim]` of everybody, at moments `[users]`."""
    batches = summarize_users(
        model, dataset, torch.arange(dataset.num_users), before=before, max_history=max_history, skip_last=skip_last
    )
    parts = [summaries for _, summaries, _ in batches]
    return torch.cat(parts) if parts else torch.zeros(0, model.config.num_seeds, model.config.dim)


def through_bytes(summaries: Tensor, precision: Precision, group: int | None = None) -> Tensor:
    """Summaries as a store gives them back: quantized to bytes and read again; float32 as they are."""
    if precision == "float32":
        return summaries
    rows = ops.quantize_rows(summaries, scheme=precision, group=group)
    return ops.dequantize_rows(rows, summaries.shape[1], summaries.shape[2], scheme=precision, group=group)


def change(name: str, exact: Predictions, other: Predictions) -> Comparison:
    """How predictions differ from those of exact summaries."""
    mean, most = probability_change(exact.logits[:, 0], other.logits[:, 0])
    return Comparison(name, quality(other), mean, most)


def probability_change(exact: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean and largest difference of the probabilities of logits `[m]`."""
    difference = (other.sigmoid() - exact.sigmoid()).abs()
    return float(difference.mean()), float(difference.max()) if difference.numel() else 0.0


def by_precision(model: Vista, dataset: EventDataset, config: DataConfig, split: str) -> list[Comparison]:
    """Fresh summaries of each precision, beside those of float32."""
    found = deliveries(model, dataset, config, split, ages=(FRESH,))
    exact = found.ways["float32", FRESH]
    return [
        Comparison(precision, found.quality(logits), *probability_change(exact, logits))
        for (precision, _), logits in found.ways.items()
    ]


@torch.no_grad()
def deliveries(
    model: Vista,
    dataset: EventDataset,
    config: DataConfig,
    split: str,
    *,
    ages: Sequence[Age] = AGES,
    precisions: Sequence[Precision] = PRECISIONS,
    requests: int = 512,
) -> Delivery:
    """Score a split from summaries of every age and precision, and from the histories themselves.

    An age is counted from each request: however old the summary, the newest raw events that a model with
    `recent_events` reads beside it are those before the request.
    """
    model.eval()
    device = next(model.parameters()).device
    names = ("labels", "users", "lengths", "direct")
    ways: list[tuple[Precision, Age]] = [(precision, age) for age in ages for precision in precisions]
    found: dict[object, list[Tensor]] = {name: [] for name in (*names, *ways)}
    batches = read_batches(dataset, split, config, requests)
    total = dataset.split_size(split)
    for batch in track(batches, f"scoring {split} in every way", total, unit="rows", size=lambda b: len(b.users)):
        first, sizes = batch.candidates.offsets[:-1], batch.candidates.offsets.diff()
        asking, moments = batch.users[first], batch.histories.now
        found["labels"].append(batch.labels[:, 0])
        found["users"].append(batch.users)
        found["lengths"].append(torch.repeat_interleave(history_lengths(dataset, asking, moments), sizes))
        moved = batch.to(device)
        found["direct"].append(model(moved.histories, moved.candidates, moved.kv_index).logits[:, 0].float().cpu())
        recent = moved.histories if model.config.recent_events else None
        for age in ages:
            exact = model.summarize(age.histories(dataset, asking, moments, config.max_history).to(device))
            for precision in precisions:
                logits = model.score(through_bytes(exact, precision), moved.candidates, moved.kv_index, recent=recent)
                found[precision, age].append(logits[:, 0].float().cpu())
    joined = {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in found.items()}
    labels, users, lengths, direct = (joined[name] for name in names)
    return Delivery(labels, users, lengths, direct, {way: joined[way] for way in ways})
