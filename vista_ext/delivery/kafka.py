"""Kafka as a queue: the user id is the key, so a user's messages stay in order within a partition."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vista_ext._extras import require
from vista_ext.delivery.message import Message
from vista_ext.delivery.queue import WINDOW_BYTES, Consumer, Producer, QueueError, check_fits, window
from vista_ext.store import StoreSpec

_FRAME_BYTES = 512  # more than a batch of one message adds to its value
_ANSWER_SECONDS = 10.0

log = logging.getLogger(__name__)


class KafkaProducer(Producer):
    """Publishes into a topic; a message counts when all replicas in sync have it.

    Args:
        servers: such as "broker1:9092,broker2:9092".
        topic: it must exist, unless the broker makes topics by itself.
        spec: the layout of the records.
        options: of librdkafka, such as `security.protocol` and `ssl.ca.location`; they win over what is set here.
        patience: seconds until a message that the brokers did not acknowledge is given up.
    """

    def __init__(
        self,
        servers: str,
        topic: str,
        spec: StoreSpec,
        *,
        options: Mapping[str, Any] | None = None,
        patience: float = 30.0,
    ) -> None:
        self._kafka = require("confluent_kafka", extra="kafka")
        self._where, self._topic, self._patience = f"kafka topic {topic} at {servers}", topic, patience
        config: dict[str, Any] = {
            "bootstrap.servers": servers,
            "acks": "all",
            "enable.idempotence": True,  # nothing twice or out of order within a partition
            "partitioner": "murmur2_random",  # as in Java's client, so that its producers agree with this one
            "linger.ms": 5,
            "queue.buffering.max.kbytes": WINDOW_BYTES >> 10,
            "message.timeout.ms": int(patience * 1000),
            "message.max.bytes": 1_000_000,
        } | dict(options or {})
        check_fits(self._where, spec, int(config["message.max.bytes"]) - _FRAME_BYTES, "message.max.bytes")
        self._producer = _made(self._where, self._kafka.Producer, config)

    def publish(self, messages: Sequence[Message]) -> None:
        """As in `Producer`."""
        problems: list[str] = []

        def delivered(error: Any, message: Any) -> None:
            if error is not None:
                problems.append(str(error))

        until = time.monotonic() + self._patience
        for message in messages:
            while True:
                try:
                    self._producer.produce(self._topic, message.value, key=message.key, on_delivery=delivered)
                    break
                except BufferError:  # the window is full
                    if time.monotonic() >= until:
                        raise QueueError(f"{self._where}: nothing acknowledged for {self._patience:g} s") from None
                    until = time.monotonic() + self._patience if self._producer.poll(0.1) else until
                except self._kafka.KafkaException as error:
                    raise QueueError(f"{self._where}: {error}") from error
            self._producer.poll(0)
        left = self._producer.flush(self._patience + 1)
        if left or problems:
            found = problems[0] if problems else "no answer in time"
            raise QueueError(f"{self._where}: {left + len(problems)} messages not acknowledged: {found}")

    def close(self) -> None:
        """Wait no longer for what was not acknowledged."""
        self._producer.purge()
        self._producer.flush(1)


class KafkaConsumer(Consumer):
    """Takes from a topic. Consumers of one group share its partitions.

    Args:
        servers, topic, spec, options: as of `KafkaProducer`.
        group: a name; the brokers keep its offsets under it.
        patience: seconds that `lag` waits for an answer, and that the first `poll` gives the group to assign
            partitions, beyond its own timeout.
    """

    def __init__(
        self,
        servers: str,
        topic: str,
        spec: StoreSpec,
        group: str,
        *,
        options: Mapping[str, Any] | None = None,
        patience: float = _ANSWER_SECONDS,
    ) -> None:
        self._kafka = require("confluent_kafka", extra="kafka")
        self._where, self._patience, self._window = f"kafka topic {topic} at {servers}", patience, window(spec)
        self._topic = topic
        errors = self._kafka.KafkaError
        # Of these the client recovers by itself; a topic may be made after its consumers.
        self._passing = {
            errors._PARTITION_EOF,
            errors.UNKNOWN_TOPIC_OR_PART,
            errors._ALL_BROKERS_DOWN,
            errors._TRANSPORT,
        }
        config = {
            "bootstrap.servers": servers,
            "group.id": group,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "queued.max.messages.kbytes": WINDOW_BYTES >> 10,
        } | dict(options or {})
        self._consumer: Any = _made(self._where, self._kafka.Consumer, config)
        self._polled: dict[tuple[str, int], int] = {}
        self._joined = False
        self._consumer.subscribe([topic], on_assign=self._assigned)

    def _assigned(self, consumer: Any, partitions: Any) -> None:
        self._joined = True

    def poll(self, timeout: float) -> list[Message]:
        """As in `Consumer`."""
        # Before it has partitions, that nothing came does not say that nothing is there.
        until = time.monotonic() + self._patience
        while True:
            joined = self._joined
            found = self._call(lambda: self._consumer.consume(self._window, timeout))
            if found or joined or time.monotonic() >= until:
                return self._messages(found)

    def _messages(self, found: Sequence[Any]) -> list[Message]:
        messages = []
        for message in found:
            error = message.error()
            if error is None:
                place = message.topic(), message.partition()
                self._polled[place] = message.offset() + 1
                where = f"{message.topic()}[{message.partition()}]@{message.offset()}"
                messages.append(Message(message.key() or b"", message.value() or b"", where))
            elif error.code() not in self._passing:
                raise QueueError(f"{self._where}: {error}")
        return messages

    def commit(self) -> None:
        """As in `Consumer`. Of partitions that were given to another consumer, it polls again what was polled here."""
        polled, self._polled = self._polled, {}
        if not polled:
            return
        offsets = [self._kafka.TopicPartition(topic, part, offset) for (topic, part), offset in polled.items()]
        errors = self._kafka.KafkaError
        moved = {errors.ILLEGAL_GENERATION, errors.UNKNOWN_MEMBER_ID, errors.REBALANCE_IN_PROGRESS, errors._STATE}
        try:
            for answer in self._consumer.commit(offsets=offsets, asynchronous=False):
                if answer.error is not None:
                    raise self._kafka.KafkaException(answer.error)
        except self._kafka.KafkaException as error:
            if error.args[0].code() not in moved:
                raise QueueError(f"{self._where}: commit: {error}") from error
            log.info("%s: commit: %s; what was to be committed comes again", self._where, error)

    def lag(self) -> int:
        """As in `Consumer`, of the partitions that this consumer has now."""
        return self._call(self._lag)

    def _lag(self) -> int:
        assigned = self._consumer.assignment()
        total = 0
        for place in self._consumer.committed(assigned, timeout=self._patience):
            low, high = self._consumer.get_watermark_offsets(place, timeout=self._patience, cached=False)
            total += high - max(low, place.offset)  # the offset is negative if nothing was committed
        return total

    def _call(self, work: Any) -> Any:
        try:
            return work()
        except (self._kafka.KafkaException, RuntimeError) as error:
            raise QueueError(f"{self._where}: {error}") from error

    def close(self) -> None:
        """Leave the group."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            consumer.close()


def _made(where: str, kind: Any, config: dict[str, Any]) -> Any:
    try:
        return kind({"logger": log} | config)
    except Exception as error:  # librdkafka names the setting that it does not like
        raise QueueError(f"{where}: {error}") from error
