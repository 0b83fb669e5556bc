"""What every queue offers: a producer whose `publish` returns when all is acknowledged, a consumer that commits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from vista_ext.delivery.message import Message
from vista_ext.store import StoreSpec
from vista_ext.store.record import HEADER_BYTES

# What is on its way at once, unacknowledged or uncommitted: bounds memory, and what is done again after a crash.
WINDOW_MESSAGES = 1024
WINDOW_BYTES = 32 << 20


class QueueError(RuntimeError):
    """A queue cannot do what was asked; the message names the queue and why."""


class _Closing(ABC):
    @abstractmethod
    def close(self) -> None:
        """Give connections back; closing twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Producer(_Closing):
    """Puts messages into a queue. A context manager closes it."""

    @abstractmethod
    def publish(self, messages: Sequence[Message]) -> None:
        """Publish messages, in their order for each user, and return once the queue has acknowledged all of them.

        A queue that is slow or full makes this wait; the bytes on their way are bounded.

        Raises:
            QueueError: not all were acknowledged in time. Some may have been: publish them again, that does no harm.
        """


class Consumer(_Closing):
    """Takes messages from a queue for a group, which gets each message at least once. A context manager closes it."""

    @abstractmethod
    def poll(self, timeout: float) -> list[Message]:
        """The next messages, as many as are there and fit a window; none if none came within `timeout` seconds.

        Raises:
            QueueError: the queue has been out of reach for too long.
        """

    @abstractmethod
    def commit(self) -> None:
        """Say that everything polled so far is done with. What was polled and not committed comes again."""

    @abstractmethod
    def lag(self) -> int:
        """How many messages there are that the group has not committed."""


def window(spec: StoreSpec) -> int:
    """How many records of a layout may be on their way at once."""
    return max(1, min(WINDOW_MESSAGES, WINDOW_BYTES // (HEADER_BYTES + spec.row_bytes)))


def check_fits(where: str, spec: StoreSpec, limit: int, setting: str) -> None:
    """Raises QueueError if a record of a layout is larger than a message may be."""
    size = HEADER_BYTES + spec.row_bytes
    if size > limit:
        raise QueueError(f"{where}: a message may have {limit} bytes ({setting}), a record of this layout has {size}")
