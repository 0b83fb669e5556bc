"""Ranking and calibration metrics of logits against 0/1 labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from vista_ext._extras import require

Array = np.ndarray[Any, np.dtype[Any]]


def auc(logits: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve.

    Args:
        logits: `[m]`, any floating dtype, finite.
        labels: `[m]`, 0 or 1.

    Returns:
        NaN when the labels are all the same.

    Raises:
        ValueError: shapes differ, a logit is not finite, a label is not 0 or 1.
    """
    x, y = _arrays(logits, labels)
    if _single_class(y):
        return float("nan")
    return float(require("sklearn.metrics", extra="run").roc_auc_score(y, x))


def gauc(logits: Tensor, labels: Tensor, users: Tensor) -> float:
    """AUC per user, averaged over the users that have both labels, weighted by their number of rows.

    Args:
        logits, labels: as for `auc`.
        users: `[m]`, integers.

    Returns:
        NaN when no user has both labels.
    """
    x, y = _arrays(logits, labels)
    user = _flat("users", users, len(x))
    if len(x) == 0:
        return float("nan")
    order = np.lexsort((x, user))
    x, y, user = x[order], y[order], user[order]

    new_user = np.r_[True, user[1:] != user[:-1]]
    who = np.cumsum(new_user) - 1
    # Ties share the mean of their ranks, as in the Mann-Whitney statistic that AUC is.
    new_tie = new_user | np.r_[True, x[1:] != x[:-1]]
    first = np.flatnonzero(new_tie)
    last = np.r_[first[1:], len(x)] - 1
    rank = ((first + last) / 2)[np.cumsum(new_tie) - 1] - np.flatnonzero(new_user)[who] + 1

    rows = np.bincount(who)
    positive = np.bincount(who, weights=y)
    both = (positive > 0) & (positive < rows)
    if not both.any():
        return float("nan")
    wins = np.bincount(who, weights=rank * y) - positive * (positive + 1) / 2
    per_user = wins[both] / (positive * (rows - positive))[both]
    return float(np.average(per_user, weights=rows[both]))


def logloss(logits: Tensor, labels: Tensor) -> float:
    """Mean binary cross entropy in nats; NaN without rows. Arguments as for `auc`."""
    x, y = _arrays(logits, labels)
    return float(np.mean(np.logaddexp(0, x) - y * x)) if len(x) else float("nan")


def normalized_entropy(logits: Tensor, labels: Tensor) -> float:
    """Log loss divided by that of always saying the base rate of these labels; below 1 is better than that.

    Arguments as for `auc`. NaN when the labels are all the same.
    """
    _, y = _arrays(logits, labels)
    if _single_class(y):
        return float("nan")
    rate = y.mean()
    return logloss(logits, labels) / float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate))


def _single_class(labels: Array) -> bool:
    return len(labels) == 0 or bool((labels == labels[0]).all())


def _arrays(logits: Tensor, labels: Tensor) -> tuple[Array, Array]:
    x = _flat("logits", logits.double(), len(logits.reshape(-1)))
    y = _flat("labels", labels.double(), len(x))
    if not np.isfinite(x).all():
        raise ValueError(f"logits must be finite, found {int((~np.isfinite(x)).sum())} of {len(x)} that are not")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, found {y[~np.isin(y, (0, 1))][0]}")
    return x, y


def _flat(name: str, values: Tensor, rows: int) -> Array:
    if values.shape != (rows,):
        raise ValueError(f"{name} must have the shape ({rows},), found {tuple(values.shape)}")
    return values.detach().cpu().numpy()
