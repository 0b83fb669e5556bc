"""Scores that any model of the histories has to beat: smoothed means of the label, without any history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vista_ext.data.dataset import EventDataset


def floors(
    dataset: EventDataset,
    task: str,
    *,
    train_splits: Sequence[str] = ("train", "valid"),
    test_split: str = "test",
    item_prior: float = 20.0,
    user_prior: float = 5.0,
) -> dict[str, Tensor]:
    """Logits of target encodings: of each user and item (and context value) the mean label of the training rows.

    Sums add what each one differs from the base rate, in logits.

    Args:
        task: a label of the data set.
        train_splits: where the means come from.
        test_split: the rows that are scored.
        item_prior, user_prior: rows at the base rate that each item and user counts as having in addition, above 0;
            context values have as many as items. Few suit items with few rows: 5 is better for small MovieLens.

    Returns:
        "item mean", "user mean", "item + user", and "item + user + <name>" for each context feature: float32 `[m]`, in
        the order of `dataset.samples(test_split)`.

    Raises:
        ValueError: an unknown task or split, a prior that is not above 0, or training labels that are all the same.
    """
    if task not in dataset.schema.tasks:
        raise ValueError(f"task must be one of {dataset.schema.tasks}, found {task!r}")
    if not (item_prior > 0 and user_prior > 0):
        raise ValueError(f"item_prior and user_prior must be above 0, found {item_prior} and {user_prior}")
    column = dataset.schema.tasks.index(task)
    parts = [dataset.samples(split) for split in train_splits]
    labels = torch.cat([part.labels[:, column] for part in parts]).double()
    base = labels.mean()
    if not 0 < base < 1:
        raise ValueError(
            f"floors need labels of both kinds in {train_splits}, found the mean {base} of {len(labels)} rows"
        )
    test = dataset.samples(test_split)

    def above_base(train_codes: list[Tensor], test_codes: Tensor, values: int, prior: float) -> Tensor:
        codes = torch.cat(train_codes)
        rows = torch.bincount(codes, minlength=values)
        positive = torch.bincount(codes, weights=labels, minlength=values)
        rate = (positive + prior * base) / (rows + prior)
        return (torch.logit(rate) - torch.logit(base))[test_codes]

    item = above_base([part.items for part in parts], test.items, dataset.schema.num_items + 1, item_prior)
    user = above_base([part.users for part in parts], test.users, dataset.num_users, user_prior)
    scores = {"item mean": item, "user mean": user, "item + user": item + user}
    for i, (name, values) in enumerate(dataset.schema.context.items()):
        context = above_base([part.context[:, i] for part in parts], test.context[:, i], values, item_prior)
        scores[f"item + user + {name}"] = item + user + context
    return {name: (score + torch.logit(base)).float() for name, score in scores.items()}
