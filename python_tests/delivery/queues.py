"""One queue of an engine, whichever it is: makes producers and consumers of it."""

import itertools
from functools import partial

import pytest

from python_tests.delivery.workers import SPEC, messages_of

names = (f"queue{i}" for i in itertools.count())


class Queue:
    """One queue of an engine: makes producers and consumers of it."""

    def __init__(self, engine, produce, consume):
        self.engine, self.produce, self.consume = engine, produce, consume

    def publish(self, users, generation, **options):
        with self.produce() as producer:
            producer.publish(messages_of(users, generation, **options))


def nats_queue(server, name, **options):
    pytest.importorskip("nats", reason="pip install '.[nats]'")
    from vista_ext.delivery.nats import NatsConsumer, NatsProducer

    urls = [f"nats://127.0.0.1:{server.port}"]
    return Queue(
        "nats",
        partial(NatsProducer, urls, name, SPEC, **options),
        lambda group="g", **o: NatsConsumer(urls, name, SPEC, group, **({"redeliver_after": 1.0} | options | o)),
    )
