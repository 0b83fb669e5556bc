"""A made-up data set whose labels depend on what users did long ago, with known attainable scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vista_ext.data.batch import FeatureSchema
from vista_ext.data.folder import write_dataset
from vista_ext.data.metrics import auc
from vista_ext.data.tables import Array
from vista_ext.progress import working


@dataclass(frozen=True)
class SyntheticTruth:
    """What can be reached on the test split of a synthetic data set.

    Args:
        oracle_auc: AUC of the probabilities that the labels were drawn with.
        no_history_auc: AUC of the best predictor that knows the items only, not the user's old events.
    """

    oracle_auc: float
    no_history_auc: float

    def __str__(self) -> str:
        without, oracle = f"{self.no_history_auc:.3f}", f"{self.oracle_auc:.3f}"
        return f"Without the history no score can exceed AUC {without} here; with it, {oracle}."


def make_synthetic(
    target: Path | str,
    *,
    users: int = 2000,
    items: int = 1000,
    events_per_user: int = 400,
    seed: int = 0,
    clusters: int = 20,
    liked: int = 5,
    recent: int = 50,
    requests_per_user: int = 10,
    candidates: int = 8,
    purity: float = 0.8,
    strength: float = 3.0,
    quality: float = 0.5,
) -> SyntheticTruth:
    """Write a data set in which only events older than the newest `recent` tell what a user likes.

    Items belong to clusters (the item feature `category`). Each user likes `liked` clusters at all times, and a share
    `purity` of the old events comes from those. The recent events come in the same way from clusters that are drawn
    anew, and say nothing about the labels. All other events are drawn by popularity, which is unrelated to liking.

    A label is 1 with the probability sigmoid(strength * (liked - 1/2) - 1/2 + quality of the item). Requests come
    after the history and are not events themselves: their labels would tell in recent events what a user likes.
    Of each user's requests the last fifth are test, one of the others is valid.

    Args:
        target: the folder to make.
        candidates: items per request, all drawn uniformly.
        strength: how much liking raises the logit.
        quality: standard deviation of the items' qualities.

    Raises:
        ValueError: a count that leaves no old events, no three requests, or no item for a cluster.
    """
    if not 0 <= recent < events_per_user:
        raise ValueError(f"recent must lie from 0 to events_per_user - 1 = {events_per_user - 1}, found {recent}")
    if not 0 < liked < clusters <= items:
        raise ValueError(f"expected 0 < liked < clusters <= items, found {liked}, {clusters}, {items}")
    if requests_per_user < 3:
        raise ValueError(f"requests_per_user must be at least 3, one per split, found {requests_per_user}")
    rng = np.random.default_rng(seed)
    cluster = rng.permutation(np.arange(items) % clusters)
    likes = _some_clusters(rng, users, clusters, liked)
    with working(f"making {users} users"):
        history = np.concatenate(
            [
                _interest_events(rng, cluster, likes, liked, events_per_user - recent, purity),
                _interest_events(rng, cluster, _some_clusters(rng, users, clusters, liked), liked, recent, purity),
            ],
            axis=1,
        )
    event_times = 1_600_000_000 + np.cumsum(rng.integers(60, 3600, (users, events_per_user)), axis=1)

    shape = (users, requests_per_user, candidates)
    shown = rng.integers(0, items, shape)
    item_quality = rng.normal(0, quality, items)
    logits = strength * (likes[np.arange(users)[:, None, None], cluster[shown]] - 0.5) - 0.5 + item_quality[shown]
    labels = (rng.random(shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    request_times = event_times[:, -1:] + np.cumsum(rng.integers(3600, 86400, shape[:2]), axis=1)
    tests = max(1, requests_per_user // 5)
    by_request = np.array(["train"] * (requests_per_user - tests - 1) + ["valid"] + ["test"] * tests)
    split = np.broadcast_to(by_request[:, None], shape)

    is_test = split == "test"
    truth = SyntheticTruth(
        *(
            auc(torch.from_numpy(scores[is_test]), torch.from_numpy(labels[is_test]))
            # Clusters are liked equally often, so that without a history the quality alone orders the items.
            for scores in (logits, item_quality[shown])
        )
    )
    write_dataset(
        target,
        name="synthetic",
        schema=FeatureSchema(items, 1, {"category": clusters + 1}, tasks=("click",)),
        source=f"made up (seed {seed}); AUC on test: oracle {truth.oracle_auc:.4f}, "
        f"without history {truth.no_history_auc:.4f}",
        items={"source_id": _ids(items), "category": cluster + 1},
        users={"source_id": _ids(users)},
        events={
            "user_id": np.repeat(np.arange(users), events_per_user),
            "timestamp": event_times.ravel(),
            "item_id": history.ravel() + 1,
            "action": np.zeros(history.size, np.int64),
        },
        samples={
            "user_id": np.repeat(np.arange(users), requests_per_user * candidates),
            "timestamp": np.repeat(request_times, candidates),
            "item_id": shown.ravel() + 1,
            "split": split.ravel(),
            "label_click": labels.ravel(),
        },
    )
    return truth


def _some_clusters(rng: np.random.Generator, users: int, clusters: int, chosen: int) -> Array:
    """For each user `chosen` clusters: bool [users, clusters]."""
    return np.argsort(np.argsort(rng.random((users, clusters)), axis=1), axis=1) < chosen


def _interest_events(
    rng: np.random.Generator, cluster: Array, interest: Array, chosen: int, events: int, purity: float
) -> Array:
    """Items (from 0) of events, a share `purity` of them from the clusters of interest: int64 [users, events]."""
    users = len(interest)
    favourites = np.nonzero(interest)[1].reshape(users, chosen)
    picked = np.take_along_axis(favourites, rng.integers(0, chosen, (users, events)), axis=1)
    by_cluster = np.argsort(cluster, kind="stable")
    size = np.bincount(cluster)
    first = np.cumsum(size) - size
    of_interest = by_cluster[first[picked] + (rng.random((users, events)) * size[picked]).astype(np.int64)]
    popularity = 1 / np.arange(1, len(cluster) + 1)
    popular = rng.choice(len(cluster), (users, events), p=popularity / popularity.sum())
    return np.where(rng.random((users, events)) < purity, of_interest, popular)


def _ids(count: int) -> Array:
    return np.array([str(index) for index in range(count)], object)
