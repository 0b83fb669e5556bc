import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import lmdb
import pytest
import torch
from workers import SPEC, constant, grow, ids, loaded, open_once, rows_of, write_when_told

from vista_ext import ops
from vista_ext._extras import MissingExtraError
from vista_ext.store import (
    LmdbStore,
    MissingUserError,
    ReadPolicy,
    StoreError,
    StoreSpec,
    VersionMismatchError,
    liblmdb,
)
from vista_ext.store import lmdb as store_module

LAST = 2**63 - 1
choose_engine = liblmdb.engine.__wrapped__  # without the cache


def version(number, **changes):
    return StoreSpec(SPEC.scheme, SPEC.tokens, SPEC.dim, model_version=number, **changes)


@pytest.mark.parametrize(("scheme", "group"), [("int8", None), ("int4", 32), ("fp8_e4m3", 64)])
def test_what_was_quantized_comes_back(path, scheme, group):
    spec = StoreSpec(scheme, 7, 128, group)
    x = torch.randn(5, 7, 128, generator=torch.Generator().manual_seed(0))
    rows = ops.quantize_rows(x, scheme=scheme, group=group)
    with LmdbStore.create(path, spec) as store:
        assert store.insert(ids(3, -1, LAST, -LAST - 1, 0), rows, torch.arange(5)) == 5
        found = store.find(ids(0, LAST, 3, LAST))
    assert found.rows.is_contiguous() and found.hits.all()
    assert found.event_times.tolist() == [4, 2, 0, 2] and found.versions.tolist() == [0] * 4
    back = ops.dequantize_rows(found.rows, 7, 128, scheme=scheme, group=group)
    assert torch.equal(back, ops.dequantize_rows(rows[[4, 2, 0, 2]], 7, 128, scheme=scheme, group=group))


def test_missing_users_are_named_or_flagged(store, put):
    put([1, 2])
    with pytest.raises(MissingUserError, match=r"find: 12 of 14 users have no summary: 10, 11, .*, 19, \.\.\.") as info:
        store.find(torch.tensor([1, *range(10, 22), 2]))
    assert info.value.user_ids == list(range(10, 22))
    found = store.find(ids(7, 2), ReadPolicy(on_miss="flag"))
    assert found.hits.tolist() == [False, True]
    assert not found.rows[0].any() and torch.equal(found.rows[1:], rows_of([2], [1]))
    assert found.event_times.tolist() == [-1, 1] and found.versions.tolist() == [-1, 3]


def test_version_mismatch_policies(path, store, put):
    put([1, 2])
    store.close()
    with LmdbStore.open(path, readonly=False, spec=version(9)) as newer:
        put([2, 3], 5, into=newer)
        with pytest.raises(VersionMismatchError, match="1 of 2 users have summaries, but none of model version 9: 1"):
            newer.find(ids(1, 2))
        with pytest.raises(MissingUserError, match="1 of 2 users have no summary: 1"):
            newer.find(ids(1, 2), ReadPolicy(on_version_mismatch="miss"))
        assert newer.find(ids(1, 2), ReadPolicy(on_version_mismatch="miss", on_miss="flag")).hits.tolist() == [
            False,
            True,
        ]
        found = newer.find(ids(1, 2, 3), ReadPolicy(on_version_mismatch="accept"))
        assert found.versions.tolist() == [3, 9, 9] and found.event_times.tolist() == [1, 5, 5]
        with pytest.raises(MissingUserError, match=": 4"):
            newer.find(ids(1, 4), ReadPolicy(on_version_mismatch="accept"))
    with LmdbStore.open(path, spec=version(4)) as between:
        assert between.find(ids(1, 2, 3), ReadPolicy(on_version_mismatch="accept")).versions.tolist() == [3, 9, 9]


def test_roll_out_of_a_model_version(path, store, put):
    put([1, 2])
    store.close()
    with LmdbStore.open(path, readonly=False, spec=version(9, extra={"checkpoint": "nine"})) as newer:
        put([1, 2], 5, into=newer)
        newer.publish()
        assert len(newer) == 4 and newer.erase_version(3) == 2 and len(newer) == 2
    with LmdbStore.open(path) as reader:
        assert reader.spec.model_version == 9 and reader.spec.extra == {"checkpoint": "nine"}
        assert reader.find(ids(1, 2)).versions.tolist() == [9, 9]


def test_newest_event_wins(store, put):
    assert put([1, 2], 10) == 2
    assert put([1, 3], 9) == 1  # user 1 has a newer one
    assert put([2], 10) == 1  # a tie: the same history, summarized again
    assert store.find(ids(1, 2, 3)).event_times.tolist() == [10, 10, 9]
    assert put([1], 4, newest_wins=False) == 1
    assert store.find(ids(1)).event_times.tolist() == [4]


@pytest.mark.parametrize(("newest_wins", "generation"), [(True, 1), (False, 2)])
def test_repeats_within_a_batch(store, newest_wins, generation):
    users, times = ids(5, 5, 5), ids(4, 9, 7)
    assert store.insert(users, rows_of(users, torch.arange(3)), times, newest_wins=newest_wins) == 1
    assert torch.equal(store.find(ids(5)).rows, rows_of([5], [generation]))


def test_update_writes_only_who_is_there(store, put):
    put([1, 2], 3)
    users = ids(1, 2, 8)
    assert store.update(users, rows_of(users, constant(3, 7)), ids(7, 2, 7)) == 1
    assert store.find(users, ReadPolicy(on_miss="flag")).event_times.tolist() == [7, 3, -1]


def test_erase_takes_every_version(path, store, put):
    put([1, 2, LAST])
    store.close()
    with LmdbStore.open(path, readonly=False, spec=version(9)) as store:
        put([LAST, -5], into=store)
        assert store.erase(ids(LAST, 1, LAST, 77)) == 3
        assert [s.user_ids.tolist() for s in store] == [[-5, 2]]


def test_empty_batches(store):
    none, rows = torch.empty(0, dtype=torch.int64), torch.empty(0, SPEC.row_bytes, dtype=torch.uint8)
    assert store.insert(none, rows, none) == store.update(none, rows, none) == store.erase(none) == len(store) == 0
    found = store.find(none)
    assert found.rows.shape == (0, SPEC.row_bytes) and found.hits.shape == (0,) and found.versions.dtype == torch.int64
    assert list(store) == []


def test_long_calls_are_cut_into_transactions(store, monkeypatch):
    monkeypatch.setattr(store, "_batch", 10)
    users = torch.randperm(95) - 40
    assert store.insert(users, rows_of(users + 40, users + 40), users) == 95
    assert torch.equal(store.find(users).rows, rows_of(users + 40, users + 40))
    batches = list(store)
    assert max(len(b) for b in batches) == 10
    assert torch.cat([b.user_ids for b in batches]).tolist() == list(range(-40, 55))
    assert store.erase(users[:50]) == 50 and len(store) == 45


def test_erased_while_iterating(store, put):
    put([1, 2, 3])
    store._batch = 1
    walk = iter(store)
    assert next(walk).user_ids.tolist() == [1]
    store.erase(ids(2))
    assert [b.user_ids.tolist() for b in walk] == [[3]]


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


def test_snapshots(tmp_path, store, put):
    put([1, 2, 3], 5)
    store.save_snapshot(tmp_path / "snap")
    put([1], 9)
    store.erase(ids(2, 3))
    put([3], 1)
    assert store.load_snapshot(tmp_path / "snap") == 2  # user 1 is newer here
    assert store.find(ids(1, 2, 3)).event_times.tolist() == [9, 5, 5]
    with LmdbStore.open(tmp_path / "snap") as snapshot:
        assert snapshot.find(ids(1, 2, 3)).event_times.tolist() == [5, 5, 5]
    with pytest.raises(StoreError, match=r"snapshot .*snap: expected a path where nothing is"):
        store.save_snapshot(tmp_path / "snap")
    with LmdbStore.create(tmp_path / "other", StoreSpec("int8", 8, 256)) as other:
        with pytest.raises(StoreError, match=r"load_snapshot: .*tokens: expected 8, found 16"):
            other.load_snapshot(tmp_path / "snap")
        assert len(other) == 0
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]


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


def test_closed(store):
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.find(ids(1))


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


def test_spec_is_validated_on_open(path, store):
    store.close()
    with LmdbStore.open(path, spec=SPEC) as reader:
        assert reader.spec == SPEC
    with LmdbStore.open(path) as reader:
        assert reader.spec == SPEC and reader.spec.group == 256
    for spec, message in [
        (StoreSpec("int4", 16, 256), "scheme: expected 'int4', found 'int8'"),
        (StoreSpec("int8", 16, 128), "dim: expected 128, found 256"),
        (StoreSpec("int8", 16, 256, 64), "group: expected 64, found 256"),
        (version(3, extra={"checkpoint": "two"}), r"extra\['checkpoint'\]: expected 'two', found 'one'"),
    ]:
        with pytest.raises(StoreError, match=message):
            LmdbStore.open(path, spec=spec)
    LmdbStore.open(path).close()  # a refusal leaves nothing open


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.find([1]), r"find: user_ids must be a tensor, int64 \[n\] on cpu, found list"),
        (lambda s: s.find(torch.ones(2, dtype=torch.int32)), r"user_ids must be int64 \[n\] on cpu, found int32 \[2\]"),
        (lambda s: s.find(torch.ones(2, 2).long()), r"user_ids must be int64 \[n\] on cpu, found int64 \[2, 2\]"),
        (lambda s: s.find(ids(1).to("meta")), r"user_ids must be .*, found int64 \[1\] on meta"),
        (
            lambda s: s.find(ids(1), ReadPolicy(on_miss="zero")),
            "policy: on_miss must be one of 'raise', 'flag', found 'zero'",
        ),
        (
            lambda s: s.find(ids(1), ReadPolicy(on_version_mismatch="x")),
            "on_version_mismatch must be one of .*, found 'x'",
        ),
        (lambda s: s.insert(ids(1), rows_of([1], [1])[:, 1:], ids(1)), r"rows must be uint8 \[1, 4224\] .*\[1, 4223\]"),
        (lambda s: s.insert(ids(1), rows_of([1], [1]).char(), ids(1)), "insert: rows must be uint8 .*, found int8"),
        (lambda s: s.insert(ids(1, 2), rows_of([1], [1]), ids(1, 1)), r"rows must be uint8 \[2, 4224\]"),
        (lambda s: s.update(ids(1), rows_of([1], [1]), ids(1, 2)), r"update: event_times must be int64 \[1\]"),
        (lambda s: s.erase(torch.ones(1)), "erase: user_ids must be int64 .*, found float32"),
        (lambda s: s.erase_version(-1), r"erase_version: model_version must be an integer from 0 to .*, found -1"),
        (lambda s: StoreSpec("int8", 0, 256), "tokens must be an integer from 1 to 4294967295, found 0"),
        (lambda s: StoreSpec("int9", 4, 256), "scheme must be .*, found 'int9'"),
        (lambda s: version(2**63), "model_version must be an integer from 0 to .*, found 9223372036854775808"),
        (lambda s: version(1, extra={"a": (1, 2)}), "extra must be a dict that survives JSON"),
        (lambda s: LmdbStore.create("x", SPEC, map_size=0), "map_size must be an integer from 1048576 to .*, found 0"),
    ],
)
def test_bad_arguments(store, call, message):
    with pytest.raises(ValueError, match=message):
        call(store)


def test_rows_need_not_be_contiguous(store):
    users = torch.arange(6)
    rows = rows_of(users, users).t().contiguous().t()
    store.insert(users, rows, users)
    assert torch.equal(store.find(users).rows, rows)


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
