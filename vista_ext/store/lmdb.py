"""The durable store: LMDB, one folder, one writer at a time, readers in any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vista_ext.store import record
from vista_ext.store.base import (
    Found,
    MissingUserError,
    OnMiss,
    OnVersionMismatch,
    RecordError,
    StoreError,
    StoreSpec,
    Summaries,
    SummaryStore,
    VersionMismatchError,
    check_choice,
    check_integer,
    check_summaries,
    check_tensor,
)
from vista_ext.store.environment import Environment, new_folder
from vista_ext.store.feed import ChangeFeed

# Synced commits are worth making large, read transactions worth keeping short; both are cut here.
BATCH_RECORDS = 1024
BATCH_BYTES = 32 << 20
_NEWEST = b"\xff" * 8


class LmdbStore(SummaryStore):
    """Summaries in an LMDB environment. Made by `create` or `open`.

    A store object may be shared between threads, which take turns, not with a forked process, and a process may open an
    environment only once. Long calls are cut into transactions of at most 1024 records or 32 MB: each is atomic, the
    call is not. A failed write leaves whole transactions behind.
    """

    def __init__(self, environment: Environment, spec: StoreSpec) -> None:
        self._environment = environment
        self.spec = spec
        self._record_bytes = record.HEADER_BYTES + spec.row_bytes
        self._batch = max(1, min(BATCH_RECORDS, BATCH_BYTES // self._record_bytes))

    @classmethod
    def create(cls, path: Path | str, spec: StoreSpec, map_size: int = 1 << 30) -> LmdbStore:
        """Make a store and open it for writing.

        Args:
            path: a folder that does not exist yet.
            spec: what the store will hold; kept in it.
            map_size: bytes of address space to begin with, at least 1 MiB; it doubles when full.

        Raises:
            StoreError: something is at `path`, or it cannot be written.
        """
        check_integer("create", "map_size", map_size, 1 << 20)
        Environment.create(Path(path), spec, map_size)
        return cls.open(path, readonly=False)

    @classmethod
    def open(cls, path: Path | str, readonly: bool = True, *, spec: StoreSpec | None = None) -> LmdbStore:
        """Open an existing store.

        Args:
            path: the store's folder.
            readonly: several processes may write, one transaction after the other.
            spec: what the caller can read. Its layout must be the store's; its model version is the one that this
                object reads and writes, and may be newer or older than the one the store was published with. Under
                the same version, what it has in `extra` must be in the store's. None: as the store was published.

        Raises:
            StoreError: missing, truncated, not a store, of another layout (naming expected and found), or already open
                in this process.
        """
        environment = Environment(Path(path), readonly=readonly)
        try:
            published = environment.read_spec()
            if spec is None:
                return cls(environment, published)
            spec.require_layout_of(published, f"open: store {path}")
            if spec.model_version == published.model_version:
                for name, value in spec.extra.items():
                    found = published.extra.get(name)
                    if found != value:
                        raise StoreError(f"open: store {path}: extra[{name!r}]: expected {value!r}, found {found!r}")
            return cls(environment, spec)
        except BaseException:
            environment.close()
            raise

    def find(
        self, user_ids: Tensor, *, on_miss: OnMiss = "raise", on_version_mismatch: OnVersionMismatch = "raise"
    ) -> Found:
        """As in `SummaryStore`. A record's checksum and header are checked before its row is handed out."""
        check_choice("find", "on_miss", on_miss, ("raise", "flag"))
        check_choice("find", "on_version_mismatch", on_version_mismatch, ("raise", "miss", "accept"))
        users = check_tensor("find", "user_ids", user_ids, torch.int64, (None,))
        n = len(users)
        keys = record.keys(users, self._own_version(n))
        versions = np.full(n, -1, dtype=np.int64)
        other_version: list[int] = []
        headers = np.zeros(n, dtype=record.HEADER)
        rows = torch.empty((n, self.spec.row_bytes), dtype=torch.uint8)
        sink = _Sink(self._record_bytes, headers, rows.numpy())
        for begin in range(0, n, self._batch):
            with self._environment.read() as txn:
                cursor = txn.cursor()
                for i in range(begin, min(n, begin + self._batch)):
                    key, value = keys[i], txn.get(keys[i])
                    if value is None and on_version_mismatch != "miss":
                        other = _newest(cursor, key[:8])
                        if other is not None and on_version_mismatch == "accept":
                            key, value = other
                        elif other is not None:
                            other_version.append(i)
                    if value is not None:
                        sink.take(i, key, value)
                        versions[i] = int.from_bytes(key[8:], "big")
        if other_version:
            what = f"have summaries, but none of model version {self.spec.model_version}"
            raise VersionMismatchError(users[other_version].tolist(), n, what)
        hits = versions >= 0
        if not hits.all():
            if on_miss == "raise":
                raise MissingUserError(users[~hits].tolist(), n, "have no summary")
            rows.numpy()[~hits] = 0
            headers["event_time"][~hits] = -1
        record.check(self.spec, users, versions, headers, rows.numpy(), np.flatnonzero(hits))
        times = np.ascontiguousarray(headers["event_time"])
        return Found(rows, torch.from_numpy(hits), torch.from_numpy(times), torch.from_numpy(versions))

    def insert(self, user_ids: Tensor, rows: Tensor, event_times: Tensor, *, newest_wins: bool = True) -> int:
        """As in `SummaryStore`; written in the order of the keys."""
        return self._check_and_write("insert", user_ids, rows, event_times, newest_wins, only_present=False)

    def update(self, user_ids: Tensor, rows: Tensor, event_times: Tensor, *, newest_wins: bool = True) -> int:
        """As in `SummaryStore`; written in the order of the keys."""
        return self._check_and_write("update", user_ids, rows, event_times, newest_wins, only_present=True)

    def erase(self, user_ids: Tensor) -> int:
        """As in `SummaryStore`."""
        users = np.unique(check_tensor("erase", "user_ids", user_ids, torch.int64, (None,)))
        prefixes = [key[:8] for key in record.keys(users, self._own_version(len(users)))]
        erased = 0
        for begin in range(0, len(users), self._batch):
            erased += self._environment.write(self._erase, prefixes[begin : begin + self._batch])
        return erased

    def erase_version(self, model_version: int) -> int:
        """Remove all summaries of one model version, after a roll-out; returns how many there were."""
        check_integer("erase_version", "model_version", model_version, 0)
        ending = model_version.to_bytes(8, "big")
        erased = 0
        for keys in self._batches_of_keys():
            part = [key for key in keys if key[8:] == ending]
            if part:
                erased += self._environment.write(self._delete, part)
        return erased

    def change_feed(self) -> ChangeFeed:
        """The feed of this store's changes. A store open for writing gets one if it has none yet; all who write it,
        in any process, keep it from then on."""
        return ChangeFeed(self._environment)

    def publish(self) -> None:
        """Make this object's spec (model version and `extra`) the one that `open` takes by default from now on."""
        self._environment.write_spec(self.spec)

    def save_snapshot(self, path: Path | str) -> None:
        """As in `SummaryStore`; the copy is a store, outside this one. The writer's free pages are copied too."""
        inside, own = Path(path).resolve(), self._environment.path.resolve()
        if inside.is_relative_to(own):
            raise StoreError(f"save_snapshot: path must lie outside the store's own folder {own}, found {path}")
        with new_folder(Path(path), "snapshot") as folder:
            self._environment.copy(folder)

    def load_snapshot(self, path: Path | str) -> int:
        """As in `SummaryStore`; summaries keep their model versions."""
        with LmdbStore.open(path) as snapshot:
            self.spec.require_layout_of(snapshot.spec, f"load_snapshot: {path}")
            return sum(map(self.add, snapshot))

    def add(self, summaries: Summaries) -> int:
        """As in `SummaryStore`; each model version is kept beside the others."""
        users, versions, rows, times = check_summaries("add", summaries, self.spec.row_bytes)
        return self._write(users, versions, rows, times, newest_wins=True)

    def __iter__(self) -> Iterator[Summaries]:
        for keys in self._batches_of_keys():
            headers = np.zeros(len(keys), dtype=record.HEADER)
            rows = torch.empty((len(keys), self.spec.row_bytes), dtype=torch.uint8)
            sink = _Sink(self._record_bytes, headers, rows.numpy())
            present: list[bytes] = []
            with self._environment.read() as txn:
                for key in keys:
                    value = txn.get(key)
                    if value is not None:  # not erased since the keys were read
                        sink.take(len(present), key, value)
                        present.append(key)
            n = len(present)
            users, versions = record.parse_keys(present)
            record.check(self.spec, users, versions, headers[:n], rows[:n].numpy(), np.arange(n))
            times = np.ascontiguousarray(headers["event_time"][:n])
            yield Summaries(torch.from_numpy(users), rows[:n], torch.from_numpy(times), torch.from_numpy(versions))

    def __len__(self) -> int:
        return self._environment.entries()

    def close(self) -> None:
        """Give the environment back; closing twice is fine."""
        self._environment.close()

    def _own_version(self, n: int) -> np.ndarray:
        return np.full(n, self.spec.model_version, dtype=np.int64)

    def _check_and_write(
        self, call: str, user_ids: Tensor, rows: Tensor, event_times: Tensor, newest_wins: bool, only_present: bool
    ) -> int:
        users = check_tensor(call, "user_ids", user_ids, torch.int64, (None,))
        data = check_tensor(call, "rows", rows, torch.uint8, (len(users), self.spec.row_bytes))
        times = check_tensor(call, "event_times", event_times, torch.int64, (len(users),))
        versions = self._own_version(len(users))
        return self._write(users, versions, data, times, newest_wins=newest_wins, only_present=only_present)

    def _write(
        self,
        users: np.ndarray,
        versions: np.ndarray,
        rows: np.ndarray,
        times: np.ndarray,
        *,
        newest_wins: bool,
        only_present: bool = False,
    ) -> int:
        # In the order of the keys, which LMDB writes fastest, and each key once: the last of its run.
        ranks = (times, versions, users) if newest_wins else (versions, users)
        order = np.lexsort(ranks)
        users, versions, times = users[order], versions[order], times[order]
        last = np.ones(len(order), dtype=bool)
        last[:-1] = (users[1:] != users[:-1]) | (versions[1:] != versions[:-1])
        order, users, versions, times = order[last], users[last], versions[last], times[last]

        def put(txn: Any, keys: list[bytes], records: np.ndarray, event_times: list[int]) -> int:
            written: list[bytes] = []
            for key, value, time in zip(keys, records, event_times, strict=True):
                if newest_wins or only_present:
                    stored = txn.get(key)
                    if stored is None and only_present:
                        continue
                    if stored is not None and newest_wins and record.is_newer(self.spec, key, stored, time):
                        continue
                txn.put(key, value)
                written.append(key)
            if self._environment.feed is not None:
                self._environment.feed.note(txn, written)
            return len(written)

        total = 0
        for begin in range(0, len(order), self._batch):
            part = slice(begin, begin + self._batch)
            keys = record.keys(users[part], versions[part])
            records = record.pack(self.spec, users[part], versions[part], times[part], rows[order[part]])
            total += self._environment.write(put, keys, records, times[part].tolist())
        return total

    def _erase(self, txn: Any, prefixes: list[bytes]) -> int:
        """Delete all keys of some users; returns how many there were."""
        cursor = txn.cursor()
        keys: list[bytes] = []
        for prefix in prefixes:
            more = cursor.set_range(prefix)
            while more and bytes(cursor.key()[:8]) == prefix:
                keys.append(bytes(cursor.key()))
                more = cursor.next()
        return self._delete(txn, keys)

    def _delete(self, txn: Any, keys: list[bytes]) -> int:
        """Delete records; returns how many there were."""
        if self._environment.feed is not None:
            self._environment.feed.forget(txn, keys)
        return sum(map(txn.delete, keys))

    def _batches_of_keys(self) -> Iterator[list[bytes]]:
        start = b""
        while True:
            with self._environment.read() as txn:
                cursor = txn.cursor()
                found = cursor.set_range(start) if start else cursor.first()
                walk = cursor.iternext(keys=True, values=False) if found else ()
                keys = [bytes(key) for key, _ in zip(walk, range(self._batch), strict=False)]
            if not keys:
                return
            yield keys
            start = keys[-1] + b"\0"  # the smallest key after it


class _Sink:
    """Copies stored records apart, into headers and rows."""

    def __init__(self, record_bytes: int, headers: np.ndarray, rows: np.ndarray) -> None:
        self._record_bytes = record_bytes
        self._row_bytes = record_bytes - record.HEADER_BYTES
        self._headers, self._rows = memoryview(headers.view(np.uint8)), memoryview(rows.reshape(-1))

    def take(self, i: int, key: bytes, value: memoryview) -> None:
        if len(value) != self._record_bytes:
            user, version = record.parse_keys([key])
            problem = f"size expected {self._record_bytes} bytes, found {len(value)}"
            raise RecordError(int(user[0]), int(version[0]), problem)
        header = record.HEADER_BYTES
        self._headers[i * header : (i + 1) * header] = value[:header]
        self._rows[i * self._row_bytes : (i + 1) * self._row_bytes] = value[header:]


def _newest(cursor: Any, prefix: bytes) -> tuple[bytes, memoryview] | None:
    """The last key of a user, and its value."""
    found = cursor.set_range(prefix + _NEWEST)
    # The highest version there can be is below _NEWEST, so what is sought lies before.
    if not (cursor.prev() if found else cursor.last()):
        return None
    key = bytes(cursor.key())
    return (key, cursor.value()) if key[:8] == prefix else None
