"""What a reader's policy does, the same in every store."""

import logging
import time

import pytest
import torch
from workers import SPEC, ids, rows_of, version

from vista_ext.store import ExpiredError, MissingUserError, ReadPolicy, RecordError


@pytest.fixture
def store(place):
    with place.create(SPEC) as store:
        yield store


@pytest.fixture
def damaged(place, store, put):
    """User 1 has a sound summary, user 2 a corrupt one, user 3 one of another size."""
    put([1, 2, 3], 5)
    place.change(store, 2, 3, lambda value: value[:1000] + bytes([value[1000] ^ 1]) + value[1001:])
    place.change(store, 3, 3, lambda value: value[:-1])
    return store


def test_damage_is_an_error_or_a_miss(damaged, caplog):
    for user, problem in ((2, "crc32 expected"), (3, "size expected 4288 bytes, found 4287")):
        with pytest.raises(RecordError, match=f"record of user {user}, model version 3: {problem}"):
            damaged.find(ids(1, user))
    with caplog.at_level(logging.WARNING):
        found = damaged.find(ids(3, 1, 2, 4), ReadPolicy(on_damage="miss", on_miss="flag"))
    assert found.hits.tolist() == [False, True, False, False]
    assert found.damaged.tolist() == [True, False, True, False]
    assert torch.equal(found.rows[1], rows_of([1], [5])[0]) and not found.rows[[0, 2, 3]].any()
    assert found.event_times.tolist() == [-1, 5, -1, -1]
    assert [r.message for r in caplog.records] == [
        "record of user 3, model version 3: size expected 4288 bytes, found 4287; taken for a miss",
        next(r.message for r in caplog.records if "user 2" in r.message),
    ]
    with pytest.raises(MissingUserError, match=r"2 of 3 users have no summary that can be used \(1 damaged\): 2, 4"):
        damaged.find(ids(1, 2, 4), ReadPolicy(on_damage="miss"))


def test_stale_within_a_stated_age(store, put):
    now = int(time.time())
    put([1], now - 1000)
    put([2], now - 10)
    fresh = ReadPolicy(max_age=100, on_miss="flag")
    found = store.find(ids(1, 2, 3), fresh)
    assert found.hits.tolist() == [False, True, False] and found.expired.tolist() == [True, False, False]
    assert not found.rows[0].any() and found.versions.tolist() == [-1, 3, -1]
    with pytest.raises(MissingUserError, match=r"that can be used \(1 expired\): 1"):
        store.find(ids(1, 2), ReadPolicy(max_age=100))
    with pytest.raises(ExpiredError, match="1 of 2 users have no summary of the last 100 seconds: 1"):
        store.find(ids(1, 2), ReadPolicy(max_age=100, on_expired="raise"))
    assert store.find(ids(1, 2), ReadPolicy(max_age=2000)).hits.all()
    assert store.find(ids(1, 2)).hits.all()


def test_an_older_version_within_a_stated_age(place, store, put):
    """The new model has no summary of a user yet: the old one's is served, but not for ever."""
    now = int(time.time())
    put([1], now - 1000)
    put([2], now - 10)
    store.close()
    with place.open(version(4)) as newer:
        policy = ReadPolicy(on_version_mismatch="accept", max_age=100, on_miss="flag")
        found = newer.find(ids(1, 2), policy)
        assert found.hits.tolist() == [False, True] and found.versions.tolist() == [-1, 3]


def test_rows_land_where_they_are_wanted(store, put):
    put([1, 2], 5)
    out = torch.full((3, SPEC.row_bytes), 7, dtype=torch.uint8)
    found = store.find(ids(2, 9, 1), ReadPolicy(on_miss="flag"), out=out)
    assert found.rows.data_ptr() == out.data_ptr()
    assert torch.equal(out[[0, 2]], rows_of([2, 1], [5, 5])) and not out[1].any()
