"""Erased users stay erased: whoever writes, in whatever order, and whether or not there is a feed."""

import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from test_fuzz import SECONDS, broken, rounds
from workers import SPEC, constant, ids, rows_of, version

from vista_ext.store import LmdbStore, ReadPolicy, RecordError, StoreError, Summaries, erasure, record

FLAG = ReadPolicy(on_miss="flag", on_version_mismatch="miss")


@pytest.fixture
def store(place):
    with place.create(SPEC) as store:
        yield store


def summaries(users, times, versions=None):
    users, times = ids(*users), ids(*times)
    versions = constant(len(users), SPEC.model_version) if versions is None else ids(*versions)
    return Summaries(users, rows_of(users, times), times, versions)


def test_nothing_older_comes_back(place, store, put):
    put([1, 2], 10)
    store.add(summaries([1], [12], versions=[9]))
    assert store.erase(ids(1), ids(11)) == 1  # version 9 is of later events
    assert put([1], 10) == 0 and put([1], 11, newest_wins=False) == 0
    assert store.add(summaries([1, 1], [11, 4], versions=[3, 9])) == 0
    assert store.update(ids(1), rows_of([1], [5]), ids(5)) == 0
    assert store.find(ids(1, 2), FLAG).hits.tolist() == [False, True]
    assert put([1], 12) == 1  # who came back
    assert store.erase(ids(1, 1), ids(12, 3)) == 2 and store.erase(ids(1), ids(2)) == 0
    erased = store.erasures()
    assert erased.user_ids.tolist() == [1] and erased.until.tolist() == [12]
    store.close()
    with place.open(version(9)) as other:
        assert put([1], 12, into=other) == 0 and put([1], 13, into=other) == 1


def test_an_erasure_without_a_summary_counts_too(store, put):
    last = 2**63 - 1
    assert store.erase(ids(-5, last, -last - 1), ids(7, last, -last - 1)) == 0
    assert put([-5], 7) == 0 and put([last], last) == 0 and put([-last - 1], -last) == 1
    assert store.erasures().user_ids.tolist() == [-last - 1, -5, last]


def test_erasures_are_forgotten_on_request_only(store, put):
    store.erase(ids(1, 2), ids(10, 20))
    assert store.drop_erasures(11) == 1 and store.drop_erasures(20) == 0
    assert put([1], 5) == 1 and put([2], 5) == 0
    assert store.drop_erasures(21) == 1 and len(store.erasures()) == 0 and put([2], 5) == 1


def test_bad_arguments(store):
    with pytest.raises(ValueError, match=r"erase: until must be int64 \[2\] on cpu, found int64 \[1\]"):
        store.erase(ids(1, 2), ids(1))
    with pytest.raises(ValueError, match="before must be an integer"):
        store.drop_erasures("x")
    none = torch.empty(0, dtype=torch.int64)
    assert store.erase(none, none) == 0 == store.drop_erasures(0)


def test_racing_writers_never_undo_it(place, processes):
    """One writes a user over and over, also under versions that nobody knew; another erases in between."""
    place.create(SPEC).close()
    stop = processes.Event()
    writer = processes.Process(target=write_versions, args=(place, stop))
    writer.start()
    try:
        with place.open() as store:
            end = time.monotonic() + 20
            while not len(store):
                assert time.monotonic() < end
            for until in range(0, 1000, 100):
                store.erase(ids(1), ids(until))
                times = [t for batch in store for t in batch.event_times.tolist()]
                assert all(t > until for t in times)
    finally:
        stop.set()
        writer.join(30)


def write_versions(place, stop):
    chance = random.Random(0)
    with place.open() as store:
        while not stop.is_set():
            at, of = chance.randrange(2000), chance.randrange(40)
            store.add(Summaries(ids(1), rows_of([1], [at]), ids(at), ids(of)))


def feed_of(store):
    found = []
    for _, key, value in store.change_feed().read(0, 99):
        (user,), _ = record.parse_keys([key])
        found.append((int(user), "erased" if key[8:] == erasure.VERSION_BYTES else len(value)))
    return found


def test_the_feed_tells_it(path, engine):
    with LmdbStore.create(path, SPEC) as store:
        size = 64 + SPEC.row_bytes
        store.add(summaries([1, 2], [1, 1]))
        store.erase(ids(3), ids(9))
        assert feed_of(store) == [(1, size), (2, size), (3, "erased")]  # also what was before the feed
        store.erase(ids(1), ids(9))
        assert feed_of(store) == [(2, size), (3, "erased"), (1, "erased")]
        store.erase(ids(3, 1), ids(9, 8))  # no news
        assert feed_of(store) == [(2, size), (3, "erased"), (1, "erased")]
        store.erase(ids(3), ids(10))
        store.add(summaries([1], [10]))
        assert feed_of(store) == [(2, size), (1, "erased"), (3, "erased"), (1, size)]
        assert store.drop_erasures(10) == 1
        assert feed_of(store) == [(2, size), (3, "erased"), (1, size)]


def test_damage_is_not_a_licence_to_write(place, store, put):
    """An erasure that cannot be read stops the writer, instead of letting an older summary in."""
    store.erase(ids(1), ids(9))
    if isinstance(store, LmdbStore):
        (key,) = record.keys(np.array([1]), np.array([0]))
        value = bytearray(erasure.pack(np.array([1]), np.array([9]))[0].tobytes())
        value[40] = 0
        store._environment.write(lambda txn: txn.put(b"erased/" + key[:8], bytes(value), db=store._environment.meta))
        expected = RecordError
    else:
        store._client.set(store._erasure_key(1), b"x")
        expected = StoreError
    with pytest.raises(expected, match="erasure"):
        put([1], 5)
    with pytest.raises(expected, match="erasure"):
        store.erasures()


@pytest.mark.timeout(SECONDS + 600)
def test_fuzz():
    users, until = np.array([5, -(2**63)]), np.array([7, 2**63 - 1])
    whole = [value.tobytes() for value in erasure.pack(users, until)]
    assert erasure.parse(whole)[2] == {} and [len(value) for value in whole] == [64, 64]
    for chance in rounds():
        values = [broken(value, chance) if chance.random() < 0.7 else value for value in whole]
        values = [value for value in values if len(value) == 64]
        found, times, problems = erasure.parse(values)
        for i, value in enumerate(values):
            assert (i in problems) == (value not in whole)
            assert i in problems or (found[i], times[i]) in zip(users, until, strict=True)


def erase_for_ever(path, report):
    with LmdbStore.open(path, readonly=False) as store:
        for user in range(10**6):
            at = constant(1, user)
            store.add(Summaries(ids(user), rows_of([user], [1]), at, constant(1, SPEC.model_version)))
            store.erase(ids(user), at)
            report.send(user)


def test_kill_9_leaves_records_erasures_and_feed_in_step(path, processes):
    with LmdbStore.create(path, SPEC) as store:
        store.change_feed()
    for kill in range(4):
        mine, theirs = processes.Pipe(duplex=False)
        writer = processes.Process(target=erase_for_ever, args=(path, theirs))
        writer.start()
        assert mine.poll(30)
        time.sleep(0.05 * kill)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(30)
        told = -1
        while mine.poll(0):
            told = mine.recv()
        with LmdbStore.open(path, readonly=False) as store:
            erased = store.erasures().user_ids.tolist()
            assert erased == list(range(len(erased))) and len(erased) > told and len(store) <= 1
            changes = store.change_feed().read(0, 10**6)
            assert len(changes) == len(erased) + len(store)
            store.erase(torch.arange(len(erased) + 1))  # for the next round
            store.drop_erasures(10**6)
            assert len(store.change_feed().read(0, 10)) == 0 == len(store)
