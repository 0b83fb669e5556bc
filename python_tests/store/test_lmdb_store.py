import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import lmdb
import pytest
import torch
from workers import SPEC, grow, ids, loaded, open_once, rows_of, write_when_told

from vista_ext._extras import MissingExtraError
from vista_ext.store import (
    LmdbStore,
    StoreError,
    StoreSpec,
    liblmdb,
)
from vista_ext.store import lmdb as store_module

LAST = 2**63 - 1
choose_engine = liblmdb.engine.__wrapped__  # without the cache


def test_the_only_summary_is_erased(store, put):
    for users in ([-(2**63)], [1, 2], [2**63 - 1]):
        put(users)
        assert store.erase(torch.tensor(users)) == len(users) and len(store) == 0


def test_a_map_is_not_tiny(path):
    with pytest.raises(ValueError, match=r"map_size must be an integer from 1048576 to .*, found 0"):
        LmdbStore.create(path, SPEC, map_size=0)


def test_batches_stay_below_the_commit_size():
    wide = StoreSpec("int8", 1024, 256)
    store = LmdbStore(None, wide)
    assert 1 <= store._batch * (64 + wide.row_bytes) <= store_module.BATCH_BYTES
    assert LmdbStore(None, SPEC)._batch == store_module.BATCH_RECORDS


def test_a_snapshot_is_not_put_into_its_own_store(tmp_path, store):
    path = tmp_path / "store"
    (tmp_path / "link").symlink_to(path)
    before = sorted(path.iterdir())
    for inside in (path, path / "snap", path / "a" / "snap", tmp_path / "link" / "snap"):
        with pytest.raises(StoreError, match="save_snapshot: path must lie outside the store's own folder"):
            store.save_snapshot(inside)
    assert sorted(path.iterdir()) == before


def test_the_map_grows_for_writer_and_readers(path, processes):
    LmdbStore.create(path, SPEC, map_size=1 << 20).close()
    with LmdbStore.open(path) as reader:
        worker = processes.Process(target=grow, args=(path, 0, 2000))
        worker.start()
        worker.join(30)
        assert worker.exitcode == 0
        assert len(reader) == 2000  # the map this process has is smaller than the file now
        users = torch.arange(2000)
        assert torch.equal(reader.find(users).rows, rows_of(users, users))
    with LmdbStore.open(path, readonly=False) as writer:
        worker = processes.Process(target=grow, args=(path, 2000, 4000))
        worker.start()
        worker.join(30)
        assert writer.insert(ids(9999), rows_of([9999], [1]), ids(1)) == 1
        assert len(writer) == 6001


def test_reading_only(path, store, put):
    put([1])
    store.close()
    with LmdbStore.open(path) as reader, pytest.raises(StoreError, match=r"open for reading; .*readonly=False"):
        reader.erase(ids(1))


def test_one_environment_per_process(tmp_path, path, store, processes):
    for again in (path, tmp_path / "elsewhere"):
        if again != path:
            again.symlink_to(path)
        with pytest.raises(StoreError, match="already open in this process"):
            LmdbStore.open(again)
    mine, theirs = processes.Pipe()
    processes.Process(target=open_once, args=(path, True, theirs)).start()
    assert mine.recv() == "0"  # another process may
    store.close()
    LmdbStore.open(path).close()


def test_a_second_process_sees_each_commit_at_once(path, store, processes):
    store.close()
    mine, theirs = processes.Pipe()
    writer = processes.Process(target=write_when_told, args=(path, theirs))
    writer.start()
    with LmdbStore.open(path) as reader:
        for generation in range(1, 100):
            mine.send(generation)
            assert mine.recv() == generation
            found = reader.find(ids(1))
            assert found.event_times.item() == generation and torch.equal(found.rows, rows_of([1], [generation]))
    mine.send(None)
    writer.join(30)


def test_a_fork_is_refused(store):
    pid = os.fork()
    if pid == 0:
        try:
            store.find(ids(1))
            os._exit(1)
        except StoreError as error:
            os._exit(0 if "used in its fork" in str(error) else 2)
    assert os.waitpid(pid, 0)[1] == 0


def test_what_is_not_a_store(tmp_path, path, store, processes):
    store.close()
    with pytest.raises(StoreError, match=r"no data\.mdb can be read there"):
        LmdbStore.open(tmp_path / "nothing")
    with pytest.raises(StoreError, match="expected a path where nothing is"):
        LmdbStore.create(path, SPEC)
    foreign = tmp_path / "foreign"
    lmdb.open(str(foreign)).close()
    with pytest.raises(StoreError, match="an LMDB environment, but not a summary store"):
        LmdbStore.open(foreign)
    text = tmp_path / "text"
    text.mkdir()
    (text / "data.mdb").write_bytes(b"not a database" * 2000)
    with pytest.raises(StoreError, match=r"text: .*not an LMDB file"):
        LmdbStore.open(text)
    env = lmdb.open(str(path), max_dbs=2)
    with env.begin(write=True, db=env.open_db(b"meta")) as txn:
        txn.put(b"spec", b'{"format": 2}')
    env.close()
    with pytest.raises(StoreError, match="its spec cannot be read: format expected 1, found 2"):
        LmdbStore.open(path)


def test_threads_share_a_store(path):
    """Among them the one that grows the map, which LMDB allows only while nobody reads."""
    with LmdbStore.create(path, SPEC, map_size=1 << 20) as store, ThreadPoolExecutor(4) as pool:
        parts = torch.arange(1600).split(100)
        done = [pool.submit(store.insert, part, rows_of(part, part), part) for part in parts]
        for part, insert in zip(parts, done, strict=True):
            assert insert.result() == 100
            assert torch.equal(store.find(part).rows, rows_of(part, part))


def test_lmdb_is_optional(path, store, processes, monkeypatch):
    mine, theirs = processes.Pipe()
    processes.Process(target=loaded, args=("lmdb", theirs)).start()
    assert mine.recv() is False  # importing the store does not need it
    monkeypatch.setitem(sys.modules, "lmdb", None)
    monkeypatch.setattr(liblmdb, "candidates", lambda: [("no_such_library.so", "mdb_")])
    monkeypatch.setattr(liblmdb, "engine", choose_engine)
    for call in (LmdbStore.open, lambda p: LmdbStore.create(p.with_name("new"), SPEC)):
        with pytest.raises(MissingExtraError, match=r"'lmdb' is needed here .*pip install '\.\[run\]'"):
            call(path)


def test_a_store_moved_away(path, store, put):
    put([1])
    shutil.move(path, path.with_name("moved"))
    with pytest.raises(StoreError, match=r"store: no data.mdb can be read there \(No such file"):
        store.find(ids(1))
