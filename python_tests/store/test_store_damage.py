"""Kills, concurrent readers, truncated files, flipped bytes."""

import os
import random
import signal
import time

import lmdb
import pytest
import torch
from workers import SPEC, constant, find_after, ids, open_once, read_while, rows_of, write_generations

from vista_ext.store import LmdbStore, ReadPolicy, RecordError, StoreError, StoreSpec, record

BATCH, BATCHES = 32, 8


def test_kill_9_loses_nothing_that_was_reported(path, processes):
    LmdbStore.create(path, SPEC).close()
    reported, kills, writes = {}, 8, 0
    pause = random.Random(0)
    for kill in range(kills):
        mine, theirs = processes.Pipe(duplex=False)
        writer = processes.Process(target=write_generations, args=(path, theirs, 5000 * kill, BATCH, BATCHES))
        writer.start()
        theirs.close()
        assert mine.poll(30)  # kill it at work, not while it starts
        time.sleep(pause.uniform(0.0, 0.25))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(30)
        while True:  # what it reported before it died
            try:
                first, generation = mine.recv()
            except EOFError:
                break
            reported[first] = generation
            writes += 1
        with LmdbStore.open(path) as store:
            for first, generation in reported.items():
                users = torch.arange(first, first + BATCH)
                found = store.find(users)
                assert len(set(found.event_times.tolist())) == 1  # a batch is one transaction
                assert found.event_times[0] >= generation
                assert torch.equal(found.rows, rows_of(users, found.event_times))
            assert sum(len(batch) for batch in store) == len(store)  # reading checks every record
    assert writes > 2 * kills


def test_a_reader_never_sees_a_mixed_row(path, processes):
    users = torch.arange(BATCH * BATCHES)
    with LmdbStore.create(path, SPEC) as store:
        store.insert(users, rows_of(users, constant(len(users), 1)), constant(len(users), 1))
        stop, (mine, theirs) = processes.Event(), processes.Pipe()
        reader = processes.Process(target=read_while, args=(path, stop, theirs, len(users)))
        reader.start()
        end = time.monotonic() + 3
        generation = 1
        while time.monotonic() < end:
            generation += 1
            store.insert(users, rows_of(users, constant(len(users), generation)), constant(len(users), generation))
        stop.set()
        assert mine.poll(30)
        reads, generations_seen, error = mine.recv()
        reader.join(30)
    assert error is None
    assert reads > 10 and generations_seen > 2, "the reader did not read during the writing"


def flip(path, marker, offset):
    """Flip a bit at `offset` from where `marker` first lies in the data file."""
    with open(path / "data.mdb", "r+b") as file:
        data = file.read()
        at = data.index(marker) + offset
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (0, "magic expected 1096045398, found"),
        (6, "scheme expected 0, found 1"),
        (12, "dim expected 256, found 257"),
        (24, "user_id expected 17, found 16"),
        (40, "crc32 expected 0x[0-9a-f]{8}, found 0x[0-9a-f]{8}"),  # the event time
        (48, "crc32 expected"),
        (60, "reserved expected"),
        (64 + 1000, "crc32 expected"),
        (64 + SPEC.row_bytes - 1, "crc32 expected"),
    ],
)
def test_a_corrupt_byte_is_found(path, store, put, offset, message):
    put([17], 10)
    put([18], 10)
    store.close()
    header = record.pack(SPEC, *(x.numpy() for x in (ids(17), ids(3), ids(10))), rows_of([17], [10]).numpy())[0, :64]
    flip(path, header.tobytes(), offset)
    with LmdbStore.open(path, readonly=False) as store:
        for read in (lambda: store.find(ids(18, 17)), lambda: list(store)):
            with pytest.raises(RecordError, match=f"record of user 17, model version 3: {message}") as info:
                read()
            assert info.value.user_id == 17
        assert store.find(ids(18)).hits.all()
        # A corrupt record is not newer than anything: an older summary heals it.
        assert put([17, 18], 5, into=store) == 1
        assert store.find(ids(17, 18)).event_times.tolist() == [5, 10]


def test_a_record_of_another_size(path, store, put):
    put([17], 10)
    store.close()
    env = lmdb.open(str(path), max_dbs=2)
    with env.begin(write=True, db=env.open_db(b"records")) as txn:
        (key, value), *_ = list(txn.cursor())
        txn.put(key, value[:100])
    env.close()
    with LmdbStore.open(path, readonly=False) as store:
        with pytest.raises(RecordError, match="user 17, model version 3: size expected 4288 bytes, found 100"):
            store.find(ids(17))
        assert put([17], 5, into=store) == 1


@pytest.mark.parametrize("readonly", [True, False])
@pytest.mark.parametrize("size", [0, 100, 8192, 40960, 2_000_000])
def test_a_truncated_file_is_refused(path, store, processes, size, readonly):
    users = torch.arange(1000)
    store.insert(users, rows_of(users, users), users)
    store.close()
    os.truncate(path / "data.mdb", size)
    mine, theirs = processes.Pipe(duplex=False)
    reader = processes.Process(target=open_once, args=(path, readonly, theirs))
    reader.start()
    reader.join(30)
    assert reader.exitcode == 0  # and not SIGBUS
    assert f"data.mdb is truncated: expected at least {8192 if size < 8192 else ''}" in (answer := mine.recv())
    assert answer.startswith("StoreError") and answer.endswith(f"found {size}")


@pytest.mark.parametrize("size", [0, 40960])
def test_truncated_while_open(path, store, processes, size):
    users = torch.arange(1000)
    store.insert(users, rows_of(users, users), users)
    store.close()
    opened, truncated, (mine, theirs) = processes.Event(), processes.Event(), processes.Pipe(duplex=False)
    reader = processes.Process(target=find_after, args=(path, opened, truncated, theirs))
    reader.start()
    assert opened.wait(30)
    os.truncate(path / "data.mdb", size)
    truncated.set()
    reader.join(30)
    assert reader.exitcode == 0
    assert "data.mdb is truncated" in mine.recv()


def test_a_file_cut_behind_its_last_page_is_sound(path, store, put):
    """What the tail is for: no page lies there. A snapshot has none."""
    put(list(range(100)))
    end = store._environment._end_of_pages()
    store.close()
    assert os.path.getsize(path / "data.mdb") > end
    os.truncate(path / "data.mdb", end)
    with LmdbStore.open(path, readonly=False) as store:
        assert len(next(iter(store))) == 100
        put([5], 2, into=store)
        assert os.path.getsize(path / "data.mdb") > end


def test_erasing_does_not_make_a_file_look_truncated(path):
    """Erasing takes pages and drops them again, unwritten: without the tail this file ends before its last page."""
    spec, users = StoreSpec("int8", 1, 1024), torch.arange(500)
    with LmdbStore.create(path, spec) as store:
        store.insert(users, rows_of(users, users, spec), users)
        some = torch.rand(500, generator=torch.Generator().manual_seed(12)) < 0.99
        assert store.erase(users[some]) == int(some.sum())
        assert store.find(users, ReadPolicy(on_miss="flag")).hits.tolist() == (~some).tolist()


def test_disk_use_of_the_tail_is_nothing(path, store, put):
    put([1])
    stat = os.stat(path / "data.mdb")
    assert stat.st_blocks * 512 < 1 << 20


def test_a_store_that_cannot_be_made_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"store .*file/store: "):
        LmdbStore.create(tmp_path / "file" / "store", SPEC)
    assert os.listdir(tmp_path) == ["file"]
