"""The durable store: LMDB, one folder, one writer at a time, readers in any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vista_ext.store import erasure, record
from vista_ext.store.base import Erasures, StoreError, StoreSpec
from vista_ext.store.checks import check_integer
from vista_ext.store.environment import Environment, new_folder
from vista_ext.store.feed import ChangeFeed
from vista_ext.store.keyed import KeyedStore

# Synced commits are worth making large, read transactions worth keeping short; both are cut here.
BATCH_RECORDS = 1024
BATCH_BYTES = 32 << 20
_NEWEST = b"\xff" * 8


class LmdbStore(KeyedStore):
    """Summaries in an LMDB environment. Made by `create` or `open`.

    A store object may be shared between threads, which take turns, not with a forked process, and a process may open an
    environment only once. Long calls are cut into transactions of at most 1024 records or 32 MB: each is atomic, the
    call is not. A failed write leaves whole transactions behind.
    """

    def __init__(self, environment: Environment, spec: StoreSpec) -> None:
        batch = BATCH_BYTES // (record.HEADER_BYTES + spec.row_bytes)
        super().__init__(spec, max(1, min(BATCH_RECORDS, batch)))
        self._environment = environment

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
            return cls(environment, environment.read_spec().for_reader(spec, f"open: store {path}"))
        except BaseException:
            environment.close()
            raise

    def _erase(self, users: np.ndarray, until: np.ndarray | None) -> int:
        prefixes = [key[:8] for key in record.keys(users, self._own_version(len(users)))]
        kept = [None] * len(users) if until is None else [value.tobytes() for value in erasure.pack(users, until)]
        erased = 0
        for begin in range(0, len(users), self._batch):
            part = slice(begin, begin + self._batch)
            erased += self._environment.write(self._erase_keys, prefixes[part], kept[part])
        return erased

    def erasures(self) -> Erasures:
        """As in `SummaryStore`."""
        return erasure.checked(f"store {self._environment.path}", erasure.read(self._environment))

    def drop_erasures(self, before: int) -> int:
        """As in `SummaryStore`."""
        check_integer("drop_erasures", "before", before, -(2**63))
        old = self.erasures()
        users = old.user_ids.numpy()[old.until.numpy() < before]
        prefixes = [key[:8] for key in record.keys(users, self._own_version(len(users)))]
        parts = (prefixes[begin : begin + self._batch] for begin in range(0, len(prefixes), self._batch))
        return sum(self._environment.write(self._drop_erasures, part, before) for part in parts)

    def erase_version(self, model_version: int) -> int:
        """Remove all summaries of one model version, after a roll-out; returns how many there were."""
        check_integer("erase_version", "model_version", model_version, 0)
        ending = model_version.to_bytes(8, "big")
        erased = 0
        for keys in self._batches_of_packed_keys():
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

    def __len__(self) -> int:
        return self._environment.entries()

    def close(self) -> None:
        """Give the environment back; closing twice is fine."""
        self._environment.close()

    def _fetch(self, users: np.ndarray, versions: np.ndarray, newest: bool, landing: record.Landing) -> None:
        keys = record.keys(users, versions)
        for begin in range(0, len(users), self._batch):
            part = slice(begin, begin + self._batch)
            with self._environment.read() as txn:
                _read_records(txn, keys[part], newest, landing, part)

    def _write(
        self,
        users: np.ndarray,
        versions: np.ndarray,
        rows: np.ndarray,
        times: np.ndarray,
        newest_wins: bool,
        only_present: bool,
    ) -> int:
        def put(txn: Any, keys: list[bytes], records: np.ndarray, event_times: list[int]) -> int:
            written: list[bytes] = []
            erased = erasure.barrier(txn, self._environment.meta)
            for key, value, time in zip(keys, records, event_times, strict=True):
                if newest_wins or only_present:
                    stored = txn.get(key)
                    if stored is None and only_present:
                        continue
                    if stored is not None and newest_wins and record.is_newer(self.spec, key, stored, time):
                        continue
                if erased(key[:8], time):
                    continue
                txn.put(key, value)
                written.append(key)
            if self._environment.feed is not None:
                self._environment.feed.note(txn, written)
            return len(written)

        records = record.pack(self.spec, users, versions, times, rows)
        return self._environment.write(put, record.keys(users, versions), records, times.tolist())

    def _erase_keys(self, txn: Any, prefixes: list[bytes], erasures: list[bytes | None]) -> int:
        """Delete the records of some users, those that an erasure covers or all; returns how many there were."""
        cursor = txn.cursor()
        keys: list[bytes] = []
        for prefix, until in zip(prefixes, erasures, strict=True):
            more = cursor.set_range(prefix)
            while more and bytes(cursor.key()[:8]) == prefix:
                key = bytes(cursor.key())
                if until is None or not record.is_newer(self.spec, key, cursor.value(), erasure.time_of(until)):
                    keys.append(key)
                more = cursor.next()
        deleted = self._delete(txn, keys)
        meta, feed = self._environment.meta, self._environment.feed
        pairs = zip(prefixes, erasures, strict=True)
        kept = [user for user, value in pairs if value is not None and erasure.put(txn, meta, user, value)]
        if feed is not None:
            feed.note(txn, [erasure.key_of(user) for user in kept])
        return deleted

    def _drop_erasures(self, txn: Any, users: list[bytes], before: int) -> int:
        meta, feed = self._environment.meta, self._environment.feed
        values = [(user, erasure.get(txn, meta, user)) for user in users]
        old = [user for user, value in values if value is not None and erasure.time_of(value) < before]
        for user in old:
            erasure.drop(txn, meta, user)
        if feed is not None:
            feed.forget(txn, [erasure.key_of(user) for user in old])
        return len(old)

    def _delete(self, txn: Any, keys: list[bytes]) -> int:
        """Delete records; returns how many there were."""
        if self._environment.feed is not None:
            self._environment.feed.forget(txn, keys)
        return sum(map(txn.delete, keys))

    def _batches_of_keys(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return map(record.parse_keys, self._batches_of_packed_keys())

    def _batches_of_packed_keys(self) -> Iterator[list[bytes]]:
        start = b""
        while True:
            with self._environment.read() as txn:
                cursor = txn.cursor()
                keys: list[bytes] = []
                more = cursor.set_range(start) if start else cursor.first()
                while more and len(keys) < self._batch:
                    keys.append(bytes(cursor.key()))
                    more = cursor.next()
            if not keys:
                return
            yield keys
            start = keys[-1] + b"\0"  # the smallest key after it


def _read_records(txn: Any, keys: list[bytes], newest: bool, landing: record.Landing, part: slice) -> None:
    """Read the records under some keys; with `newest`, of a user who has only other versions, the newest."""
    versions = landing.versions[part]
    if hasattr(txn, "read_records"):  # liblmdb itself: values stay untouched until all are found
        table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, record.KEY_BYTES)
        parts = landing.header_bytes[part], landing.rows.numpy()[part], landing.sizes[part], landing.checksums[part]
        txn.read_records(table, newest, versions, *parts)
        return
    values: list[memoryview | None] = []
    cursor = txn.cursor()
    for i, key in enumerate(keys):
        value = txn.get(key)
        if value is None and newest:
            key, value = _newest(cursor, key[:8]) or (key, None)
        if value is not None:
            versions[i] = int.from_bytes(key[8:], "big")
        values.append(value)
    landing.take(values, part.start or 0)


def _newest(cursor: Any, prefix: bytes) -> tuple[bytes, memoryview] | None:
    """The last key of a user, and its value."""
    found = cursor.set_range(prefix + _NEWEST)
    # The highest version there can be is below _NEWEST, so what is sought lies before.
    if not (cursor.prev() if found else cursor.last()):
        return None
    key = bytes(cursor.key())
    return (key, cursor.value()) if key[:8] == prefix else None
