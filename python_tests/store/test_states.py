"""States in a folder: what was put there comes back, a later one stays, a damaged one is not there."""

import logging

import pytest
import torch

from vista_ext.store import LmdbStore, StoreError, StoreSpec
from vista_ext.store.states import HEADER, StateSpec, StateStore

SPEC = StateSpec(2, 3, 16, model_version=7)


@pytest.fixture
def states(tmp_path):
    with StateStore.open(tmp_path / "states", SPEC, map_size=1 << 20) as states:
        yield states


def put(states, users, time, seed=0):
    n = len(users)
    values = torch.randn(n, *SPEC.shape, generator=torch.Generator().manual_seed(seed))
    numbers = torch.arange(n)
    ids = torch.tensor(users, dtype=torch.int64)
    written = states.insert(ids, values, numbers, numbers + 1, torch.full((n,), time))
    return values, written


def test_what_was_put_comes_back(states, tmp_path):
    users = [5, -3, 2**63 - 1, 0, *range(100, 400)]  # more than the map holds at first
    values, written = put(states, users, 50)
    assert written == len(states) == len(users)
    states.close()
    with StateStore.open(tmp_path / "states", SPEC) as again:
        found = again.find(torch.tensor([0, 4, *users[:3]]))
    assert found.hits.tolist() == [True, False, True, True, True]
    assert torch.equal(found.values[[0, 2, 3, 4]], values[[3, 0, 1, 2]]) and not found.values[1].any()
    assert found.events.tolist() == [3, 0, 0, 1, 2] and found.updates.tolist() == [4, 0, 1, 2, 3]
    assert found.event_times.tolist() == [50, 0, 50, 50, 50]


def test_nobody(states):
    assert put(states, [], 1)[1] == 0
    assert states.find(torch.zeros(0, dtype=torch.int64)).values.shape == (0, *SPEC.shape)


def test_a_later_state_stays_and_versions_are_apart(states, tmp_path):
    values, _ = put(states, [1, 2], 50)
    assert put(states, [2, 3], 49, seed=1)[1] == 1
    assert torch.equal(states.find(torch.tensor([1, 2])).values, values)
    newer, written = put(states, [2], 50, seed=2)
    assert written == 1 and torch.equal(states.find(torch.tensor([2])).values, newer)
    states.close()
    with StateStore.open(tmp_path / "states", StateSpec(2, 3, 16, model_version=8)) as other:
        assert not other.find(torch.tensor([1, 2])).hits.any()
        put(other, [1], 1)
        assert len(other) == 4


def test_erasures_take_states(states, tmp_path):
    put(states, [1, 2, 3], 50)
    states.close()
    with StateStore.open(tmp_path / "states", StateSpec(2, 3, 16, model_version=8)) as other:
        put(other, [1, 2], 60)
        users, until = torch.tensor([2, 1, 9]), torch.tensor([60, 55, 70])
        assert other.erase(users, until) == 3 and other.erase(users, until) == 0
        assert other.find(torch.tensor([1, 2])).hits.tolist() == [True, False]  # 1 read on until 60
        assert len(other) == 2 and other.erase(users[:0], until[:0]) == 0
        with pytest.raises(ValueError, match=r"erase: until must be int64 \[3\]"):
            other.erase(users, until[:2])


@pytest.mark.parametrize("place", [0, 4, 8, 16, HEADER.itemsize + 100, -1])
def test_a_damaged_state_is_not_there_and_may_be_replaced(states, place, caplog):
    put(states, [1, 2], 50)
    (key,) = states._keys(torch.tensor([2]).numpy())

    def spoil(txn):
        value = bytearray(txn.get(key))
        if place < 0:
            del value[-1]
        else:
            value[place] ^= 64
        txn.put(key, bytes(value))
        return 0

    states._environment.write(spoil)
    with caplog.at_level(logging.WARNING):
        found = states.find(torch.tensor([1, 2]))
    assert found.hits.tolist() == [True, False] and not found.values[1].any() and not found.event_times[1]
    assert "the state of user 2 is damaged" in caplog.text
    assert put(states, [2], 3)[1] == 1 and states.find(torch.tensor([2])).hits.all()


def test_what_does_not_fit_is_named(states, tmp_path):
    with pytest.raises(ValueError, match=r"insert: values must be float32 \[1, 2, 3, 16, 16\] on cpu, found float32"):
        states.insert(torch.tensor([1]), torch.zeros(1, 2, 3, 16), *[torch.zeros(1).long()] * 3)
    with pytest.raises(ValueError, match=r"insert: events must be int64 \[1\]"):
        states.insert(torch.tensor([1]), torch.zeros(1, *SPEC.shape), *[torch.zeros(2).long()] * 3)
    states.close()
    with pytest.raises(StoreError, match=r"shape: expected \[1, 3, 16, 16\], found \[2, 3, 16, 16\]"):
        StateStore.open(tmp_path / "states", StateSpec(1, 3, 16))
    with pytest.raises(StoreError, match="its spec cannot be read"):
        LmdbStore.open(tmp_path / "states")
    LmdbStore.create(tmp_path / "store", StoreSpec("int8", 4, 128)).close()
    with pytest.raises(StoreError, match="it is not a store of states"):
        StateStore.open(tmp_path / "store", SPEC)
    with pytest.raises(ValueError, match="states: heads must be an integer from 1"):
        StateSpec(1, 0, 16)
