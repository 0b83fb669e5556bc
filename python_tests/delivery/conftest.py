import multiprocessing

import pytest

from python_tests.delivery.servers import nats_server
from python_tests.delivery.workers import SPEC
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
