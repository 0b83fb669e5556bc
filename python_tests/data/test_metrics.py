"""Metrics against their definitions."""

import math

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from vista_ext.data import metrics


def scored(rows=3000, users=400, seed=0):
    """Coarse logits, so that ties are common within a user; some users have one label only."""
    g = torch.Generator().manual_seed(seed)
    user = torch.randint(users, (rows,), generator=g) ** 3 // users**2
    labels = (torch.rand(rows, generator=g) < 0.3).float()
    logits = torch.randint(-4, 4, (rows,), generator=g) / 2 + labels
    return logits, labels, user


def test_auc_and_logloss():
    logits, labels, _ = scored()
    assert metrics.auc(logits, labels) == pytest.approx(roc_auc_score(labels, logits))
    assert metrics.logloss(logits, labels) == pytest.approx(log_loss(labels, logits.double().sigmoid()))
    assert metrics.logloss(torch.tensor([1000.0, -1000.0]), torch.tensor([0.0, 0.0])) == 500


def test_gauc_is_the_weighted_mean_over_users_with_both_labels():
    logits, labels, users = scored()
    total = weight = single = 0
    for user in users.unique():
        mine = users == user
        if labels[mine].unique().numel() == 2:
            total += int(mine.sum()) * roc_auc_score(labels[mine], logits[mine])
            weight += int(mine.sum())
        else:
            single += 1
    assert single > 0
    assert metrics.gauc(logits, labels, users) == pytest.approx(total / weight, abs=1e-12)
    shuffled = torch.randperm(len(users), generator=torch.Generator().manual_seed(1))
    assert metrics.gauc(logits[shuffled], labels[shuffled], users[shuffled]) == pytest.approx(total / weight)


def test_gauc_does_not_see_what_differs_between_users():
    logits, labels, users = scored()
    assert metrics.gauc(logits + 100 * users, labels, users) == pytest.approx(metrics.gauc(logits, labels, users))


def test_normalized_entropy_of_the_base_rate_is_one():
    _, labels, _ = scored()
    rate = labels.double().mean()
    base = torch.full_like(labels, float(torch.logit(rate)), dtype=torch.float64)
    assert metrics.normalized_entropy(base, labels) == pytest.approx(1)
    assert metrics.normalized_entropy(base + 0.5, labels) > 1.01
    assert metrics.normalized_entropy(labels * 20 - 10, labels) < 0.01


@pytest.mark.parametrize("labels", [torch.ones(4), torch.zeros(4), torch.zeros(0)])
def test_one_class_is_nan(labels):
    logits = torch.arange(float(len(labels)))
    assert math.isnan(metrics.auc(logits, labels))
    assert math.isnan(metrics.normalized_entropy(logits, labels))
    assert math.isnan(metrics.gauc(logits, labels, torch.zeros(len(labels), dtype=torch.int64)))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(2), r"labels must have the shape \(3,\), found \(2,\)"),
        (torch.zeros(2, 1), torch.zeros(2), r"logits must have the shape"),
        (torch.tensor([0.0, float("nan")]), torch.zeros(2), "logits must be finite, found 1 of 2"),
        (torch.zeros(2), torch.tensor([0.0, 0.5]), "labels must be 0 or 1, found 0.5"),
    ],
)
def test_bad_input_is_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.auc(logits, labels)
