"""The change feed: in which order the records of an LMDB store were last written, kept in the writer's transactions.

Two named databases: "feed" has a key under each sequence number, "changed" the sequence number of each key. A record
that is written again moves to the end, so the feed never has more entries than the store has records and erasures, and
who reads it from the beginning sees all of them. "meta" has the last number given out, and how far each consumer has
read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vista_ext.store import erasure, record

if TYPE_CHECKING:
    from vista_ext.store.environment import Environment

TABLES = (b"feed", b"changed")
LAST = b"feed/last"  # there as soon as writers must keep the feed
_COMPLETE = b"feed/complete"  # there once the records that are older than the feed are in it
_OFFSET = b"feed/offset/"
_FILL = 4096  # keys put into a new feed in one transaction


@dataclass(frozen=True)
class FeedTables:
    """The handles of an open environment, and what a writer does with them inside its transaction."""

    meta: Any
    feed: Any
    changed: Any

    def note(self, txn: Any, keys: Sequence[bytes]) -> int:
        """Move the keys of records just written to the end of the feed; returns the last number given out."""
        last = self.last(txn)
        for key in keys:
            self._drop(txn, key)
            last += 1
            txn.put(_number(last), key, db=self.feed)
            txn.put(key, _number(last), db=self.changed)
        txn.put(LAST, _number(last), db=self.meta)
        return last

    def forget(self, txn: Any, keys: Sequence[bytes]) -> None:
        """Take the keys of erased records out."""
        for key in keys:
            self._drop(txn, key)
            txn.delete(key, db=self.changed)

    def last(self, txn: Any) -> int:
        """The last number given out. Never given out again, also if its record is erased."""
        return _parse(txn.get(LAST, db=self.meta))

    def _drop(self, txn: Any, key: bytes) -> None:
        place = txn.get(key, db=self.changed)
        if place is not None:
            txn.delete(bytes(place), db=self.feed)


class ChangeFeed:
    """Reads a store's feed, and remembers how far each consumer has come. Made by `LmdbStore.change_feed`."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        environment.open_feed(create=not environment.readonly)
        if not environment.readonly:
            self._fill()

    def read(self, after: int, limit: int) -> list[tuple[int, bytes, bytes]]:
        """The next changes after a number: their numbers, keys, and the records as they are now. An erasure is a
        change, with `erasure.VERSION_BYTES` for a model version."""
        with self._environment.read(self._tables.feed) as txn:
            places = [(_parse(number), bytes(key)) for number, key in _walk(txn, _number(after + 1), limit)]
            return [(number, key, self._value(txn, key)) for number, key in places]

    def offset(self, consumer: str) -> int:
        """The number up to which a consumer has committed; 0 for one that has not."""
        with self._environment.read() as txn:
            return _parse(txn.get(_OFFSET + consumer.encode(), db=self._tables.meta))

    def commit(self, consumer: str, number: int) -> None:
        """Remember, durably, that a consumer needs nothing up to `number` again."""
        key = _OFFSET + consumer.encode()
        self._environment.write(lambda txn: txn.put(key, _number(number), db=self._tables.meta))

    def lag(self, consumer: str) -> int:
        """How many changes a consumer has not committed, at most: one that was overtaken may be counted."""
        with self._environment.read() as txn:
            offset = _parse(txn.get(_OFFSET + consumer.encode(), db=self._tables.meta))
            entries = int(txn.stat(self._tables.feed)["entries"])
            return min(self._tables.last(txn) - offset, entries)

    def _value(self, txn: Any, key: bytes) -> bytes:
        if key[8:] == erasure.VERSION_BYTES:
            value = erasure.get(txn, self._tables.meta, key[:8])
            assert value is not None  # erasures and their changes are dropped together
            return value
        return bytes(txn.get(key, db=self._environment.records))

    @property
    def _tables(self) -> FeedTables:
        tables = self._environment.feed
        assert tables is not None
        return tables

    def _fill(self) -> None:
        """Put records in that were written before there was a feed. Cut off, it goes on the next time."""
        meta = self._tables.meta
        with self._environment.read() as txn:
            if txn.get(_COMPLETE, db=meta) is not None:
                return
        start = b""
        while True:
            with self._environment.read() as txn:
                keys = [bytes(key) for key, _ in _walk(txn, start, _FILL)]
            if not keys:
                break
            self._environment.write(self._note_missing, keys)
            start = keys[-1] + b"\0"
        erased, _, _ = erasure.parse(erasure.read(self._environment))
        users = [key[:8] for key in record.keys(erased, np.zeros_like(erased))]
        for begin in range(0, len(users), _FILL):
            self._environment.write(self._note_missing_erasures, users[begin : begin + _FILL])
        self._environment.write(lambda txn: txn.put(_COMPLETE, b"", db=meta))

    def _note_missing(self, txn: Any, keys: list[bytes]) -> int:
        tables = self._tables
        missing = [k for k in keys if txn.get(k, db=tables.changed) is None and txn.get(k) is not None]
        tables.note(txn, missing)
        return len(missing)

    def _note_missing_erasures(self, txn: Any, users: list[bytes]) -> int:
        tables = self._tables
        kept = [erasure.key_of(user) for user in users if erasure.get(txn, tables.meta, user) is not None]
        missing = [key for key in kept if txn.get(key, db=tables.changed) is None]
        tables.note(txn, missing)
        return len(missing)


def _walk(txn: Any, start: bytes, limit: int) -> Iterator[tuple[Any, Any]]:
    """Keys and values from the first that is not below `start`."""
    cursor = txn.cursor()
    more = cursor.set_range(start) if start else cursor.first()
    while more and limit > 0:
        yield cursor.key(), cursor.value()
        more, limit = cursor.next(), limit - 1


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def _parse(data: Any) -> int:
    return 0 if data is None else int.from_bytes(data, "big")
