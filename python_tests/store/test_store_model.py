"""The store against a dict, whatever is done to it in whatever order."""

import tempfile
import uuid
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from places import LmdbPlace, RedisPlace
from workers import rows_of

from vista_ext.store import ReadPolicy, StoreSpec
from vista_ext.store.redis import RedisConfig

SPEC = StoreSpec("int8", 1, 128, model_version=3)
# Few users, so that rules meet; the extremes of int64 and neighbours in key order among them.
USERS = st.sampled_from([-(2**63), -(2**63) + 1, -256, -1, 0, 1, 255, 256, 2**63 - 2, 2**63 - 1])
WRITES = st.lists(st.tuples(USERS, st.integers(-3, 3), st.integers(0, 2**15)), max_size=6)


def tensors(writes):
    users, times, tags = (torch.tensor([w[i] for w in writes], dtype=torch.int64) for i in range(3))
    return users, rows_of(tags, tags, SPEC), times


class AgainstDict(RuleBasedStateMachine):
    new_place = None  # a function of a folder, given by each test

    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory()
        self.place = type(self).new_place(Path(self.folder.name) / "store")
        self.store = self.place.create(SPEC)
        self.store._batch = 2  # so that calls cross transactions
        self.model = {}  # (user, version) -> (time, tag)
        self.erased = {}  # user -> time
        self.snapshots = []

    def apply(self, writes, newest_wins, only_present, version):
        best = {}
        for user, time, tag in writes:
            if user not in best or not newest_wins or time >= best[user][0]:
                best[user] = (time, tag)
        written = 0
        for user, value in best.items():
            stored = self.model.get((user, version))
            if (stored is None and only_present) or (stored and newest_wins and stored[0] > value[0]):
                continue
            if value[0] <= self.erased.get(user, value[0] - 1):
                continue
            self.model[user, version] = value
            written += 1
        return written

    @rule(writes=WRITES, newest_wins=st.booleans())
    def insert(self, writes, newest_wins):
        expected = self.apply(writes, newest_wins, False, self.store.spec.model_version)
        assert self.store.insert(*tensors(writes), newest_wins=newest_wins) == expected

    @rule(writes=WRITES, newest_wins=st.booleans())
    def update(self, writes, newest_wins):
        expected = self.apply(writes, newest_wins, True, self.store.spec.model_version)
        assert self.store.update(*tensors(writes), newest_wins=newest_wins) == expected

    @rule(users=st.lists(USERS, max_size=3))
    def erase(self, users):
        gone = [key for key in self.model if key[0] in users]
        assert self.store.erase(torch.tensor(users, dtype=torch.int64)) == len(gone)
        for key in gone:
            del self.model[key]

    @rule(users=st.lists(st.tuples(USERS, st.integers(-4, 4)), max_size=3))
    def erase_until(self, users):
        chosen, until = (torch.tensor([pair[i] for pair in users], dtype=torch.int64) for i in range(2))
        assert self.store.erase(chosen, until) == self.forget(users)

    def forget(self, users):
        gone = set()
        for user, until in users:
            self.erased[user] = max(until, self.erased.get(user, until))
            gone |= {key for key, value in self.model.items() if key[0] == user and value[0] <= until}
        for key in gone:
            del self.model[key]
        return len(gone)

    @rule(before=st.integers(-4, 4))
    def drop_erasures(self, before):
        old = [user for user, until in self.erased.items() if until < before]
        assert self.store.drop_erasures(before) == len(old)
        for user in old:
            del self.erased[user]

    @rule(users=st.lists(USERS, max_size=8), mismatch=st.sampled_from(["miss", "accept"]))
    def find(self, users, mismatch):
        found = self.store.find(
            torch.tensor(users, dtype=torch.int64), ReadPolicy(on_miss="flag", on_version_mismatch=mismatch)
        )
        for i, user in enumerate(users):
            there = [version for u, version in self.model if u == user]
            wanted = self.store.spec.model_version
            version = wanted if wanted in there or mismatch == "miss" or not there else max(there)
            value = self.model.get((user, version))
            assert bool(found.hits[i]) == (value is not None)
            time, tag = value or (-1, 0)
            assert found.event_times[i] == time and found.versions[i] == (version if value else -1)
            assert torch.equal(found.rows[i], rows_of([tag], [tag], SPEC)[0])

    @rule(version=st.sampled_from([0, 3, 2**63 - 1]))
    def reopen(self, version):
        self.store.close()
        self.store = self.place.open(StoreSpec("int8", 1, 128, model_version=version))
        self.store._batch = 2

    @rule()
    def save_snapshot(self):
        path = Path(self.folder.name, f"snapshot{len(self.snapshots)}")
        self.store.save_snapshot(path)
        self.snapshots.append((path, dict(self.model), dict(self.erased)))

    @rule(which=st.integers(0, 9))
    def load_snapshot(self, which):
        if not self.snapshots:
            return
        path, content, erased = self.snapshots[which % len(self.snapshots)]
        self.forget(erased.items())
        written = sum(self.apply([(u, *value)], True, False, version) for (u, version), value in content.items())
        assert self.store.load_snapshot(path) == written

    def teardown(self):
        if not hasattr(self, "store"):
            return
        stored = {}
        for batch in self.store:
            for i in range(len(batch)):
                key = int(batch.user_ids[i]), int(batch.versions[i])
                assert torch.equal(batch.rows[i], rows_of([self.model[key][1]], [self.model[key][1]], SPEC)[0])
                stored[key] = int(batch.event_times[i])
        assert list(stored.items()) == sorted((key, value[0]) for key, value in self.model.items())
        assert len(self.store) == len(self.model)
        erased = self.store.erasures()
        assert list(zip(erased.user_ids.tolist(), erased.until.tolist(), strict=True)) == sorted(self.erased.items())
        self.store.close()
        self.folder.cleanup()


def check(new_place):
    machine = type("Machine", (AgainstDict,), {"new_place": staticmethod(new_place)})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=20, deadline=None))


def test_lmdb(engine):
    check(LmdbPlace)


def test_redis(redis_server):
    check(lambda _: RedisPlace(RedisConfig(redis_server.url, prefix=uuid.uuid4().hex)))
