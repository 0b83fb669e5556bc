"""The event data set: a folder of Parquet files (docs/data_format.md), and labelled batches from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista_ext.data.batch import Batch, Candidates, Histories
from vista_ext.data.folder import SPLITS, read_folder, write_dataset
from vista_ext.data.tables import Array, DataError

__all__ = ["SPLITS", "DataError", "EventDataset", "Samples", "write_dataset"]


@dataclass(frozen=True)
class Samples:
    """Labelled rows, sorted by (user, timestamp): int64 `[m]`, `context` int64 `[m, C]`, `labels` float32 `[m, tasks]`.

    The columns of `context` and `labels` are ordered as in the schema.
    """

    users: Tensor
    timestamps: Tensor
    items: Tensor
    context: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.users.shape[0]

    def rows(self, index: Tensor) -> Samples:
        """The rows that an index picks: integers `[k]` or bools `[m]`."""
        return Samples(*(getattr(self, f.name)[index] for f in fields(self)))


class EventDataset:
    """An event data set, held in memory.

    Args:
        path: a folder as written by `write_dataset`.
        known_items: items with higher ids become item 0, the unknown one, for a model that was trained before they
            came; None for no limit.

    Attributes:
        name, source: from meta.json.
        schema: the features.
        item_features: int64 `[num_items + 1, features]`, columns as in the schema; row 0 (unknown item) is zeros.
        user_sources, item_sources: the ids of the origin, as strings; of user i, and of item i + 1, known or not.

    Raises:
        DataError: naming the file and column that is wrong, what was expected and what was found.
    """

    def __init__(self, path: Path | str, known_items: int | None = None) -> None:
        self.path = Path(path)
        self.name, self.source, self.schema, tables = read_folder(self.path)
        items, users, events, samples = (tables[table] for table in ("items", "users", "events", "samples"))
        self.user_sources: list[str] = users["source_id"].tolist()
        self.item_sources: list[str] = items["source_id"].tolist()
        features = _stack([items[name] for name in self.schema.item_features], self.schema.num_items, np.int64)
        if known_items is not None and known_items < self.schema.num_items:
            self.schema, features = replace(self.schema, num_items=known_items), features[:known_items]
            for table in (events, samples):
                table["item_id"] = np.where(table["item_id"] > known_items, 0, table["item_id"])
        self.item_features = torch.cat([torch.zeros_like(features[:1]), features])
        self._events = {name: events[name] for name in ("item_id", "action", "timestamp")}
        self._offsets = np.searchsorted(events["user_id"], np.arange(self.num_users + 1))

        rows = len(samples["user_id"])
        self._samples = Samples(
            torch.from_numpy(samples["user_id"]),
            torch.from_numpy(samples["timestamp"]),
            torch.from_numpy(samples["item_id"]),
            _stack([samples[f"ctx_{name}"] for name in self.schema.context], rows, np.int64),
            _stack([samples[f"label_{task}"] for task in self.schema.tasks], rows, np.float32),
        )
        self._rows = {split: np.flatnonzero(samples["split"] == split) for split in SPLITS}
        self._requests: dict[tuple[str, int], Array] = {}
        self._shared: dict[tuple[str, int, int], Array] = {}

    @property
    def num_users(self) -> int:
        """Users have the ids 0 to `num_users - 1`."""
        return len(self.user_sources)

    @property
    def num_events(self) -> int:
        """Events of all users together."""
        return len(self._events["timestamp"])

    def user_index(self, source_id: str) -> int:
        """The user id (0 to users - 1) of an id of the origin; DataError if there is none."""
        return self._index(self._user_ids, "users.parquet", source_id)

    def item_index(self, source_id: str) -> int:
        """The item id (1 to num_items, 0 of an item that is not known) of an id of the origin; DataError if there is
        none."""
        return self._index(self._item_ids, "items.parquet", source_id)

    def split_size(self, split: str) -> int:
        """Number of samples of a split."""
        return len(self._split_rows(split))

    def samples(self, split: str) -> Samples:
        """The samples of a split, in the order in which unshuffled batches hold them."""
        return self._samples.rows(torch.from_numpy(self._split_rows(split)))

    def end_of_events(self, users: Tensor | int) -> Tensor:
        """One second after the last event of each user, 0 for a user without events: int64, the shape of `users`."""
        user = self._checked_users(users)
        begin, end = self._offsets[user], self._offsets[user + 1]
        last = self._events["timestamp"][np.maximum(end, 1) - 1] if self.num_events else np.zeros_like(end)
        return torch.from_numpy(np.asarray(np.where(end > begin, last + 1, 0)))

    def histories(
        self,
        users: Tensor,
        before: Tensor | int | None,
        max_history: int,
        skip_last: int = 0,
        since: Tensor | None = None,
    ) -> Histories:
        """The last events of users, strictly earlier than a moment.

        Args:
            users: integers `[n]`, repeats allowed.
            before: the moment, seconds, one or `[n]`; None: after the last event (`end_of_events`).
            max_history: at most that many events of each user, the latest.
            skip_last: leave out that many of the newest events first, as a stale copy would.
            since: int64 `[n]`, seconds: only events from this moment on; None for all.

        Raises:
            ValueError: an unknown user, a negative count, `before` or `since` of another shape.
        """
        _check_count("max_history", max_history, 0)
        _check_count("skip_last", skip_last, 0)
        user = self._checked_users(users)
        if user.ndim != 1:
            raise ValueError(f"users must be one-dimensional, found shape {user.shape}")
        now = (self.end_of_events(users) if before is None else torch.as_tensor(before)).cpu().numpy()
        if now.shape not in ((), user.shape):
            raise ValueError(f"before must be one moment or have the shape {user.shape}, found {now.shape}")
        now = np.broadcast_to(now, user.shape).astype(np.int64)
        begin = self._offsets[user]
        end = _first_not_before(self._events["timestamp"], begin, self._offsets[user + 1], now)
        if since is not None:
            if tuple(since.shape) != user.shape:
                raise ValueError(f"since must have the shape {user.shape}, found {tuple(since.shape)}")
            begin = _first_not_before(self._events["timestamp"], begin, end, since.cpu().numpy().astype(np.int64))
        end = np.maximum(end - skip_last, begin)
        begin = np.maximum(end - max_history, begin)
        index, offsets = _ranges(begin, end)
        return Histories(
            torch.from_numpy(offsets),
            int((end - begin).max(initial=0)),
            torch.from_numpy(self._events["item_id"][index]),
            torch.from_numpy(self._events["action"][index]),
            torch.from_numpy(self._events["timestamp"][index]),
            torch.from_numpy(now),
        )

    def events_since(self, users: Tensor, since: Tensor, before: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """How many events users have from a moment on, and when the first of them was.

        Args:
            users: integers `[n]`.
            since: int64 `[n]`, seconds.
            before: only events strictly earlier than this moment, one or `[n]`; None for all.

        Returns:
            Counts and times, int64 `[n]`; the time is -1 where there is no such event.
        """
        user = self._checked_users(users)
        last = self.end_of_events(users) if before is None else torch.as_tensor(before)
        moments = [np.broadcast_to(x.cpu().numpy(), user.shape).astype(np.int64) for x in (since, last)]
        begin, end = self._offsets[user], self._offsets[user + 1]
        first, stop = (_first_not_before(self._events["timestamp"], begin, end, moment) for moment in moments)
        counts = np.maximum(stop - first, 0)
        times = self._events["timestamp"][np.minimum(first, max(self.num_events - 1, 0))] if self.num_events else first
        return torch.from_numpy(counts), torch.from_numpy(np.where(counts > 0, times, -1))

    def num_batches(self, split: str, requests_per_batch: int, request_window: int = 0, share_window: int = 0) -> int:
        """Number of batches of a whole pass, arguments as for `batches`."""
        _check_count("requests_per_batch", requests_per_batch, 1)
        return -(-(len(self._history_offsets(split, request_window, share_window)) - 1) // requests_per_batch)

    def batches(
        self,
        split: str,
        *,
        requests_per_batch: int,
        max_history: int,
        request_window: int = 0,
        share_window: int = 0,
        shuffle_seed: int | None = None,
        start_batch: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """One pass over a split, on the CPU.

        Samples of one user within `request_window` seconds from the first one are one request. It is read at the
        first one's timestamp: what the user did between its samples is not in its history. Requests of one user within
        `share_window` seconds from the first one share its history in the same way, and stay requests of their own.

        Args:
            requests_per_batch: the last batch may have fewer. Requests that share a history count as one.
            max_history: as for `histories`.
            request_window: seconds; 0 joins samples of equal timestamps only.
            share_window: seconds; 0 shares nothing.
            shuffle_seed: order of the histories; None: that of `samples`.
            start_batch: skip that many batches, to resume a pass.
            part: `(i, n)`: of each batch the i-th of n parts, the histories i, i + n, ...; it may be empty.

        Yields:
            Batches with one history per request, or per requests that share one (`kv_index`).

        Raises:
            ValueError: an unknown split, or a count out of range.
        """
        _check_count("max_history", max_history, 0)
        _check_count("start_batch", start_batch, 0)
        if not 0 <= part[0] < part[1]:
            raise ValueError(f"part must be (i, n) with 0 <= i < n, found {part}")
        count = self.num_batches(split, requests_per_batch, request_window, share_window)
        offsets = self._request_offsets(split, request_window)
        shared = self._history_offsets(split, request_window, share_window)
        order = np.arange(len(shared) - 1)
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        rows = self._split_rows(split)

        def batch(index: int) -> Batch:
            chosen = order[index * requests_per_batch : (index + 1) * requests_per_batch][part[0] :: part[1]]
            requests, _ = _ranges(shared[chosen], shared[chosen + 1])
            within, candidates = _ranges(offsets[requests], offsets[requests + 1])
            first = torch.from_numpy(rows[offsets[shared[chosen]]])
            samples = self._samples.rows(torch.from_numpy(rows[within]))
            return Batch(
                self.histories(self._samples.users[first], self._samples.timestamps[first], max_history),
                Candidates(
                    torch.from_numpy(candidates),
                    int(np.diff(candidates).max(initial=0)),
                    samples.items,
                    samples.context,
                ),
                torch.from_numpy(np.repeat(np.arange(len(chosen)), np.diff(shared)[chosen])),
                samples.labels,
                samples.users,
                samples.timestamps,
            )

        return (batch(index) for index in range(start_batch, count))

    def _request_offsets(self, split: str, window: int) -> Array:
        """Where requests begin among the rows of a split, and their end: int64 [requests + 1]."""
        _check_count("request_window", window, 0)
        rows = self._split_rows(split)
        if (split, window) not in self._requests:
            self._requests[split, window] = self._runs(rows, window)
        return self._requests[split, window]

    def _history_offsets(self, split: str, request_window: int, share_window: int) -> Array:
        """Where requests with a history of their own begin among all requests, and the end: int64 [histories + 1]."""
        _check_count("share_window", share_window, 0)
        offsets = self._request_offsets(split, request_window)
        if not share_window:
            return np.arange(len(offsets))
        key = split, request_window, share_window
        if key not in self._shared:
            self._shared[key] = self._runs(self._split_rows(split)[offsets[:-1]], share_window)
        return self._shared[key]

    def _runs(self, rows: Array, window: int) -> Array:
        """Cut samples into runs of one user and at most `window` seconds: where they begin, and the end."""
        users, times = (x.numpy()[rows] for x in (self._samples.users, self._samples.timestamps))
        user_end = np.searchsorted(users, users, side="right")
        # The end of the run that would begin at each row; following it from row 0 visits the real beginnings.
        following = _first_not_before(times, np.arange(len(rows)), user_end, times + window + 1).tolist()
        offsets = [0]
        while offsets[-1] < len(rows):
            offsets.append(following[offsets[-1]])
        return np.array(offsets)

    def _split_rows(self, split: str) -> Array:
        if split not in self._rows:
            raise ValueError(f"split must be one of {SPLITS}, found {split!r}")
        return self._rows[split]

    def _checked_users(self, users: Tensor | int) -> Array:
        user = torch.as_tensor(users).cpu().numpy()
        if user.dtype.kind != "i" or (user < 0).any() or (user >= self.num_users).any():
            raise ValueError(f"users must be integers from 0 to {self.num_users - 1}, found {users}")
        return user

    @cached_property
    def _user_ids(self) -> dict[str, int]:
        return {source: index for index, source in enumerate(self.user_sources)}

    @cached_property
    def _item_ids(self) -> dict[str, int]:
        known = self.schema.num_items
        return {source: index if index <= known else 0 for index, source in enumerate(self.item_sources, 1)}

    def _index(self, ids: dict[str, int], file: str, source_id: str) -> int:
        if source_id not in ids:
            raise DataError(self.path / file, "source_id", f"{source_id!r}", "no such id")
        return ids[source_id]


def _first_not_before(times: Array, low: Array, high: Array, bound: Array) -> Array:
    """For each row the first index in [low, high) whose time is not before `bound`, else high; times ascend there."""
    low, high = low.copy(), high.copy()
    while (active := np.flatnonzero(low < high)).size:
        middle = (low[active] + high[active]) // 2
        earlier = times[middle] < bound[active]
        low[active[earlier]] = middle[earlier] + 1
        high[active[~earlier]] = middle[~earlier]
    return low


def _ranges(begin: Array, end: Array) -> tuple[Array, Array]:
    """The indices of all ranges [begin, end), one after the other, and their offsets [ranges + 1]."""
    offsets = np.zeros(len(begin) + 1, np.int64)
    np.cumsum(end - begin, out=offsets[1:])
    return np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], end - begin), offsets


def _stack(columns: list[Array], rows: int, dtype: Any) -> Tensor:
    return torch.from_numpy(np.stack(columns, axis=1) if columns else np.zeros((rows, 0), dtype))


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, found {value!r}")
