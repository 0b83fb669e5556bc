"""Slots against a plain model: who owns which, who is held, what may be written."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vista_ext.store.slots import SlotTable

SLOTS = 5
USERS = st.integers(0, 8)


class Slots(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.table = SlotTable(SLOTS, version=3)
        self.contents = [None] * SLOTS  # what a reader of the slot would see
        self.leases = []  # (slot, what it held when it was taken hold of)

    def held(self):
        return {slot for slot, _ in self.leases}

    @rule(user=USERS)
    def read(self, user):
        (slot,) = self.table.lookup(np.array([user]))
        if slot >= 0:
            assert self.contents[slot][0] == user
            self.table.hold(np.array([slot]))
            self.leases.append((slot, self.contents[slot]))

    @rule(which=st.integers(0, 20))
    def release(self, which):
        if self.leases:
            slot, seen = self.leases.pop(which % len(self.leases))
            assert self.contents[slot] == seen  # nobody wrote there
            self.table.release(np.array([slot]))

    @rule(users=st.lists(USERS, max_size=SLOTS + 1, unique=True), time=st.integers(0, 3), version=st.integers(3, 4))
    def write(self, users, time, version):
        taken = self.table.take(len(users))
        assert (taken is None) == (len(users) > SLOTS - len(self.held()))
        if taken is None:
            return
        assert not self.held() & set(taken.tolist()) and len(set(taken.tolist())) == len(users)
        held = []
        for user, slot in zip(users, taken.tolist(), strict=True):
            before = self.table.lookup(np.array([user])).item()
            assert before != slot
            self.contents[slot] = (user, time, version)
            final = self.table.assign(user, slot, time, version, 0.0)
            old = self.contents[before] if before >= 0 else None
            stays = old is not None and (old[2] == 3, old[1]) > (version == 3, time)
            assert final == (before if stays else slot) == self.table.lookup(np.array([user])).item()
            held.append(final)
        self.table.release(np.array(held, dtype=np.int64))

    @rule(users=st.lists(USERS, max_size=3))
    def drop(self, users):
        there = sum(slot >= 0 for slot in self.table.lookup(np.unique(np.array(users, dtype=np.int64))))
        assert self.table.drop(np.array(users, dtype=np.int64)) == there
        assert (self.table.lookup(np.array(users, dtype=np.int64)) == -1).all()

    @invariant()
    def nothing_leaks(self):
        owned = [slot for slot in self.table.lookup(np.arange(9)).tolist() if slot >= 0]
        assert len(owned) == len(set(owned)) == len(self.table)
        # Every slot is free, owned, or held by a lease that outlived its owner.
        assert set(owned) | self.held() | set(self.table._free) == set(range(SLOTS))
        assert not set(self.table._free) & (set(owned) | self.held())
        assert self.table._held == len(self.held())


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def fill(table, users):
    taken = table.take(len(users))
    for user, slot in zip(users, taken.tolist(), strict=True):
        table.assign(user, slot, 0, 3, 0.0)
    table.release(taken)


def test_the_clock_spares_what_was_used():
    table = SlotTable(4, version=3)
    fill(table, [0, 1, 2, 3])
    fill(table, [4])  # the first pass takes everybody's second chance
    survivors = [user for user in range(4) if table.lookup(np.array([user])).item() >= 0]
    assert len(survivors) == 3
    used = np.array(survivors[:1])
    table.hold(table.lookup(used))
    table.release(table.lookup(used))
    fill(table, [5, 6])
    assert table.lookup(used).item() >= 0 and table.evictions == 3


def test_many_windows():
    table = SlotTable(5000, version=3)
    fill(table, list(range(5000)))
    fill(table, list(range(5000, 9000)))
    assert len(table) == 5000 and table.evictions == 4000
    assert (table.lookup(np.arange(5000, 9000)) >= 0).all()
