"""What changed between two snapshots, found from the keys alone: the rows are not read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from vista_ext.delivery.snapshot.format import KEYS
from vista_ext.delivery.snapshot.reader import Snapshot
from vista_ext.store import Erasures, StoreError

Kind = Literal["added", "removed", "newer", "older", "rewritten"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Changes:
    """The changed summaries of one bucket.

    Args:
        before, after: `KEYS` `[n]` of the same summaries in the two snapshots; -1 throughout where it is not there.
        same: how many summaries of the bucket did not change.
    """

    before: np.ndarray
    after: np.ndarray
    same: int

    @property
    def kinds(self) -> list[Kind]:
        """What happened to each: added, removed, or its event time is newer, older, or the same for other bytes."""
        old, new = self.before["event_time"], self.after["event_time"]
        added, removed = self.before["crc32"] < 0, self.after["crc32"] < 0
        which = np.select([added, removed, new > old, new < old], range(4), 4)
        return [KINDS[i] for i in which]


def diff(before: Snapshot, after: Snapshot) -> Iterator[Changes]:
    """Changes bucket by bucket, within each by ascending user id and model version.

    Raises:
        StoreError: their layouts or numbers of buckets differ, or one is damaged.
    """
    before.spec.require_layout_of(after.spec, f"diff: {after.path}")
    if len(before.files) != len(after.files):
        raise StoreError(f"diff: {after.path}: buckets expected {len(before.files)}, found {len(after.files)}")
    for bucket in range(len(before.files)):
        yield _changes(before.keys(bucket), after.keys(bucket))


def erased_since(before: Snapshot, after: Snapshot) -> Erasures:
    """Who is erased in `after` and was not, or only until an earlier moment, in `before`."""
    old, new = before.erasures(), after.erasures()
    known = dict(zip(old.user_ids.tolist(), old.until.tolist(), strict=True))
    pairs = zip(new.user_ids.tolist(), new.until.tolist(), strict=True)
    more = torch.tensor([user not in known or known[user] < until for user, until in pairs], dtype=torch.bool)
    return Erasures(new.user_ids[more], new.until[more])


def _changes(old: np.ndarray, new: np.ndarray) -> Changes:
    keys = np.concatenate([old, new])
    is_new = np.arange(len(keys)) >= len(old)
    order = np.lexsort((is_new, keys["model_version"], keys["user_id"]))
    keys, is_new = keys[order], is_new[order]
    # Of a summary that is in both, the old one comes first and the new one right behind it.
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = (keys["user_id"][1:] != keys["user_id"][:-1]) | (
        keys["model_version"][1:] != keys["model_version"][:-1]
    )
    group = np.cumsum(starts) - 1
    both = np.full((2, int(starts.sum())), -1, dtype=np.int64)
    both[is_new.astype(np.int64), group] = np.arange(len(keys))
    absent = np.array([(-1,) * len(KEYS.names or ())], dtype=KEYS)
    pairs = [np.concatenate([keys, absent])[index] for index in both]
    changed = pairs[0] != pairs[1]
    return Changes(pairs[0][changed], pairs[1][changed], int((~changed).sum()))
