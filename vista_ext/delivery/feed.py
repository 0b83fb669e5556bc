"""The queue without a broker: the change feed of an LMDB store, from which consumers fetch the newest records."""

from __future__ import annotations

import time
from collections.abc import Sequence

from vista_ext.delivery.message import Message, PoisonError, decode
from vista_ext.delivery.queue import Consumer, Producer, window
from vista_ext.store import LmdbStore, record

_PAUSE = 0.05  # between two looks at a feed that has nothing new


class FeedProducer(Producer):
    """Publishes by writing: what the store has committed is in its feed.

    Args:
        store: open for writing.
        owns: whether to close it, too.
    """

    def __init__(self, store: LmdbStore, *, owns: bool = False) -> None:
        self._store, self._owns = store, owns
        store.change_feed()

    def publish(self, messages: Sequence[Message]) -> None:
        """As in `Producer`.

        Raises:
            PoisonError: a message is not a record of the store's layout.
            StoreError: it could not be written.
        """
        decoded = decode(self._store.spec, messages)
        if decoded.poison:
            raise PoisonError(decoded.poison, len(messages))
        self._store.erase(decoded.erasures.user_ids, decoded.erasures.until)
        self._store.add(decoded.summaries)

    def close(self) -> None:
        """Close the store, if it is this object's."""
        if self._owns:
            self._store.close()


class FeedConsumer(Consumer):
    """Reads the feed of a store, which remembers how far each group has come.

    A user whose record was written several times since the last look comes once, with the newest record. One consumer
    a group: two would get the same messages.

    Args:
        store: open for writing, since commits are kept in it; other processes may write it too.
        group: a name.
        owns: whether to close the store, too.
    """

    def __init__(self, store: LmdbStore, group: str, *, owns: bool = False) -> None:
        self._store, self._owns = store, owns
        self._feed, self._group = store.change_feed(), group
        self._window = window(store.spec)
        self._polled = self._feed.offset(group)
        self._committed = self._polled

    def poll(self, timeout: float) -> list[Message]:
        """As in `Consumer`."""
        end = time.monotonic() + timeout
        while True:
            changes = self._feed.read(self._polled, self._window)
            if changes or time.monotonic() >= end:
                break
            time.sleep(_PAUSE)
        users, _ = record.parse_keys([key for _, key, _ in changes])
        if changes:
            self._polled = changes[-1][0]
        return [
            Message(b"%d" % user, value, f"change {number}")
            for user, (number, _, value) in zip(users.tolist(), changes, strict=True)
        ]

    def commit(self) -> None:
        """As in `Consumer`."""
        if self._polled != self._committed:
            self._feed.commit(self._group, self._polled)
            self._committed = self._polled

    def lag(self) -> int:
        """As in `Consumer`; at most: a change that was overtaken by a newer one of the same user may be counted."""
        return self._feed.lag(self._group)

    def close(self) -> None:
        """Close the store, if it is this object's."""
        if self._owns:
            self._store.close()
