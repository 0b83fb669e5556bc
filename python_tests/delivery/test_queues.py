"""What every queue promises, on each engine; then what only one of them has."""

import subprocess
import time

import pytest
import torch

from python_tests.delivery.queues import names, nats_queue
from python_tests.delivery.servers import nats_server
from python_tests.delivery.workers import SPEC, content, drain, messages_of, rows_of
from python_tests.needs import program
from vista_ext.delivery import FeedConsumer, FeedProducer, Message, PoisonError, QueueError, deliver
from vista_ext.delivery.queue import WINDOW_MESSAGES
from vista_ext.store import LmdbStore, StoreSpec


def poll_all(consumer, count, seconds=20):
    found, end = [], time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        found += consumer.poll(0.5)
    return found


def test_what_is_published_arrives_byte_for_byte(queue):
    sent = messages_of([5, -7, 2**63 - 1, -(2**63), 0], 9)
    with queue.produce() as producer:
        producer.publish(sent)
        producer.publish([])
    with queue.consume() as consumer:
        found = poll_all(consumer, 5)
        assert {(m.key, m.value) for m in found} == {(m.key, m.value) for m in sent} and len(found) == 5
        assert all(m.where for m in found) and not consumer.poll(0.2)


def test_what_is_not_committed_comes_again(queue):
    queue.publish(range(10), 1)
    with queue.consume() as consumer:
        assert len(poll_all(consumer, 10)) == 10
        assert consumer.lag() == 10
    with queue.consume() as consumer:
        assert len(poll_all(consumer, 10)) == 10
        consumer.commit()
        assert consumer.lag() == 0
        consumer.commit()  # nothing to commit
    queue.publish([3], 2)
    with queue.consume() as consumer:
        (found,) = poll_all(consumer, 1)
        assert found.key == b"3" and not consumer.poll(0.3)


def test_groups_do_not_share(queue):
    queue.publish(range(4), 1)
    for group in ("one", "two"):
        with queue.consume(group) as consumer:
            assert len(poll_all(consumer, 4)) == 4
            consumer.commit()


def test_users_keep_their_order(queue):
    with queue.produce() as producer:
        for generation in range(5):
            producer.publish(messages_of([1, 2, 3], generation))
    with queue.consume() as consumer:
        found = poll_all(consumer, 3 if queue.engine == "feed" else 15)
    seen = {}
    for message in found:
        seen.setdefault(message.key, []).append(int.from_bytes(message.value[40:48], "little"))
    # A feed has the newest record of each user, a broker every message.
    assert seen == {key: [4] if queue.engine == "feed" else [0, 1, 2, 3, 4] for key in (b"1", b"2", b"3")}


def test_a_window_at_a_time(queue):
    n = WINDOW_MESSAGES + 50
    queue.publish(range(n), 1)
    with queue.consume() as consumer:
        found = consumer.poll(2.0)
        assert 0 < len(found) <= WINDOW_MESSAGES
        found += poll_all(consumer, n - len(found))
    assert {int(m.key) for m in found} == set(range(n))


def test_into_a_store_in_any_order(queue, target):
    queue.publish([1, 2], 7)
    queue.publish([2, 3], 9)
    queue.publish([1, 3, 4], 4)  # late
    queue.publish([1], 1, version=8)  # another model's, beside the others
    with queue.consume() as consumer:
        done = drain(consumer, target)
        assert consumer.lag() == 0
    assert content(target) == {(1, 3): 7, (1, 8): 1, (2, 3): 9, (3, 3): 9, (4, 3): 4}
    assert done.poison == 0 and done.written >= 5


def test_what_comes_twice_does_no_harm(queue, target):
    queue.publish([1, 2], 7)
    with queue.consume("one") as consumer:
        assert drain(consumer, target).written == 2
    queue.publish([2], 8)
    before = content(target) | {(2, 3): 8}
    with queue.consume("two") as consumer:  # the whole queue again
        drain(consumer, target)
    assert content(target) == before


def damaged(message, at):
    value = bytearray(message.value)
    value[at] ^= 1
    return Message(message.key, bytes(value))


POISON = {
    "short": lambda m: Message(m.key, m.value[:-1]),
    "long": lambda m: Message(m.key, m.value + b"x"),
    "empty": lambda m: Message(m.key, b""),
    "row": lambda m: damaged(m, 100),
    "time": lambda m: damaged(m, 40),
    "magic": lambda m: damaged(m, 0),
    "key": lambda m: Message(b"77", m.value),
}


def test_poison_stops_or_is_skipped(queue, target, caplog):
    good, bad = messages_of(range(4), 1), [spoil(messages_of([5], 1)[0]) for spoil in POISON.values()]
    if queue.engine == "feed":
        with queue.produce() as producer, pytest.raises(PoisonError, match=f"{len(bad)} of {len(bad)} messages"):
            producer.publish(bad)
        return
    with queue.produce() as producer:
        producer.publish([*good[:2], *bad, *good[2:]])
    # The batch with the poison in it is neither handed on nor committed.
    message = r"\d of \d+ messages cannot be used, such as .*key b'(5|77)': "
    with queue.consume() as consumer, pytest.raises(PoisonError, match=message):
        drain(consumer, target)
    with queue.consume() as consumer:
        done = deliver(consumer, SPEC, target, idle_seconds=2, on_poison="skip")
        assert consumer.lag() == 0
    assert done.poison >= len(bad) and set(content(target)) == {(u, 3) for u in range(4)}
    assert caplog.text.count("skipped a message that cannot be used") == done.poison


def test_another_layout_is_poison(queue, target):
    if queue.engine == "feed":
        return
    queue.publish([1], 1, spec=StoreSpec("fp8_e4m3", 4, 128, model_version=3))
    with queue.consume() as consumer, pytest.raises(PoisonError, match="scheme expected 0, found 2"):
        drain(consumer, target)


def test_from_queue_to_queue(queue, tmp_path):
    """A producer can be the target: what is acknowledged there is committed here."""
    queue.publish(range(20), 3)
    with LmdbStore.create(tmp_path / "next", SPEC) as following:
        with queue.consume() as consumer, FeedProducer(following) as producer:
            assert deliver(consumer, SPEC, producer, idle_seconds=2).written == 20
            assert consumer.lag() == 0
        assert content(following) == {(user, 3): 3 for user in range(20)}


def test_a_failing_store_commits_nothing(queue, target):
    queue.publish(range(5), 1)
    target.close()
    with queue.consume() as consumer:
        with pytest.raises(RuntimeError, match="closed"):
            drain(consumer, target, idle=10)
        assert consumer.lag() == 5


def test_a_corrupt_record_in_a_feed_is_poison(tmp_path, target):
    lmdb = pytest.importorskip("lmdb")
    with LmdbStore.create(tmp_path / "source", SPEC) as source, FeedProducer(source) as producer:
        producer.publish(messages_of([1, 2], 1))
    env = lmdb.open(str(tmp_path / "source"), max_dbs=4)
    with env.begin(write=True, db=env.open_db(b"records")) as txn:
        key, value = next(iter(txn.cursor()))
        txn.put(key, value[:-1])
    env.close()
    with LmdbStore.open(tmp_path / "source", readonly=False) as source:
        done = deliver(FeedConsumer(source, "g"), SPEC, target, on_poison="skip", idle_seconds=0)
        assert (done.messages, done.poison) == (1, 1)


def test_a_full_stream_holds_producers_back_and_drops_nothing(nats, target):
    queue = nats_queue(nats, next(names), stream_options={"max_bytes": 20_000}, patience=1.5)
    with queue.produce() as producer:
        with pytest.raises(QueueError, match="maximum bytes exceeded"):
            producer.publish(messages_of(range(100), 1))
        begun = time.monotonic()
        with pytest.raises(QueueError):
            producer.publish(messages_of([1], 2))
        assert time.monotonic() - begun > 1
    with queue.consume() as consumer:
        drain(consumer, target)
    kept = {user for user, _ in content(target)}
    assert 10 < len(kept) < 40


def test_a_message_must_fit(tmp_path):
    server = nats_server(tmp_path / "nats", max_payload=500).start()
    try:
        with pytest.raises(QueueError, match=r"may have 500 bytes \(the server's max_payload\), a record .* has 704"):
            nats_queue(server, "small").produce()
    finally:
        server.stop()


def test_kafka_a_message_must_fit(kafka):
    from vista_ext.delivery.kafka import KafkaProducer

    with pytest.raises(QueueError, match=r"may have 488 bytes \(message.max.bytes\)"):
        KafkaProducer(kafka, "t", SPEC, options={"message.max.bytes": 1000})


def test_kafka_a_full_window_waits(kafka):
    from vista_ext.delivery.kafka import KafkaConsumer, KafkaProducer

    name = next(names)
    with KafkaProducer(kafka, name, SPEC, options={"queue.buffering.max.messages": 3}) as producer:
        producer.publish(messages_of(range(40), 1))
    with KafkaConsumer(kafka, name, SPEC, "g") as consumer:
        assert len(poll_all(consumer, 40)) == 40


def test_a_bad_setting_is_named(kafka):
    from vista_ext.delivery.kafka import KafkaConsumer

    with pytest.raises(QueueError, match=r"No such configuration property: \"no\.such\""):
        KafkaConsumer(kafka, "t", SPEC, "g", options={"no.such": 1})


def test_nobody_there(tmp_path):
    pytest.importorskip("nats", reason="pip install '.[nats]'")
    pytest.importorskip("confluent_kafka", reason="pip install '.[kafka]'")
    from vista_ext.delivery.kafka import KafkaProducer
    from vista_ext.delivery.nats import NatsProducer

    begun = time.monotonic()
    with pytest.raises(
        QueueError, match=r"nats stream s at nats://127\.0\.0\.1:1: no connection within 1 s: .*Connect"
    ):
        NatsProducer(["nats://127.0.0.1:1"], "s", SPEC, patience=1.0)
    with (
        KafkaProducer("127.0.0.1:1", "t", SPEC, patience=1.0) as producer,
        pytest.raises(QueueError, match=r"kafka topic t at 127\.0\.0\.1:1: 2 messages not acknowledged"),
    ):
        producer.publish(messages_of([1, 2], 1))
    assert time.monotonic() - begun < 15


def test_a_server_that_goes_and_comes_back(tmp_path, target):
    server = nats_server(tmp_path / "nats").start()
    try:
        queue = nats_queue(server, "s", patience=20.0)
        with queue.produce() as producer, queue.consume() as consumer:
            producer.publish(messages_of(range(50), 1))
            server.kill()
            with pytest.raises(QueueError, match="nats stream s"):
                nats_queue(server, "s", patience=0.5).produce()
            assert consumer.poll(0.2) == []
            server.start()
            producer.publish(messages_of(range(25, 75), 2))
            drain(consumer, target, idle=2)
        assert content(target) == {(u, 3): 1 if u < 25 else 2 for u in range(75)}
    finally:
        server.stop()


def test_a_client_that_stopped_reconnecting_is_replaced(tmp_path, target, monkeypatch):
    from vista_ext.delivery import nats as module

    monkeypatch.setattr(module, "_STUCK_SECONDS", 0.5)
    server = nats_server(tmp_path / "nats").start()
    try:
        queue = nats_queue(server, "s", patience=20.0)
        with queue.produce() as producer, queue.consume() as consumer:
            producer.publish(messages_of(range(50), 1))
            first = consumer.poll(2)
            for end in (producer, consumer):

                async def gives_up():
                    return None

                monkeypatch.setattr(end._connection.client, "_attempt_reconnect", gives_up)
            server.kill()
            server.start()
            producer.publish(messages_of(range(25, 75), 2))
            consumer.commit()  # of what came over the lost connection: it comes again
            drain(consumer, target, idle=4)
            assert first and consumer.lag() == 0
        assert content(target) == {(u, 3): 1 if u < 25 else 2 for u in range(75)}
    finally:
        server.stop()


def test_out_of_reach_for_too_long(tmp_path):
    server = nats_server(tmp_path / "nats").start()
    consumer = nats_queue(server, "s", patience=0.5).consume()
    server.kill()
    with pytest.raises(QueueError, match=r"out of reach for 0\.5 s"):
        for _ in range(100):
            consumer.poll(0.05)
    consumer.close()
    consumer.close()


def test_a_group_that_missed_messages_is_told(nats, target, caplog):
    queue = nats_queue(nats, next(names), stream_options={"max_age": 1.0})
    with queue.consume() as consumer:
        queue.publish(range(5), 1)
        drain(consumer, target)
    queue.publish(range(5), 2)
    time.sleep(2.5)
    queue.publish([1], 3)
    with queue.consume() as consumer:
        assert "group g missed up to 5 messages" in caplog.text
        assert [m.key for m in poll_all(consumer, 1)] == [b"1"]


def test_rows_are_what_was_sent(target):
    torch.testing.assert_close(rows_of([3], [4])[0, :4], torch.tensor([3, 0, 4, 0], dtype=torch.uint8))


def test_consumers_of_a_group_share(nats, tmp_path):
    queue = nats_queue(nats, next(names))
    queue.publish(range(3000), 1)
    with queue.consume(redeliver_after=30.0) as one, queue.consume(redeliver_after=30.0) as other:
        found = [set(), set()]
        for _ in range(10):
            for consumer, users in zip((one, other), found, strict=True):
                users.update(int(m.key) for m in consumer.poll(0.2))
                consumer.commit()
        assert one.lag() == 0
    assert all(found) and found[0] | found[1] == set(range(3000))


def test_tls_and_credentials(tmp_path):
    openssl = program("openssl", package="openssl")
    made = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [openssl, *made.split(), "-keyout", "key", "-out", "cert"], cwd=tmp_path, check=True, capture_output=True
    )
    server = nats_server(
        tmp_path / "nats",
        tls=f'{{ cert_file: "{tmp_path}/cert", key_file: "{tmp_path}/key" }}',
        authorization='{ user: "vista", password: "secret" }',
    ).start()
    tls = {"tls_ca": str(tmp_path / "cert")}
    try:
        queue = nats_queue(server, "s", options=tls | {"user": "vista", "password": "secret"})
        queue.publish(range(5), 1)
        with queue.consume() as consumer:
            assert len(poll_all(consumer, 5)) == 5
        for options in (tls, tls | {"user": "vista", "password": "wrong"}, {"user": "vista", "password": "secret"}):
            with pytest.raises(QueueError) as info:
                nats_queue(server, "s", options=options, patience=1.0).produce()
            assert "secret" not in str(info.value) and "wrong" not in str(info.value)
    finally:
        server.stop()
