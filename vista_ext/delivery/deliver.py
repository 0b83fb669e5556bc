"""The loop between a queue and what it fills: take messages, check them, hand them on, and only then commit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vista_ext.delivery.message import Decoded, PoisonError, decode
from vista_ext.delivery.queue import Consumer, Producer
from vista_ext.store import StoreSpec, SummaryStore
from vista_ext.store.checks import check_choice

OnPoison = Literal["raise", "skip"]
_POLL_SECONDS = 0.5  # how long a stop can go unnoticed

log = logging.getLogger(__name__)


@dataclass
class Delivered:
    """What a loop has done so far.

    Args:
        messages: that could be used and were handed on.
        written: that were newer than what the store had; of a producer, all.
        erasures: that were handed on, whether there was anything to erase or not.
        poison: that could not be used and were skipped.
        bytes: of all records handed on.
    """

    messages: int = 0
    written: int = 0
    erasures: int = 0
    poison: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        older = self.messages - self.written - self.erasures
        what = f"{self.written} written, {older} not newer, {self.erasures} erasures, {self.poison} poison skipped"
        return f"{self.messages} messages: {what}"


def deliver(
    consumer: Consumer,
    spec: StoreSpec,
    target: SummaryStore | Producer,
    *,
    on_poison: OnPoison = "raise",
    idle_seconds: float | None = None,
    stop: threading.Event | None = None,
    on_batch: Callable[[Delivered, int], None] = lambda done, messages: None,
) -> Delivered:
    """Move messages from a consumer into a store, or on into another queue.

    Everything is handed on before it is committed, so whatever interrupts this, nothing acknowledged is lost; what
    comes twice or late does no harm, because a store keeps the newest event time of each user and model version, and of
    an erased user nothing up to the time of the erasure.

    Args:
        spec: the layout of the records.
        on_poison: "raise" at a message that cannot be used, with nothing of its batch committed or handed on, or
            "skip" it: it is counted, logged, and committed like the others.
        idle_seconds: return when the consumer had nothing for so long; None goes on for ever.
        stop: set from elsewhere, ends the loop after the batch at hand.
        on_batch: called after each commit, with the totals so far and the messages of the batch.

    Raises:
        PoisonError: by policy.
        QueueError, StoreError: whatever the two ends raise. Nothing of the batch at hand was committed.
    """
    check_choice("deliver", "on_poison", on_poison, ("raise", "skip"))
    done = Delivered()
    pause = _POLL_SECONDS if idle_seconds is None else min(_POLL_SECONDS, idle_seconds)
    idle = 0.0  # counted, not timed: a consumer may need longer than that until it can say that there is nothing
    while stop is None or not stop.is_set():
        messages = consumer.poll(pause)
        if not messages:
            idle += pause
            if idle_seconds is not None and idle >= idle_seconds:
                break
            continue
        idle = 0.0
        decoded = decode(spec, messages)
        if decoded.poison and on_poison == "raise":
            raise PoisonError(decoded.poison, len(messages))
        for poison in decoded.poison:
            log.warning("skipped a message that cannot be used: %s", poison)
        done.written += _hand_on(decoded, target)
        consumer.commit()
        done.messages += len(decoded.messages)
        done.erasures += len(decoded.erasures)
        done.poison += len(decoded.poison)
        done.bytes += sum(len(m.value) for m in decoded.messages)
        on_batch(done, len(messages))
    return done


def _hand_on(decoded: Decoded, target: SummaryStore | Producer) -> int:
    if isinstance(target, SummaryStore):
        target.erase(decoded.erasures.user_ids, decoded.erasures.until)
        return target.add(decoded.summaries)
    target.publish(decoded.messages)
    return len(decoded.summaries)
