"""Logits of a split, and what they are worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vista_ext.config import DataConfig
from vista_ext.data.batch import Batch
from vista_ext.data.dataset import EventDataset
from vista_ext.data.metrics import auc, gauc, normalized_entropy
from vista_ext.models import Ranker
from vista_ext.progress import track


@dataclass(frozen=True)
class Predictions:
    """Logits and labels `[m, tasks]`, users `[m]` of a split, in its order."""

    logits: Tensor
    labels: Tensor
    users: Tensor


@dataclass(frozen=True)
class Quality:
    """AUC, normalized entropy (log loss over that of the base rate), and AUC within users, impression-weighted."""

    auc: float
    ne: float
    gauc: float


def read_batches(dataset: EventDataset, split: str, config: DataConfig, requests_per_batch: int) -> Iterator[Batch]:
    """The batches of one pass over a split in its order."""
    return dataset.batches(
        split,
        requests_per_batch=requests_per_batch,
        max_history=config.max_history,
        request_window=config.request_window,
    )


@torch.no_grad()
def predict(model: Ranker, dataset: EventDataset, split: str, config: DataConfig, requests: int = 512) -> Predictions:
    """Score a split from the histories themselves."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    logits, labels, users = [], [], []
    total = dataset.split_size(split)
    batches = read_batches(dataset, split, config, requests)
    for batch in track(batches, f"scoring {split}", total, unit="rows", size=lambda b: len(b.users)):
        moved = batch.to(device)
        logits.append(model(moved.histories, moved.candidates, moved.kv_index).logits.float().cpu())
        labels.append(batch.labels)
        users.append(batch.users)
    model.train(training)
    return collect(logits, labels, users, len(dataset.schema.tasks))


def collect(logits: list[Tensor], labels: list[Tensor], users: list[Tensor], tasks: int) -> Predictions:
    """Put batches together; none at all gives empty tensors."""
    if not logits:
        return Predictions(torch.zeros(0, tasks), torch.zeros(0, tasks), torch.zeros(0, dtype=torch.int64))
    return Predictions(torch.cat(logits), torch.cat(labels), torch.cat(users))


def quality(predictions: Predictions, task: int = 0) -> Quality:
    """The metrics of one task."""
    logits, labels = predictions.logits[:, task], predictions.labels[:, task]
    return Quality(auc(logits, labels), normalized_entropy(logits, labels), gauc(logits, labels, predictions.users))
