"""kill -9 of producer, consumer and broker at random moments: nothing acknowledged is lost, the content is the same."""

import os
import random
import signal
import time
from functools import partial

import pytest

from python_tests.delivery.servers import nats_server
from python_tests.delivery.workers import (
    SPEC,
    consume_for_ever,
    content,
    drain,
    from_feed,
    into_feed,
    publish_for_ever,
)
from vista_ext.store import LmdbStore

ROUNDS = int(os.environ.get("VISTA_KILL_ROUNDS", "10"))
SEED = int(os.environ.get("VISTA_KILL_SEED", "0"))
SHARED, BATCH = 40, 10  # users in every generation, and users that come once
STRIDE = 10_000  # generations that one producer may get through


class Pipeline:
    """A producer and a consumer in processes of their own, and all that the producers told."""

    def __init__(self, processes, make_producer, make_consumer, path):
        self.processes, self.path = processes, path
        self.make_producer, self.make_consumer = make_producer, make_consumer
        self.acknowledged, self.tried = set(), set()
        self.starts = 0
        self.working = processes.Event()
        LmdbStore.create(path, SPEC).close()
        self.producer = self.consumer = None

    def start_producer(self):
        self.pipe, theirs = self.processes.Pipe(duplex=False)
        arguments = self.make_producer, theirs, STRIDE * self.starts, SHARED, BATCH
        self.producer = self.processes.Process(target=publish_for_ever, args=arguments)
        self.producer.start()
        theirs.close()
        self.starts += 1

    def start_consumer(self):
        self.working.clear()
        arguments = self.make_consumer, self.path, self.working
        self.consumer = self.processes.Process(target=consume_for_ever, args=arguments)
        self.consumer.start()

    def kill_producer(self):
        assert self.producer.is_alive(), "it ended by itself"
        assert self.pipe.poll(60), "it does nothing"
        os.kill(self.producer.pid, signal.SIGKILL)
        self.producer.join(30)
        self.listen()
        with pytest.raises(EOFError):
            self.pipe.recv()

    def kill_consumer(self):
        assert self.consumer.is_alive(), "it ended by itself"
        os.kill(self.consumer.pid, signal.SIGKILL)
        self.consumer.join(30)

    def listen(self):
        try:
            while self.pipe.poll(0):
                what, generation = self.pipe.recv()
                (self.acknowledged if what == "acknowledged" else self.tried).add(generation)
        except EOFError:
            return

    def run(self, victims, kill_broker=None):
        """Kill, restart, and check in the end what the store holds; returns what was killed how often."""
        chance = random.Random(SEED)
        counts = dict.fromkeys(victims, 0)
        self.start_producer()
        self.start_consumer()
        for _ in range(ROUNDS):
            assert self.pipe.poll(60) and self.working.wait(60), "not at work"
            self.listen()
            time.sleep(chance.uniform(0.0, 0.3))
            victim = chance.choice(victims)
            counts[victim] += 1
            if victim == "producer":
                self.kill_producer()
                self.start_producer()
            elif victim == "consumer":
                self.kill_consumer()
                self.start_consumer()
            else:
                kill_broker()
        self.kill_producer()
        return counts

    def check(self, again):
        """The store has all that was acknowledged, nothing that was not tried, and what a consumer that nobody killed
        makes of the same messages (`again`)."""
        with LmdbStore.open(self.path) as store:
            found = content(store)
        newest = max(self.acknowledged)
        users_once = {user: (user - SHARED) // BATCH for user, _ in found if user >= SHARED}
        assert all(found[user, SPEC.model_version] == generation for user, generation in users_once.items())
        generations = set(users_once.values())
        assert self.acknowledged <= generations <= self.tried
        for generation in self.acknowledged:  # each of them completely
            for user in range(SHARED + generation * BATCH, SHARED + (generation + 1) * BATCH):
                assert user in users_once
        for user in range(SHARED):
            assert newest <= found[user, SPEC.model_version] <= max(self.tried)
        assert found == again
        return len(found)


@pytest.mark.slow
def test_kills_of_producer_consumer_and_broker(tmp_path, processes, record_property):
    pytest.importorskip("nats", reason="pip install '.[nats]'")
    from vista_ext.delivery.nats import NatsConsumer, NatsProducer

    server = nats_server(tmp_path / "nats").start()
    urls = [f"nats://127.0.0.1:{server.port}"]
    produce = partial(NatsProducer, urls, "kills", SPEC)
    consume = partial(NatsConsumer, urls, "kills", SPEC, redeliver_after=1.0)
    pipeline = Pipeline(processes, produce, partial(consume, "group"), tmp_path / "store")

    def kill_broker():
        server.kill()
        server.start()

    try:
        counts = pipeline.run(["producer", "consumer", "broker"], kill_broker)
        with consume("group") as watching:
            end = time.monotonic() + 60
            while watching.lag() and time.monotonic() < end:
                time.sleep(0.1)
            assert watching.lag() == 0
        pipeline.kill_consumer()
        with LmdbStore.create(tmp_path / "again", SPEC) as store, consume("another") as consumer:
            drain(consumer, store, idle=2)
            again = content(store)
        told = f"{counts}, {pipeline.check(again)} users, {len(pipeline.acknowledged)} generations acknowledged"
        record_property("kills", told)
        print(told)
    finally:
        server.stop()


@pytest.mark.slow
def test_kills_without_a_broker(tmp_path, processes):
    source = tmp_path / "source"
    LmdbStore.create(source, SPEC).close()
    pipeline = Pipeline(processes, partial(into_feed, source), partial(from_feed, source, "group"), tmp_path / "store")
    counts = pipeline.run(["producer", "consumer"])
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with LmdbStore.open(source) as store:
            feed = store.change_feed()
            if feed.lag("group") == 0:
                break
        time.sleep(0.1)
    pipeline.kill_consumer()
    with LmdbStore.open(source) as store:
        again = content(store)
    print(f"{counts}, {pipeline.check(again)} users, {len(pipeline.acknowledged)} generations acknowledged")
