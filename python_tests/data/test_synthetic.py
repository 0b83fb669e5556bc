"""The made-up data set keeps its promise: only old events tell what a user likes."""

import numpy as np
import pytest
import torch

from vista_ext.data.dataset import EventDataset
from vista_ext.data.metrics import auc
from vista_ext.data.synthetic import make_synthetic


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "set"
    truth = make_synthetic(path, users=600, seed=3)
    return truth, EventDataset(path)


def share_of_category(dataset, max_history, skip_last=0):
    """Share of each candidate's category among the user's events, and the labels: of the test split."""
    samples = dataset.samples("test")
    histories = dataset.histories(torch.arange(dataset.num_users), None, max_history, skip_last)
    category = dataset.item_features[:, 0]
    counts = torch.zeros(dataset.num_users, int(category.max()) + 1)
    users = torch.repeat_interleave(torch.arange(dataset.num_users), histories.seq_offsets.diff())
    counts.index_put_((users, category[histories.items]), torch.ones(()), accumulate=True)
    return counts[samples.users, category[samples.items]], samples.labels[:, 0]


def test_the_oracle_beats_popularity(made):
    truth, dataset = made
    assert truth.oracle_auc > truth.no_history_auc + 0.1
    assert truth.no_history_auc > 0.55
    assert f"oracle {truth.oracle_auc:.4f}" in dataset.source
    assert f"AUC {truth.no_history_auc:.3f} here; with it, {truth.oracle_auc:.3f}." in str(truth)


def test_only_old_events_tell(made):
    truth, dataset = made
    whole = auc(*share_of_category(dataset, 400))
    recent = auc(*share_of_category(dataset, 50))
    old = auc(*share_of_category(dataset, 350, skip_last=50))
    assert abs(recent - 0.5) < 0.02
    assert 0.75 < whole < truth.oracle_auc
    assert old == pytest.approx(whole, abs=0.01)


def test_every_user_has_every_split_and_test_comes_last(made):
    _, dataset = made
    last_train = np.zeros(dataset.num_users)
    for split, requests in (("train", 7), ("valid", 1), ("test", 2)):
        samples = dataset.samples(split)
        assert torch.bincount(samples.users).tolist() == [requests * 8] * dataset.num_users
        if split == "train":
            np.maximum.at(last_train, samples.users.numpy(), samples.timestamps.numpy())
        else:
            assert (samples.timestamps.numpy() > last_train[samples.users.numpy()]).all()
        assert (samples.timestamps >= dataset.end_of_events(samples.users)).all()


def test_the_seed_decides(tmp_path):
    small = {"users": 20, "items": 40, "events_per_user": 60}
    same = [make_synthetic(tmp_path / name, **small, seed=1) for name in "ab"]
    assert same[0] == same[1] != make_synthetic(tmp_path / "c", **small, seed=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"events_per_user": 50}, "recent"), ({"liked": 20}, "liked"), ({"requests_per_user": 2}, "requests_per_user")],
)
def test_bad_sizes_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic(tmp_path / "x", **options)
