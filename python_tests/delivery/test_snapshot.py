"""Parquet snapshots: whole, in part, compared, cut off, and damaged in every byte that matters."""

import json
import os
import random
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.dataset as arrow_dataset
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.delivery.test_message import FUZZ_SECONDS, spoil
from python_tests.delivery.workers import SPEC, content, rows_of, summaries_of
from vista_ext.delivery.snapshot import Snapshot, diff, export_snapshot, import_snapshot
from vista_ext.delivery.snapshot import reader as reader_module
from vista_ext.delivery.snapshot import writer as writer_module
from vista_ext.delivery.snapshot.format import bucket_of, footer_crc32
from vista_ext.store import LmdbStore, RecordError, StoreError, StoreSpec

LAST = 2**63 - 1
USERS = [-(2**63), -5, 0, 1, 2, 3, 1000, LAST, *range(5000, 5300)]


@pytest.fixture
def small_groups(monkeypatch):
    """Several row groups a bucket."""
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 5 * SPEC.row_bytes)


@pytest.fixture
def store(tmp_path, small_groups):
    with LmdbStore.create(tmp_path / "store", SPEC) as store:
        store.add(summaries_of(USERS, 7))
        store.add(summaries_of([1, 5001], 9, version=LAST))
        yield store


@pytest.fixture
def snapshot(store, tmp_path):
    assert export_snapshot(store, tmp_path / "snap", store.spec, buckets=4) == len(store) == len(USERS) + 2
    return Snapshot(tmp_path / "snap")


@pytest.mark.parametrize("half_page", [0, 2048], ids=["by bucket", "merged"])
def test_a_store_comes_back(store, snapshot, target, monkeypatch, half_page):
    monkeypatch.setattr(reader_module, "HALF_PAGE", half_page)
    assert snapshot.spec == store.spec and len(snapshot) == len(store)
    assert import_snapshot(snapshot, target) == len(store)
    assert content(target) == content(store)
    assert import_snapshot(snapshot, target) == len(store)  # again: the same times, the same bytes
    target.add(summaries_of([2], 8))
    before = content(target)
    import_snapshot(snapshot, target)
    assert content(target) == before and before[2, 3] == 8


@pytest.mark.parametrize("spec", [StoreSpec("int4", 2, 128, 32, 5), StoreSpec("fp8_e4m3", 1, 64)])
def test_other_layouts(tmp_path, spec):
    summaries = summaries_of(range(100), 4, spec.model_version, spec)
    assert export_snapshot([summaries], tmp_path / "snap", spec) == 100
    with LmdbStore.create(tmp_path / "store", spec) as store:
        import_snapshot(Snapshot(tmp_path / "snap"), store)
        assert len(content(store)) == 100


def test_an_empty_store(tmp_path, target):
    assert export_snapshot(target, tmp_path / "snap", SPEC) == 0
    snapshot = Snapshot(tmp_path / "snap")
    assert import_snapshot(snapshot, target) == 0 and [c.same for c in diff(snapshot, snapshot)] == [0] * 16


def test_other_tools_read_it(snapshot, store):
    """Hive partitions, fixed-size binary rows, sorted; a row is found by the hash of its user."""
    table = arrow_dataset.dataset(snapshot.path, partitioning="hive", format="parquet").to_table()
    assert set(table.column_names) == {"user_id", "model_version", "event_time", "crc32", "row", "bucket"}
    assert len(table) == len(store) and str(table.schema.field("row").type) == f"fixed_size_binary[{SPEC.row_bytes}]"
    users = table.column("user_id").to_numpy()
    assert np.array_equal(table.column("bucket").to_numpy(), bucket_of(users, 4))
    for file in snapshot.files:
        keys = parquet.read_table(snapshot.path / file.path, partitioning=None)
        pairs = list(zip(keys["user_id"].to_pylist(), keys["model_version"].to_pylist(), strict=True))
        assert pairs == sorted(pairs)
    row = table.filter(arrow_dataset.field("user_id") == 5003)["row"][0].as_py()
    assert row == rows_of([5003], [7]).numpy().tobytes()


def test_buckets_are_documented():
    """The published finalizer of SplitMix64, in Python's integers."""
    mask = 2**64 - 1

    def top(user, bits):
        x = user & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return (x ^ (x >> 31)) >> (64 - bits)

    users = np.array([0, 1, -1, 2**63 - 1, -(2**63), 123456789])
    for bits in (0, 1, 4, 10):
        assert bucket_of(users, 2**bits).tolist() == [top(int(u), bits) for u in users]


@pytest.mark.parametrize(
    ("first", "last"), [(None, None), (5010, 5050), (-5, 2), (LAST, None), (None, -(2**63)), (20, 10), (4000, 4999)]
)
def test_a_range_of_users(snapshot, first, last):
    found = [user for batch in snapshot.read(first, last) for user in batch.user_ids.tolist()]
    low, high = -(2**63) if first is None else first, LAST if last is None else last
    assert sorted(found) == sorted(u for u in [*USERS, 1, 5001] if low <= u <= high)


def test_a_range_is_not_read_whole(snapshot, monkeypatch):
    groups = []
    read = parquet.ParquetFile.read_row_groups
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_groups", lambda self, which: groups.extend(which) or read(self, which)
    )
    list(snapshot.read(5010, 5012))
    assert 1 <= len(groups) <= 4
    list(snapshot.read())
    assert len(groups) > 50


def test_arrow_reads_files_of_its_own(snapshot, monkeypatch):
    """What its threads read of a Python file they would free after the interpreter's end, and abort the process."""
    sources = []
    for name in ("ParquetFile", "read_table"):
        real = getattr(parquet, name)
        monkeypatch.setattr(
            parquet, name, lambda source, real=real, **options: sources.append(type(source)) or real(source, **options)
        )
    list(snapshot.read())
    snapshot.keys(0)
    assert set(sources) == {pa.OSFile}
    snapshot.erasures()
    assert set(sources) == {pa.OSFile, pa.BufferReader}


def test_batches_are_what_a_store_commits(tmp_path):
    wide = StoreSpec("int8", 128, 2048)
    export_snapshot([summaries_of(range(200), 1, 0, wide)], tmp_path / "snap", wide, buckets=1)
    sizes = [len(batch) for batch in Snapshot(tmp_path / "snap").read()]
    assert sum(sizes) == 200 and max(sizes) * wide.row_bytes <= 32 << 20


@pytest.mark.parametrize("merged", [1, 3, 16])
def test_merged_is_in_the_order_of_the_keys(store, snapshot, monkeypatch, merged):
    """Of so many of the four buckets at a time; user 5001 has two versions."""
    monkeypatch.setattr(reader_module, "MERGED", merged)
    for most in (1, 7, 2**20):
        monkeypatch.setattr(reader_module, "BATCH_RECORDS", most)
        for first, last in ((None, None), (1, 5100), (4, 4)):
            batches = list(snapshot.read_merged(first, last))
            read = [user for batch in batches for user in batch.user_ids.tolist()]
            expected = [batch.user_ids for batch in snapshot.read(first, last)]
            assert sorted(read) == sorted(torch.cat(expected).tolist() if expected else [])
            if merged >= 4:
                assert read == sorted(read) and max(map(len, batches), default=0) <= max(4 * most, 4)
            for batch in batches:
                assert torch.equal(batch.rows, rows_of(batch.user_ids, batch.event_times))
    versions = [v for b in batches for u, v in zip(b.user_ids.tolist(), b.versions.tolist(), strict=True) if u == 5001]
    assert versions == sorted(versions)


def test_what_is_not_in_order_is_not_lost(tmp_path, target, monkeypatch):
    """By another writer, which does not sort."""
    monkeypatch.setattr(writer_module._Part, "_check_order", lambda *_: None)
    monkeypatch.setattr(writer_module, "GROUP_BYTES", 5 * SPEC.row_bytes)
    monkeypatch.setattr(reader_module, "BATCH_RECORDS", 1)
    users = random.Random(0).sample(range(1000), 200)
    export_snapshot([summaries_of(users, 7)], tmp_path / "snap", SPEC, buckets=4)
    assert import_snapshot(Snapshot(tmp_path / "snap"), target) == 200 == len(target)
    assert {user for user, _ in content(target)} == set(users)


def test_bad_arguments(store, snapshot, tmp_path):
    for buckets in (0, 3, 2048):
        with pytest.raises(ValueError, match="buckets must be "):
            export_snapshot(store, tmp_path / "x", SPEC, buckets=buckets)
    with pytest.raises(StoreError, match=r"snap: expected a path where nothing is"):
        export_snapshot(store, tmp_path / "snap", SPEC)
    with pytest.raises(StoreError, match=r"summaries must ascend .* found \(1, 3\) after \(2, 3\)"):
        export_snapshot([summaries_of([2, 1], 1)], tmp_path / "x", SPEC, buckets=1)
    with pytest.raises(ValueError, match=r"snapshot: rows must be uint8 \[1, 1152\]"):
        export_snapshot([summaries_of([1], 1)], tmp_path / "x", StoreSpec("int8", 8, 128))
    with pytest.raises(ValueError, match="first must be an integer"):
        list(snapshot.read(first="a"))
    assert sorted(os.listdir(tmp_path)) == ["snap", "store"]


def test_what_is_cut_off_is_not_there(tmp_path):
    def batches():
        yield summaries_of(range(10), 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_snapshot(batches(), tmp_path / "snap", SPEC)
    assert os.listdir(tmp_path) == []


def test_diff(store, snapshot, tmp_path):
    store.add(summaries_of([1, 5003], 8))
    store.insert(torch.tensor([2]), rows_of([2], [6]), torch.tensor([6]), newest_wins=False)
    store.insert(torch.tensor([3]), rows_of([3], [99]), torch.tensor([7]))
    store.erase(torch.tensor([5001, 0]))
    store.add(summaries_of([77], 1))
    export_snapshot(store, tmp_path / "new", SPEC, buckets=4)
    found, same = {}, 0
    for changes in diff(snapshot, Snapshot(tmp_path / "new")):
        same += changes.same
        for kind, a, b in zip(changes.kinds, changes.before.tolist(), changes.after.tolist(), strict=True):
            found[(b if kind == "added" else a)[:2]] = kind, a[2], b[2]
    assert found == {
        (1, 3): ("newer", 7, 8),
        (5003, 3): ("newer", 7, 8),
        (2, 3): ("older", 7, 6),
        (3, 3): ("rewritten", 7, 7),
        (5001, 3): ("removed", 7, -1),
        (5001, LAST): ("removed", 9, -1),
        (0, 3): ("removed", 7, -1),
        (77, 3): ("added", -1, 1),
    }
    assert same == len(USERS) + 2 - 7


def test_diff_of_what_does_not_compare(snapshot, tmp_path):
    export_snapshot([], tmp_path / "two", SPEC, buckets=2)
    export_snapshot([], tmp_path / "wide", StoreSpec("int8", 4, 256), buckets=4)
    with pytest.raises(StoreError, match="buckets expected 4, found 2"):
        list(diff(snapshot, Snapshot(tmp_path / "two")))
    with pytest.raises(StoreError, match="dim: expected 128, found 256"):
        list(diff(snapshot, Snapshot(tmp_path / "wide")))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_diff_against_dictionaries(tmp_path_factory, data):
    keys = st.dictionaries(st.integers(-3, 3), st.integers(0, 2), max_size=6)
    folder, sides = tmp_path_factory.mktemp("diff"), [data.draw(keys), data.draw(keys)]
    for name, side in zip("ab", sides, strict=True):
        batches = [summaries_of([user], when) for user, when in sorted(side.items())]
        export_snapshot(batches, folder / name, SPEC, buckets=2)
    old, new = sides
    expected = {u: "added" for u in new.keys() - old.keys()} | {u: "removed" for u in old.keys() - new.keys()}
    both = old.keys() & new.keys()
    expected |= {u: "newer" if new[u] > old[u] else "older" for u in both if new[u] != old[u]}
    found = {}
    for changes in diff(Snapshot(folder / "a"), Snapshot(folder / "b")):
        users = np.where(changes.before["crc32"] < 0, changes.after["user_id"], changes.before["user_id"])
        found |= dict(zip(users.tolist(), changes.kinds, strict=True))
    assert found == expected


def test_incomplete(snapshot):
    os.remove(snapshot.path / "_SUCCESS")
    with pytest.raises(StoreError, match="no _SUCCESS, so it is not a snapshot, or not a complete one"):
        Snapshot(snapshot.path)


def test_a_manifest_that_does_not_fit(snapshot):
    text = (snapshot.path / "_manifest.json").read_text()
    for change, message in [
        (lambda m: m.update(format=1), "format expected 2, found 1"),
        (lambda m: m.update(rows=1), "buckets and rows expected 4 and"),
        (lambda m: m["files"].pop(), "buckets and rows expected 3"),
        (lambda m: m["files"][0].update(bytes=7), "bucket=0/part-0.parquet: expected 7 bytes, found"),
        (lambda m: m["files"][0].update(path="../store/data.mdb"), "file 0 expected in bucket=0"),
        (lambda m: m["files"][1].update(rows=-1), "rows must be an integer from 0"),
        (lambda m: m["files"][1].pop("rows"), "rows"),
        (lambda m: m["spec"].update(tokens="x"), "tokens must be an integer"),
        (lambda m: m.pop("spec"), "spec"),
    ]:
        values = json.loads(text)
        change(values)
        (snapshot.path / "_manifest.json").write_text(json.dumps(values))
        with pytest.raises(StoreError, match=message):
            Snapshot(snapshot.path)
    for other in ("[]", "nonsense", ""):
        (snapshot.path / "_manifest.json").write_text(other)
        with pytest.raises(StoreError):
            Snapshot(snapshot.path)


def test_a_file_of_another_snapshot(store, snapshot, tmp_path):
    """Of the size that the manifest says, even."""
    store.insert(torch.tensor([5003]), rows_of([5003], [1]), torch.tensor([8]))
    export_snapshot(store, tmp_path / "other", SPEC, buckets=4)
    bucket = int(bucket_of(np.array([5003]), 4)[0])
    mine, theirs = (folder / f"bucket={bucket}/part-0.parquet" for folder in (snapshot.path, tmp_path / "other"))
    shutil.copy(theirs, mine)
    values = json.loads((snapshot.path / "_manifest.json").read_text())
    values["files"][bucket]["bytes"] = mine.stat().st_size
    (snapshot.path / "_manifest.json").write_text(json.dumps(values))
    with pytest.raises(StoreError, match="footer crc32 expected"):
        list(Snapshot(snapshot.path).read())
    with mine.open("rb") as file:
        values["files"][bucket]["footer_crc32"] = footer_crc32(file, mine.stat().st_size)
    (snapshot.path / "_manifest.json").write_text(json.dumps(values))
    for read in (lambda: list(Snapshot(snapshot.path).read()), lambda: Snapshot(snapshot.path).keys(bucket)):
        with pytest.raises(StoreError, match="keys crc32 expected"):
            read()


def test_a_record_that_its_page_vouches_for(tmp_path, monkeypatch):
    """Pages have checksums; a record whose own does not fit its bytes is found behind them."""
    real = writer_module.keys_of

    def wrong(spec, summaries):
        keys = real(spec, summaries)
        keys["crc32"][3] ^= 1
        return keys

    monkeypatch.setattr(writer_module, "keys_of", wrong)
    export_snapshot([summaries_of(range(9), 1)], tmp_path / "snap", SPEC, buckets=1)
    with pytest.raises(RecordError, match="record of user 3, model version 3: crc32 expected"):
        list(Snapshot(tmp_path / "snap").read())


def test_fuzz(snapshot, target):
    """Random, truncated, spliced and flipped files: what is read is what was written, or an error."""
    chance = random.Random(int(os.environ.get("VISTA_FUZZ_SEED", "0")))
    sound = {}
    for batch in snapshot.read():
        sound |= {
            (u, v): r for u, v, r in zip(batch.user_ids.tolist(), batch.versions.tolist(), batch.rows, strict=True)
        }
    names = [file.path for file in snapshot.files] + ["_manifest.json"]
    whole = {name: (snapshot.path / name).read_bytes() for name in names}
    end, rounds, errors = time.monotonic() + FUZZ_SECONDS, 0, 0
    while time.monotonic() < end:
        name = chance.choice(names)
        data = spoil(chance, whole[name])
        (snapshot.path / name).write_bytes(data)
        seen = 0
        try:
            for batch in Snapshot(snapshot.path).read():
                for user, version, row in zip(
                    batch.user_ids.tolist(), batch.versions.tolist(), batch.rows, strict=True
                ):
                    assert torch.equal(sound[user, version], row)
                    seen += 1
            # Some bytes mean nothing: of page headers, or the space between the manifest's words.
            assert seen == len(sound)
        except StoreError:
            errors += 1
        (snapshot.path / name).write_bytes(whole[name])
        rounds += 1
    print(f"{rounds} damaged files, {errors} refused")
    assert errors > rounds // 2
