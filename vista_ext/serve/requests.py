"""Requests by the ids of the data's source: read them, score them from the store, write the scores."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from vista_ext.data.batch import Candidates
from vista_ext.data.dataset import DataError, EventDataset
from vista_ext.runs import Run
from vista_ext.serve.scorer import from_store, score
from vista_ext.store import LmdbStore

Request = tuple[str, str, dict[str, int]]  # user, item, context by feature name (0 where it is not given)


def read_requests(path: Path, dataset: EventDataset) -> list[Request]:
    """Rows of a CSV file with the columns user, item and any context features.

    Raises:
        DataError: for a missing or unknown column, or a context value that is not in its range.
    """
    context = dataset.schema.context
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(path, None, "a CSV file with the columns user and item", str(error)) from error
    if {"user", "item"} - set(names) or set(names) - {"user", "item", *context}:
        raise DataError(path, None, f"the columns user, item and any of {sorted(context)}", str(names))
    requests = []
    for number, row in enumerate(rows, 2):
        values = {}
        for name in set(names) - {"user", "item"}:
            text = row[name] or ""
            if not text.isdecimal() or int(text) >= context[name]:
                raise DataError(path, name, f"an integer below {context[name]} in line {number}", repr(text))
            values[name] = int(text)
        if not row["user"] or not row["item"]:
            raise DataError(path, None, f"a user and an item in line {number}", str(row))
        requests.append((row["user"], row["item"], values))
    return requests


def score_requests(run: Run, requests: Sequence[Request]) -> list[tuple[str, str, list[float]]]:
    """User, item, and the probability of each task, in the order given.

    Raises:
        DataError: for an id that the data does not have.
        StoreError: for a user without a summary of this run's model.
    """
    dataset = run.dataset
    users = torch.tensor([dataset.user_index(user) for user, _, _ in requests], dtype=torch.int64)
    items = torch.tensor([dataset.item_index(item) for _, item, _ in requests], dtype=torch.int64)
    names = list(dataset.schema.context)
    context = torch.tensor([[given.get(name, 0) for name in names] for _, _, given in requests], dtype=torch.int64)
    candidates = Candidates(torch.arange(len(requests) + 1), 1, items, context.view(len(requests), len(names)))
    # Scoring reads raw events only for a model that attends to the newest of them.
    wanted = run.vista.config.recent_events
    recent = dataset.histories(users, None, wanted) if wanted else None
    with LmdbStore.open(run.store_path, spec=run.store_spec()) as store:
        logits = score(run.vista, from_store(store), users, candidates, recent)
    return [(user, item, row) for (user, item, _), row in zip(requests, logits.sigmoid().tolist(), strict=True)]


def write_scores(scores: Iterable[tuple[str, str, list[float]]], tasks: Sequence[str], path: Path | None) -> None:
    """CSV with user, item and a column of probabilities for each task; on the terminal without a path."""
    file = path.open("w", newline="") if path else sys.stdout
    writer = csv.writer(file)
    writer.writerow(["user", "item", *tasks])
    writer.writerows([user, item, *(f"{value:.6f}" for value in values)] for user, item, values in scores)
    if path:
        file.close()
