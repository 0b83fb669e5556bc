"""What stores of records have in common: they fetch and write records by user and version, the rest is here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from vista_ext.store.base import STRICT, Found, ReadPolicy, StoreSpec, StoreUnavailableError, Summaries, SummaryStore
from vista_ext.store.checks import check_summaries, check_tensor
from vista_ext.store.reading import landing_for, settle
from vista_ext.store.record import Landing, in_key_order


def invalidate(caches: WeakValueDictionary[int, Any], user_ids: Tensor) -> None:
    """Make all of these caches forget some users. Others may come and go meanwhile: `valuerefs` is one step, where the
    loop over a weak container fails when another thread adds to it."""
    for reference in caches.valuerefs():
        if (cache := reference()) is not None:
            cache.invalidate(user_ids)


class KeyedStore(SummaryStore):
    """A store that holds each summary as one record (`vista_ext.store.record`), found by user id and model version."""

    def __init__(self, spec: StoreSpec, batch: int) -> None:
        self.spec = spec
        # In front of this object, by themselves: they forget whom it erases.
        self.caches: WeakValueDictionary[int, Any] = WeakValueDictionary()
        self._batch = batch  # records that are written, or read, together

    @abstractmethod
    def _fetch(self, users: np.ndarray, versions: np.ndarray, newest: bool, landing: Landing) -> None:
        """Land the records of some users and versions; with `newest`, of a user who has only other versions, the
        newest."""

    @abstractmethod
    def _write(
        self,
        users: np.ndarray,
        versions: np.ndarray,
        rows: np.ndarray,
        times: np.ndarray,
        newest_wins: bool,
        only_present: bool,
    ) -> int:
        """Write a batch, each key once and in the order of the keys; returns how many records were written."""

    @abstractmethod
    def _erase(self, users: np.ndarray, until: np.ndarray | None) -> int:
        """`erase` for users that ascend, each once."""

    @abstractmethod
    def _batches_of_keys(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Users and versions of all records, in their order, a batch at a time."""

    def find(self, user_ids: Tensor, policy: ReadPolicy = STRICT, *, out: Tensor | None = None) -> Found:
        """As in `SummaryStore`."""
        users = check_tensor("find", "user_ids", user_ids, torch.int64, (None,))
        landing = landing_for(self.spec, len(users), out)
        try:
            self._fetch(users, self._own_version(len(users)), policy.on_version_mismatch != "miss", landing)
        except StoreUnavailableError:
            if policy.on_unavailable == "raise":
                raise
            return settle(policy, users, landing_for(self.spec, len(users), out), unavailable=True)
        return settle(policy, users, landing)

    def insert(self, user_ids: Tensor, rows: Tensor, event_times: Tensor, *, newest_wins: bool = True) -> int:
        """As in `SummaryStore`; written in the order of the keys."""
        return self._check_and_write("insert", user_ids, rows, event_times, newest_wins, only_present=False)

    def update(self, user_ids: Tensor, rows: Tensor, event_times: Tensor, *, newest_wins: bool = True) -> int:
        """As in `SummaryStore`; written in the order of the keys."""
        return self._check_and_write("update", user_ids, rows, event_times, newest_wins, only_present=True)

    def add(self, summaries: Summaries) -> int:
        """As in `SummaryStore`; each model version is kept beside the others."""
        users, versions, rows, times = check_summaries("add", summaries, self.spec.row_bytes)
        return self._write_each_once(users, versions, rows, times, newest_wins=True, only_present=False)

    def erase(self, user_ids: Tensor, until: Tensor | None = None) -> int:
        """As in `SummaryStore`. When it returns, caches in front of this object have forgotten the users, too."""
        users, times = self._users_to_erase(user_ids, until)
        try:
            return self._erase(users, times)
        finally:  # after a failure, too: some may be erased
            invalidate(self.caches, torch.from_numpy(users))

    def load_snapshot(self, path: Path | str) -> int:
        """As in `SummaryStore`; summaries keep their model versions."""
        from vista_ext.store.lmdb import LmdbStore  # a snapshot is an embedded store, whatever it was taken of

        with LmdbStore.open(path) as snapshot:
            self.spec.require_layout_of(snapshot.spec, f"load_snapshot: {path}")
            erased = snapshot.erasures()
            self.erase(erased.user_ids, erased.until)
            return sum(self.add(summaries) for summaries in snapshot)

    def __iter__(self) -> Iterator[Summaries]:
        for users, versions in self._batches_of_keys():
            landing = Landing(self.spec, len(users))
            self._fetch(users, versions, False, landing)
            for error in landing.damage(users).values():
                raise error
            there = torch.from_numpy(landing.sizes >= 0)  # the others were erased since the keys were read
            if not there.any():
                continue
            times = torch.from_numpy(np.ascontiguousarray(landing.headers["event_time"]))
            rows = landing.rows if there.all() else torch.from_numpy(landing.rows.numpy()[there])
            yield Summaries(
                torch.from_numpy(users)[there], rows, times[there], torch.from_numpy(landing.versions)[there]
            )

    @staticmethod
    def _users_to_erase(user_ids: Tensor, until: Tensor | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Each user once, ascending, with the latest time."""
        users = check_tensor("erase", "user_ids", user_ids, torch.int64, (None,))
        if until is None:
            return np.unique(users), None
        times = check_tensor("erase", "until", until, torch.int64, (len(users),))
        order = in_key_order(users, np.zeros_like(users), times, True)
        return users[order], times[order]

    def _own_version(self, n: int) -> np.ndarray:
        return np.full(n, self.spec.model_version, dtype=np.int64)

    def _check_and_write(
        self, call: str, user_ids: Tensor, rows: Tensor, event_times: Tensor, newest_wins: bool, only_present: bool
    ) -> int:
        users = check_tensor(call, "user_ids", user_ids, torch.int64, (None,))
        data = check_tensor(call, "rows", rows, torch.uint8, (len(users), self.spec.row_bytes))
        times = check_tensor(call, "event_times", event_times, torch.int64, (len(users),))
        versions = self._own_version(len(users))
        return self._write_each_once(users, versions, data, times, newest_wins=newest_wins, only_present=only_present)

    def _write_each_once(
        self,
        users: np.ndarray,
        versions: np.ndarray,
        rows: np.ndarray,
        times: np.ndarray,
        *,
        newest_wins: bool,
        only_present: bool,
    ) -> int:
        order = in_key_order(users, versions, times, newest_wins)
        parts = (order[begin : begin + self._batch] for begin in range(0, len(order), self._batch))
        return sum(
            self._write(users[part], versions[part], rows[part], times[part], newest_wins, only_present)
            for part in parts
        )
