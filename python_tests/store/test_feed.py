"""The change feed: complete, in order, no longer than the store, and in the same transaction as the records."""

import os
import random
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from workers import SPEC, constant, grow, ids, rows_of, write_generations

from vista_ext.store import LmdbStore, StoreError, StoreSpec, Summaries, record


def users_of(changes):
    return record.parse_keys([key for _, key, _ in changes])[0].tolist()


def test_what_is_written_last_comes_last(store, put):
    feed = store.change_feed()
    put([1, 2, 3])
    put([2], 5)
    put([1], 0)  # older: not written
    store.erase(ids(3))
    changes = feed.read(0, 10)
    assert users_of(changes) == [1, 2] and [number for number, _, _ in changes] == [1, 4]
    headers = [record.parse_keys([key]) for _, key, _ in changes]
    assert [int(version[0]) for _, version in headers] == [3, 3]
    assert changes[1][2][64:] == rows_of([2], [5]).numpy().tobytes()
    assert users_of(feed.read(1, 10)) == [2] and feed.read(4, 10) == []
    assert users_of(feed.read(0, 1)) == [1]


def test_numbers_are_not_given_out_again(store, put):
    feed = store.change_feed()
    put([1, 2])
    store.erase(ids(1, 2))
    put([3])
    assert [number for number, _, _ in feed.read(0, 10)] == [3]


def test_a_store_gets_a_feed_of_what_it_holds(path, store, put, monkeypatch):
    monkeypatch.setattr("vista_ext.store.feed._FILL", 2)
    put([5, 3, 1, 4, 2])
    feed = store.change_feed()
    assert users_of(feed.read(0, 10)) == [1, 2, 3, 4, 5]
    put([3], 2)
    store.close()
    with LmdbStore.open(path) as reader:
        assert users_of(reader.change_feed().read(0, 10)) == [1, 2, 4, 5, 3]


def test_reading_only_makes_no_feed(path, store):
    store.close()
    with LmdbStore.open(path) as reader, pytest.raises(StoreError, match="it has no change feed"):
        reader.change_feed()


def test_offsets(path, store, put):
    feed = store.change_feed()
    put([1, 2, 3])
    assert feed.offset("a") == 0 and feed.lag("a") == 3
    feed.commit("a", 2)
    assert feed.offset("a") == 2 and feed.lag("a") == 1 and feed.lag("b") == 3
    put([1, 2, 3], 2)
    assert feed.lag("a") == 3, "no more than there are records"
    store.close()
    with LmdbStore.open(path) as reader:
        assert reader.change_feed().offset("a") == 2


def write_and_tell(path, opened, go, report):
    with LmdbStore.open(path, readonly=False) as store:
        opened.set()
        go.wait(30)
        store.insert(ids(7), rows_of([7], [1]), ids(1))
        report.send(store._environment.feed is not None)


def test_a_writer_in_another_process_keeps_it_too(path, store, processes):
    """Also one that opened the store before it had a feed."""
    opened, go, (mine, theirs) = processes.Event(), processes.Event(), processes.Pipe(duplex=False)
    worker = processes.Process(target=write_and_tell, args=(path, opened, go, theirs))
    worker.start()
    assert opened.wait(30)
    feed = store.change_feed()
    go.set()
    assert mine.poll(30) and mine.recv()
    worker.join(30)
    assert users_of(feed.read(0, 10)) == [7]


def test_the_map_grows_under_a_feed(path, processes):
    LmdbStore.create(path, SPEC, map_size=1 << 20).close()
    with LmdbStore.open(path, readonly=False) as store:
        feed = store.change_feed()
        worker = processes.Process(target=grow, args=(path, 0, 2000))
        worker.start()
        worker.join(30)
        assert users_of(feed.read(0, 9999)) == list(range(2000))


class FullOnce:
    """An environment of LMDB whose map is full when the first table is made."""

    def __init__(self, env, error):
        self.env, self.error, self.full = env, error, True

    def open_db(self, name, create):
        if self.full:
            self.full = False
            raise self.error
        return self.env.open_db(name, create=create)

    def __getattr__(self, name):
        return getattr(self.env, name)


def test_a_feed_where_the_map_is_full(store, put):
    put([1, 2])
    environment = store._environment
    before = environment._env.info()["map_size"]
    environment._env = FullOnce(environment._env, environment._lmdb.MapFullError)
    assert users_of(store.change_feed().read(0, 9999)) == [1, 2]
    assert environment._env.info()["map_size"] == 2 * before


def test_versions_are_changes_of_their_own(path, store, put):
    store.change_feed()
    put([1])
    store.close()
    with LmdbStore.open(path, readonly=False, spec=StoreSpec("int8", 16, 256, model_version=9)) as newer:
        put([1, 2], into=newer)
        changes = newer.change_feed().read(0, 10)
        assert [v.tolist() for v in record.parse_keys([k for _, k, _ in changes])] == [[1, 1, 2], [3, 9, 9]]
        assert newer.erase_version(3) == 1
        assert users_of(newer.change_feed().read(0, 10)) == [1, 2]


def test_adding_keeps_versions_and_the_newest(store, put):
    put([1], 10)
    users, times, versions = ids(1, 1, 2), ids(9, 4, 4), ids(3, 8, 8)
    summaries = Summaries(users, rows_of(users, times), times, versions)
    assert store.add(summaries) == 2
    found = [(b.user_ids.tolist(), b.versions.tolist(), b.event_times.tolist()) for b in store]
    assert found == [([1, 1, 2], [3, 8, 8], [10, 4, 4])]
    with pytest.raises(ValueError, match="add: versions must be at least 0, found -1"):
        store.add(Summaries(users, rows_of(users, times), times, ids(3, -1, 3)))
    with pytest.raises(ValueError, match=r"add: rows must be uint8 \[3, 4224\]"):
        store.add(Summaries(users, rows_of(users, times)[:2], times, versions))


SMALL = StoreSpec("int8", 1, 128)
STEPS = st.lists(st.tuples(st.sampled_from("iue"), st.lists(st.integers(0, 7), max_size=4), st.integers(0, 3)))


@settings(max_examples=30, deadline=None)
@given(steps=STEPS, enabled=st.integers(0, 5))
def test_a_feed_is_the_order_of_last_writes(tmp_path_factory, steps, enabled):
    model: list[int] = []
    times: dict[int, int] = {}
    with LmdbStore.create(tmp_path_factory.mktemp("feed") / "store", SMALL) as store:
        store._batch = 2
        for i, (kind, users, time_) in enumerate(steps):
            if i == enabled:
                store.change_feed()
                model.sort()  # what was there before comes in the order of keys
            if kind == "e":
                store.erase(torch.tensor(users, dtype=torch.int64))
                gone = set(users)
                model = [u for u in model if u not in gone]
                times = {u: t for u, t in times.items() if u not in gone}
                continue
            call = store.insert if kind == "i" else store.update
            call(torch.tensor(users, dtype=torch.int64), rows_of(users, users, SMALL), constant(len(users), time_))
            for user in sorted(set(users)):
                if times.get(user, 0 if kind == "i" else 99) <= time_:
                    times[user] = time_
                    model = [u for u in model if u != user] + [user]
        feed = store.change_feed()
        if len(steps) <= enabled:
            model.sort()
        changes = feed.read(0, 99)
        assert users_of(changes) == model
        assert [int.from_bytes(value[40:48], "little") for _, _, value in changes] == [times[u] for u in model]


def test_kill_9_leaves_feed_and_records_the_same(path, processes):
    with LmdbStore.create(path, SPEC) as store:
        store.change_feed()
    pause = random.Random(1)
    for kill in range(4):
        mine, theirs = processes.Pipe(duplex=False)
        writer = processes.Process(target=write_generations, args=(path, theirs, 5000 * kill, 32, 8))
        writer.start()
        assert mine.poll(30)
        time.sleep(pause.uniform(0.0, 0.25))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(30)
        with LmdbStore.open(path) as store:
            changes = store.change_feed().read(0, 9999)
            assert len(changes) == len(store) and len({key for _, key, _ in changes}) == len(store)
            # Users are written 32 at a time in turn: the generations along the feed never fall.
            generations = [int.from_bytes(value[40:48], "little") for _, _, value in changes]
            assert generations == sorted(generations)
