"""What every store of records does, embedded or served."""

import os

import pytest
import torch
from workers import SPEC, constant, ids, rows_of, version

from vista_ext import ops
from vista_ext.store import (
    LmdbStore,
    MissingUserError,
    ReadPolicy,
    StoreError,
    StoreSpec,
    Summaries,
    VersionMismatchError,
)

LAST = 2**63 - 1


@pytest.fixture
def store(place):
    with place.create(SPEC) as store:
        yield store


@pytest.mark.parametrize(("scheme", "group"), [("int8", None), ("int4", 32), ("fp8_e4m3", 64)])
def test_what_was_quantized_comes_back(place, scheme, group):
    spec = StoreSpec(scheme, 7, 128, group)
    x = torch.randn(5, 7, 128, generator=torch.Generator().manual_seed(0))
    rows = ops.quantize_rows(x, scheme=scheme, group=group)
    with place.create(spec) as store:
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


def test_version_mismatch_policies(place, store, put):
    put([1, 2])
    store.close()
    with place.open(version(9)) as newer:
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
    with place.open(version(4)) as between:
        assert between.find(ids(1, 2, 3), ReadPolicy(on_version_mismatch="accept")).versions.tolist() == [3, 9, 9]


def test_roll_out_of_a_model_version(place, store, put):
    put([1, 2])
    store.close()
    with place.open(version(9, extra={"checkpoint": "nine"})) as newer:
        put([1, 2], 5, into=newer)
        newer.publish()
        assert len(newer) == 4 and newer.erase_version(3) == 2 and len(newer) == 2
    with place.open() as reader:
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


def test_erase_takes_every_version(place, store, put):
    put([1, 2, LAST])
    store.close()
    with place.open(version(9)) as store:
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


def test_closed(store):
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.find(ids(1))


def test_spec_is_validated_on_open(place, store):
    store.close()
    with place.open(SPEC) as reader:
        assert reader.spec == SPEC
    with place.open() as reader:
        assert reader.spec == SPEC and reader.spec.group == 256
    for spec, message in [
        (StoreSpec("int4", 16, 256), "scheme: expected 'int4', found 'int8'"),
        (StoreSpec("int8", 16, 128), "dim: expected 128, found 256"),
        (StoreSpec("int8", 16, 256, 64), "group: expected 64, found 256"),
        (version(3, extra={"checkpoint": "two"}), r"extra\['checkpoint'\]: expected 'two', found 'one'"),
    ]:
        with pytest.raises(StoreError, match=message):
            place.open(spec)
    place.open().close()  # a refusal leaves nothing open


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


def test_adding_keeps_versions_and_the_newest(store, put):
    put([1], 10)
    users, times, versions = ids(1, 1, 2), ids(9, 4, 4), ids(3, 8, 8)
    assert store.add(Summaries(users, rows_of(users, times), times, versions)) == 2
    found = [(b.user_ids.tolist(), b.versions.tolist(), b.event_times.tolist()) for b in store]
    assert found == [([1, 1, 2], [3, 8, 8], [10, 4, 4])]
    with pytest.raises(ValueError, match="add: versions must be at least 0, found -1"):
        store.add(Summaries(users, rows_of(users, times), times, ids(3, -1, 3)))
    with pytest.raises(ValueError, match=r"add: rows must be uint8 \[3, 4224\]"):
        store.add(Summaries(users, rows_of(users, times)[:2], times, versions))
