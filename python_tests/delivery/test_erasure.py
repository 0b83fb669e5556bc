"""Erasing is delivered: through every queue and through snapshots, twice, late, and with processes killed."""

import os
import random
import signal
import time
from functools import partial

import pytest
import torch

from python_tests.delivery.queues import nats_queue
from python_tests.delivery.servers import nats_server
from python_tests.delivery.test_message import FUZZ_SECONDS, spoil
from python_tests.delivery.workers import (
    SPEC,
    consume_for_ever,
    content,
    drain,
    from_feed,
    messages_of,
    summaries_of,
)
from vista_ext.delivery import Message, decode, deliver, encode_erasures
from vista_ext.delivery.snapshot import Snapshot, erased_since, export_snapshot, import_snapshot
from vista_ext.store import Erasures, LmdbStore, StoreError


def erasures(**until):
    """Of users u1, u2, ..."""
    users = [int(name[1:]) for name in until]
    return Erasures(torch.tensor(users, dtype=torch.int64), torch.tensor(list(until.values()), dtype=torch.int64))


def erased(store):
    found = store.erasures()
    return dict(zip(found.user_ids.tolist(), found.until.tolist(), strict=True))


def apply(store, messages):
    decoded = decode(SPEC, messages)
    assert not decoded.poison
    store.erase(decoded.erasures.user_ids, decoded.erasures.until)
    store.add(decoded.summaries)


def test_an_erasure_arrives(queue, target):
    target.add(summaries_of([1, 2, 3], 4))
    sent = [*messages_of([1, 2], 5), *encode_erasures(erasures(u1=7, u9=7)), *messages_of([2, 9], 6)]
    with queue.produce() as producer, queue.consume() as consumer:
        producer.publish(sent)
        done = drain(consumer, target)
        assert consumer.lag() == 0
        assert content(target) == {(2, 3): 6, (3, 3): 4} and erased(target) == {1: 7, 9: 7}
        assert done.erasures == 2 and "2 erasures, 0 poison" in str(done)
        producer.publish(messages_of([1, 9], 8))  # who came back
        drain(consumer, target)
        assert content(target) == {(1, 3): 8, (2, 3): 6, (3, 3): 4, (9, 3): 8}


def test_any_order_and_repetition_end_the_same(tmp_path):
    chance, ends = random.Random(0), set()
    sent = [message for when in (1, 4, 6, 9) for message in messages_of([1, 2], when)]
    sent += encode_erasures(erasures(u1=5, u2=9)) + encode_erasures(erasures(u1=3))
    for round_ in range(8):
        mixed = chance.choices(sent, k=10) + chance.sample(sent, len(sent))
        with LmdbStore.create(tmp_path / f"{round_}", SPEC) as store:
            while mixed:
                size = chance.randrange(1, 6)
                apply(store, mixed[:size])
                mixed = mixed[size:]
            ends.add((tuple(content(store).items()), tuple(erased(store).items())))
    assert ends == {((((1, 3), 9),), ((1, 5), (2, 9)))}


def test_from_store_to_store_through_a_chain(tmp_path, target):
    """Store, feed, store, feed, store: a store passes on what it was told."""
    first, second = (LmdbStore.create(tmp_path / name, SPEC) for name in ("first", "second"))
    with first, second:
        first.add(summaries_of(range(10), 5))
        for source, sink in ((first, second), (second, target)):
            with from_store(source) as feed:
                drain(feed, sink, idle=0)
        first.erase(torch.tensor([3, 4]), torch.tensor([5, 4]))
        for source, sink in ((first, second), (second, target)):
            with from_store(source) as feed:
                drain(feed, sink, idle=0)
        assert content(target) == content(first) and erased(target) == {3: 5, 4: 4}
        assert {user for user, _ in content(target)} == set(range(10)) - {3}


def from_store(store):
    from vista_ext.delivery import FeedConsumer

    return FeedConsumer(store, "g")


def test_fuzz():
    chance, spoiled = random.Random(int(os.environ.get("VISTA_FUZZ_SEED", "0"))), 0
    end = time.monotonic() + FUZZ_SECONDS / 5
    while time.monotonic() < end:
        users = torch.tensor([chance.randrange(-(2**63), 2**63) for _ in range(6)])
        sent = encode_erasures(Erasures(users, torch.tensor([chance.randrange(-(2**63), 2**63) for _ in range(6)])))
        mixed = [Message(m.key, spoil(chance, m.value)) if chance.random() < 0.5 else m for m in sent]
        mixed += messages_of([1], 1)
        decoded = decode(SPEC, mixed)
        sound = [m for m, s in zip(mixed, sent, strict=False) if m.value == s.value]
        assert encode_erasures(decoded.erasures) == sound and len(decoded.summaries) == 1
        assert len(decoded.poison) == 6 - len(sound)
        spoiled += len(decoded.poison)
    assert spoiled > 10


def test_snapshots_carry_them(tmp_path, target):
    with LmdbStore.create(tmp_path / "store", SPEC) as store:
        store.add(summaries_of(range(100), 5))
        export_snapshot(store, tmp_path / "before", SPEC, buckets=2)
        store.erase(torch.tensor([7, 8, 500]), torch.tensor([5, 4, 1]))
        export_snapshot(store, tmp_path / "after", SPEC, buckets=2)
    before, after = Snapshot(tmp_path / "before"), Snapshot(tmp_path / "after")
    assert len(before.erasures()) == 0 and len(after) == 99
    assert after.erasures().user_ids.tolist() == [7, 8, 500] and after.erasures(8, 9).until.tolist() == [4]
    assert erased_since(before, after).user_ids.tolist() == [7, 8, 500]
    assert len(erased_since(after, after)) == len(erased_since(after, before)) == 0
    import_snapshot(before, target)
    import_snapshot(after, target, first=8)
    assert len(target) == 100 and erased(target) == {8: 4, 500: 1}
    import_snapshot(after, target)
    import_snapshot(before, target)  # an old one, afterwards
    assert len(target) == 99 and (7, 3) not in content(target) and erased(target) == {7: 5, 8: 4, 500: 1}


def test_what_an_export_may_know_of_an_erasure_it_does(tmp_path):
    """A user is erased after the record was written and before the snapshot is complete."""
    with LmdbStore.create(tmp_path / "store", SPEC) as store:
        store.add(summaries_of(range(2000), 5))

        def batches():
            for batch in store:
                yield batch
                store.erase(torch.tensor([3]), torch.tensor([5]))

        export_snapshot(batches(), tmp_path / "snap", SPEC, erasures=store.erasures)
    with LmdbStore.create(tmp_path / "target", SPEC) as target:
        import_snapshot(Snapshot(tmp_path / "snap"), target)
        assert len(target) == 1999 and erased(target) == {3: 5}


def test_a_damaged_file_of_erasures(tmp_path):
    with LmdbStore.create(tmp_path / "store", SPEC) as store:
        store.erase(torch.tensor([7, 8]), torch.tensor([5, 4]))
        export_snapshot(store, tmp_path / "snap", SPEC, buckets=1)
    file, chance = tmp_path / "snap" / "_erased.parquet", random.Random(0)
    whole = file.read_bytes()
    for _ in range(50):
        file.write_bytes(spoil(chance, whole))
        if file.read_bytes() != whole:
            with pytest.raises(StoreError, match=r"_erased\.parquet: expected \d+ bytes"):
                Snapshot(tmp_path / "snap").erasures()
    file.unlink()
    with pytest.raises(StoreError, match=r"_erased\.parquet"):
        import_snapshot(Snapshot(tmp_path / "snap"), LmdbStore.create(tmp_path / "target", SPEC))


def change_for_ever(make_producer, report, first):
    """Each user is written, and erased together with the next one's writing."""
    with make_producer() as producer:
        for user in range(first, first + 10**6):
            producer.publish(messages_of([user], 1))
            producer.publish(encode_erasures(Erasures(torch.tensor([user]), torch.tensor([1]))))
            report.send(user)


def into(path):
    from vista_ext.delivery import FeedProducer

    return FeedProducer(LmdbStore.open(path, readonly=False), owns=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["feed", "nats"])
def test_kills_lose_no_erasure(tmp_path, processes, engine):
    """What was acknowledged as erased is erased in the end, whether producer, consumer or broker was killed."""
    chance, path = random.Random(1), tmp_path / "store"
    LmdbStore.create(path, SPEC).close()
    server = nats_server(tmp_path / "nats").start() if engine == "nats" else None
    if server is not None:
        queue = nats_queue(server, "kills")
        produce, consume = queue.produce, partial(nats_consumer, server.port)
    else:
        LmdbStore.create(tmp_path / "source", SPEC).close()
        produce, consume = partial(into, tmp_path / "source"), partial(from_feed, tmp_path / "source", "group")
    told, first, working, running = set(), 0, processes.Event(), {}

    def start(name):
        nonlocal first
        if name == "producer":
            running["pipe"], theirs = processes.Pipe(duplex=False)
            running[name] = processes.Process(target=change_for_ever, args=(produce, theirs, first))
            first += 10**6
        else:
            running[name] = processes.Process(target=consume_for_ever, args=(consume, path, working))
        running[name].start()

    def kill(name):
        os.kill(running[name].pid, signal.SIGKILL)
        running[name].join(30)
        while name == "producer" and running["pipe"].poll(0):
            try:
                told.add(running["pipe"].recv())
            except EOFError:
                break

    try:
        start("producer")
        start("consumer")
        for _ in range(6):
            assert running["pipe"].poll(60) and working.wait(60)
            time.sleep(chance.uniform(0.0, 0.2))
            victim = chance.choice(["producer", "consumer", "broker"] if server else ["producer", "consumer"])
            if victim == "broker":
                server.kill()
                server.start()
            else:
                kill(victim)
                start(victim)
        kill("producer")
        kill("consumer")
        with LmdbStore.open(path, readonly=False) as store, consume() as consumer:
            end = time.monotonic() + 60
            while consumer.lag() and time.monotonic() < end:
                deliver(consumer, SPEC, store, idle_seconds=1.5)
            assert told and told <= erased(store).keys()
            left = {user for user, _ in content(store)}
            assert not left & told and len(left) <= 7  # of each killed producer at most the one at hand
            store.add(summaries_of(sorted(told), 1))
            assert not {user for user, _ in content(store)} & told
    finally:
        for name in ("producer", "consumer"):
            if running.get(name) is not None and running[name].is_alive():
                kill(name)
        if server is not None:
            server.stop()


def nats_consumer(port):
    from vista_ext.delivery.nats import NatsConsumer

    return NatsConsumer([f"nats://127.0.0.1:{port}"], "kills", SPEC, "group", redeliver_after=1.0)
