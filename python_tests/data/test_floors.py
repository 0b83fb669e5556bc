"""Floors against counts of rows."""

import math

import numpy as np
import pytest
import torch

from vista_ext.data.batch import FeatureSchema
from vista_ext.data.dataset import EventDataset, write_dataset
from vista_ext.data.floors import floors

# user, item, tab, split, label
ROWS = [(0, 1, 0, "train", 1), (0, 2, 0, "train", 0), (1, 1, 1, "train", 1), (1, 3, 1, "valid", 0)]
ROWS += [(0, 1, 1, "test", 0), (1, 4, 0, "test", 1), (2, 2, 0, "test", 1)]


@pytest.fixture
def dataset(tmp_path):
    user, item, tab, split, label = (list(column) for column in zip(*ROWS, strict=True))
    time, none = np.arange(len(ROWS)), np.zeros(0, np.int64)
    write_dataset(
        tmp_path / "set",
        name="",
        schema=FeatureSchema(4, 1, context={"tab": 2}, tasks=("like", "click")),
        source="",
        items={"source_id": list("abcd")},
        users={"source_id": list("xyz")},
        events={"user_id": none, "timestamp": none, "item_id": none, "action": none},
        samples={
            "user_id": user,
            "timestamp": time,
            "item_id": item,
            "split": split,
            "label_like": [0] * len(ROWS),
            "label_click": label,
            "ctx_tab": tab,
        },
    )
    return EventDataset(tmp_path / "set")


def logit(positive, rows, prior, base):
    rate = (positive + prior * base) / (rows + prior)
    return math.log(rate / (1 - rate))


def test_smoothed_means_of_what_is_not_test(dataset):
    got = floors(dataset, "click")
    item = [logit(2, 2, 20, 0.5), 0, logit(0, 1, 20, 0.5)]
    user = [0, logit(1, 2, 5, 0.5), 0]
    tab = [logit(1, 2, 20, 0.5), 0, 0]
    assert list(got) == ["item mean", "user mean", "item + user", "item + user + tab"]
    torch.testing.assert_close(got["item mean"], torch.tensor(item))
    torch.testing.assert_close(got["user mean"], torch.tensor(user))
    expected = torch.tensor([item, user, tab]).sum(0)
    torch.testing.assert_close(got["item + user + tab"], expected)


def test_splits_and_priors_are_options(dataset):
    got = floors(dataset, "click", train_splits=["train"], test_split="valid", item_prior=2, user_prior=1)
    base = 2 / 3
    assert got["item mean"].item() == pytest.approx(logit(0, 0, 2, base))
    assert got["user mean"].item() == pytest.approx(logit(1, 1, 1, base))
    assert got["item + user"].item() == pytest.approx(logit(1, 1, 1, base))


def test_a_task_without_both_labels_is_named(dataset):
    with pytest.raises(ValueError, match="floors need labels of both kinds"):
        floors(dataset, "like")
    with pytest.raises(ValueError, match="task must be one of"):
        floors(dataset, "watch")
    with pytest.raises(ValueError, match="item_prior and user_prior must be above 0"):
        floors(dataset, "click", item_prior=0)
