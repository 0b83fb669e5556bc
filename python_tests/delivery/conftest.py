import multiprocessing

import pytest

from python_tests.delivery.queues import Queue, names, nats_queue
from python_tests.delivery.servers import nats_server
from python_tests.delivery.workers import SPEC
from vista_ext.delivery import FeedConsumer, FeedProducer
from vista_ext.store import LmdbStore


@pytest.fixture(scope="session")
def processes():
    """Clean processes without the cost of importing torch in each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "vista_ext.delivery"])
    return context


@pytest.fixture(scope="session")
def nats(tmp_path_factory):
    server = nats_server(tmp_path_factory.mktemp("nats")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def kafka():
    """The address of the broker that librdkafka has for tests: in this process, in memory, a few MB a partition."""
    confluent = pytest.importorskip("confluent_kafka", reason="pip install '.[kafka]'")
    broker = confluent.Producer({"bootstrap.servers": "", "test.mock.num.brokers": 1})
    (address,) = [f"{b.host}:{b.port}" for b in broker.list_topics(timeout=10).brokers.values()]
    yield address
    del broker


@pytest.fixture
def target(tmp_path):
    with LmdbStore.create(tmp_path / "target", SPEC) as store:
        yield store


@pytest.fixture(params=["feed", "nats", pytest.param("kafka", marks=pytest.mark.slow)])
def queue(request, tmp_path):
    name = next(names)
    if request.param == "feed":
        with LmdbStore.create(tmp_path / "source", SPEC) as source:
            yield Queue("feed", lambda: FeedProducer(source), lambda group="g": FeedConsumer(source, group))
        return
    if request.param == "nats":
        server = request.getfixturevalue("nats")
        yield nats_queue(server, name)
        return
    address = request.getfixturevalue("kafka")
    from vista_ext.delivery.kafka import KafkaConsumer, KafkaProducer

    options = {"session.timeout.ms": 6000, "topic.metadata.refresh.interval.ms": 200}
    yield Queue(
        "kafka",
        lambda **o: KafkaProducer(address, name, SPEC, **o),
        lambda group="g", **o: KafkaConsumer(address, name, SPEC, group, options=options, **o),
    )
