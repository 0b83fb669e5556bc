"""The hot cache: what it serves, when it asks the store, and that nobody ever sees half a summary."""

import gc
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from workers import SPEC, constant, erase_elsewhere, ids, rows_of, version

from vista_ext import ops
from vista_ext.serve.scorer import from_cache, from_store
from vista_ext.store import (
    STRICT,
    CacheFullError,
    ExpiredError,
    HotCache,
    LmdbStore,
    MissingUserError,
    ReadPolicy,
    RecordError,
    StoreSpec,
    StoreUnavailableError,
    VersionMismatchError,
)

FLAG = ReadPolicy(on_miss="flag")


class Backend:
    """A store that counts what it is asked, and may be away or slow."""

    def __init__(self, store):
        self.store, self.spec = store, store.spec
        self.asked, self.away, self.before_answer = [], False, lambda: None

    def find(self, user_ids, policy=STRICT, *, out=None):
        if self.away:
            raise StoreUnavailableError("away")
        self.asked.append(user_ids.tolist())
        found = self.store.find(user_ids, policy, out=out)
        self.before_answer()
        return found


@pytest.fixture(params=["native"])
def engine(request):
    """One LMDB is enough here."""
    return request.param


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def hot(request):
    """A cache on each device that is there."""
    return partial(HotCache, device=request.param)


@pytest.fixture
def backend(store):
    return Backend(store)


def check(lease, users, generations):
    users, generations = ids(*users), ids(*generations)
    assert lease.hits.all() and lease.event_times.tolist() == generations.tolist()
    assert torch.equal(lease.rows[lease.slots].cpu(), rows_of(users, generations))


def test_a_summary_is_read_once(backend, put, hot):
    put([1, 2, 3], 5)
    cache = hot(backend, 8)
    with cache.gather(ids(2, 1, 2)) as lease:
        check(lease, [2, 1, 2], [5, 5, 5])
        assert lease.slots[0] == lease.slots[2] and lease.versions.tolist() == [3, 3, 3]
    with cache.gather(ids(3, 2, 1)) as lease:
        check(lease, [3, 2, 1], [5, 5, 5])
    assert backend.asked == [[1, 2], [3]]
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.users, stats.evictions) == (2, 3, 3, 0) and stats.hit_rate == 0.4
    assert stats.gather.count == 2 and stats.read.count == 2
    assert 0 < stats.gather.quantile(0.5) <= stats.gather.quantile(0.99) and stats.gather.total > 0


def test_slots_feed_cache_gather(backend, store, hot):
    spec = backend.spec
    x = torch.randn(3, spec.tokens, spec.dim, generator=torch.Generator().manual_seed(0))
    rows = ops.quantize_rows(x)
    store.insert(ids(1, 2, 3), rows, ids(1, 1, 1))
    with hot(backend, 4).gather(ids(3, 9, 1), FLAG) as lease:
        assert lease.hits.tolist() == [True, False, True] and lease.slots[1] == -1
        back = lease.dequantize().cpu()
    expected = ops.dequantize_rows(rows, spec.tokens, spec.dim)
    assert torch.equal(back[0], expected[2]) and torch.equal(back[2], expected[0]) and not back[1].any()


def test_find_is_that_of_a_store_and_caches_stack(backend, put, hot):
    put([1, 2], 5)
    inner = hot(backend, 8)
    outer = hot(inner, 3)
    for cache in (inner, outer, outer):
        found = cache.find(ids(2, 7, 1), FLAG)
        assert found.hits.tolist() == [True, False, True] and found.event_times.tolist() == [5, -1, 5]
        assert torch.equal(found.rows[[0, 2]], rows_of([2, 1], [5, 5])) and not found.rows[1].any()
    assert backend.asked == [[1, 2, 7], [7], [7]]  # the unknown is asked for each time
    out = torch.empty(2, SPEC.row_bytes, dtype=torch.uint8)
    assert outer.find(ids(1, 2), out=out).rows.data_ptr() == out.data_ptr()
    assert torch.equal(out, rows_of([1, 2], [5, 5]))


def test_no_users(backend, hot):
    with hot(backend, 1).gather(ids()) as lease:
        assert lease.slots.shape == (0,) and lease.dequantize().shape == (0, 16, 256)
    assert backend.asked == []


def test_the_policy_is_that_of_stores(backend, put, path, store, hot):
    put([1], int(time.time()) - 1000)
    cache = hot(backend, 8)
    with pytest.raises(MissingUserError, match="1 of 2 users have no summary: 2"):
        cache.gather(ids(1, 2))
    with cache.gather(ids(1)):  # is cached now
        pass
    with pytest.raises(ExpiredError):
        cache.gather(ids(1), ReadPolicy(max_age=10, on_expired="raise"))
    with pytest.raises(MissingUserError, match=r"that can be used \(1 expired\): 1"):
        cache.gather(ids(1), ReadPolicy(max_age=10))
    with cache.gather(ids(1), ReadPolicy(max_age=10, on_miss="flag")) as lease:
        assert lease.expired.tolist() == [True] and not lease.hits.any()
    store.close()
    with LmdbStore.open(path, spec=version(9)) as newer:
        cache = hot(newer, 8)
        with cache.gather(ids(1), ReadPolicy(on_version_mismatch="accept")) as lease:
            assert lease.versions.tolist() == [3]
        with pytest.raises(VersionMismatchError):  # although it is cached
            cache.gather(ids(1))
    assert cache._table._held == 0


def test_damage(backend, store, put, hot):
    put([1, 2], 5)
    key = b"\x80" + bytes(6) + b"\x02" + bytes(7) + b"\x03"
    store._environment.write(lambda txn: txn.put(key, bytes(txn.get(key))[:-1] + b"x"))
    cache = hot(backend, 8)
    with pytest.raises(RecordError, match="user 2"):
        cache.gather(ids(1, 2))
    with cache.gather(ids(1, 2), ReadPolicy(on_damage="miss", on_miss="flag")) as lease:
        assert lease.hits.tolist() == [True, False] and lease.damaged.tolist() == [False, True]
    assert cache._table._held == 0


def test_who_is_held_is_not_evicted(backend, put, hot):
    put(list(range(10)), 5)
    cache = hot(backend, 4, wait=0.05)
    with cache.gather(ids(0, 1, 2)) as lease:
        for user in range(3, 10):
            with cache.gather(ids(user)):
                pass
        check(lease, [0, 1, 2], [5, 5, 5])
        begin = time.monotonic()
        with pytest.raises(CacheFullError, match=r"no slots for 2 users within 0\.05 seconds"):
            cache.gather(ids(8, 9))
        assert time.monotonic() - begin < 5
    with cache.gather(ids(6, 7, 8, 9)) as lease:
        check(lease, [6, 7, 8, 9], [5] * 4)
    with pytest.raises(ValueError, match="user_ids must be at most 4 different users, the cache's slots, found 5"):
        cache.gather(torch.arange(5))
    assert cache.stats().evictions >= 9


def test_a_request_waits_for_slots(backend, put, hot):
    put(list(range(4)), 5)
    cache = hot(backend, 2, wait=30)
    lease = cache.gather(ids(0, 1))
    timer = threading.Timer(0.2, lease.release)
    timer.start()
    with cache.gather(ids(2, 3)) as second:
        check(second, [2, 3], [5, 5])
    lease.release()  # twice is fine
    assert cache._table._held == 0


def test_a_summary_is_read_again_in_time(backend, put, monkeypatch, hot):
    now = [100.0]
    monkeypatch.setattr("vista_ext.store.hot.time.monotonic", lambda: now[0])
    put([1], 5)
    cache = hot(backend, 4, refresh_after=60)
    with cache.gather(ids(1)) as old:
        put([1], 6)
        now[0] += 60
        with cache.gather(ids(1)) as lease:
            check(lease, [1], [5])  # not overdue yet
        now[0] += 1
        with cache.gather(ids(1)) as lease:
            check(lease, [1], [6])
        check(old, [1], [5])  # whoever began before goes on with what it has
    assert len(backend.asked) == 2


def test_a_store_that_is_away(backend, put, monkeypatch, hot):
    now = [100.0]
    monkeypatch.setattr("vista_ext.store.hot.time.monotonic", lambda: now[0])
    put([1, 2], 5)
    cache = hot(backend, 4, refresh_after=60, stale_for=600, retry_after=5)
    degrade = ReadPolicy(on_miss="flag", on_unavailable="miss")
    with cache.gather(ids(1)):
        pass
    backend.away = True
    now[0] += 100
    with cache.gather(ids(1)) as lease:  # overdue, but within the stated age: nobody need know
        check(lease, [1], [5])
        assert lease.stale.tolist() == [True]
    with pytest.raises(StoreUnavailableError):
        cache.gather(ids(1, 2))
    with cache.gather(ids(1, 2, 2), degrade) as lease:
        assert lease.hits.tolist() == [True, False, False] and lease.unavailable.tolist() == [False, True, True]
    with pytest.raises(MissingUserError, match=r"that can be used \(1 unavailable\): 2"):
        cache.gather(ids(1, 2), ReadPolicy(on_unavailable="miss"))
    assert cache.stats().failures == 1  # it was not asked again at once
    backend.away = False
    with pytest.raises(StoreUnavailableError, match="did not answer a moment ago"):
        cache.gather(ids(2))
    now[0] += 6
    with cache.gather(ids(1, 2)) as lease:
        check(lease, [1, 2], [5, 5])
        assert not lease.stale.any()
    backend.away = True
    now[0] += 601
    with pytest.raises(StoreUnavailableError):  # too stale to be served
        cache.gather(ids(1))
    assert cache.stats().stale == 4 and cache._table._held == 0


def test_update_replaces_what_is_cached(backend, put, hot):
    put([1, 2], 5)
    cache = hot(backend, 4)
    with cache.gather(ids(1)) as old:
        users, times = ids(1, 2, 1, 1), ids(6, 6, 9, 7)
        assert cache.update(users, rows_of(users, times), times) == 1
        check(old, [1], [5])
        with cache.gather(ids(1)) as new:
            check(new, [1], [9])
    assert cache.update(ids(1), rows_of([1], [8]), ids(8)) == 0  # older
    with cache.gather(ids(1, 2)) as lease:
        check(lease, [1, 2], [9, 5])
    assert cache.stats().refreshed == 1 and cache._table._held == 0
    lease = cache.gather(ids(1, 2))
    others = cache.gather(ids(1, 2))
    full = hot(backend, 1)
    with full.gather(ids(1)) as held:  # no slot for the new one: the old one is at least not served again
        assert full.update(ids(1), rows_of([1], [9]), ids(9)) == 0
        check(held, [1], [5])
    put([1], 9)
    with full.gather(ids(1)) as again:
        check(again, [1], [9])
    lease.release()
    others.release()


def test_an_update_overtakes_a_reading(backend, put, hot):
    """What is read from the store while a newer summary arrives must not bury it."""
    put([1], 5)
    cache = hot(backend, 4)
    backend.before_answer = lambda: cache.update(ids(1), rows_of([1], [6]), ids(6))
    with cache.gather(ids(1)) as lease:
        check(lease, [1], [6])
    with cache.gather(ids(1)) as lease:
        check(lease, [1], [6])
    assert len(backend.asked) == 1


def test_an_invalidation_overtakes_a_reading(backend, put, hot):
    put([1], 5)
    cache = hot(backend, 4)
    backend.before_answer = lambda: cache.invalidate(ids(1))
    with cache.gather(ids(1)) as lease:
        check(lease, [1], [5])  # begun before: served, but not kept
    backend.before_answer = lambda: None
    put([1], 4, newest_wins=False)
    with cache.gather(ids(1)) as lease:
        check(lease, [1], [4])
    assert cache.invalidate(ids(1, 2)) == 1 and len(backend.asked) == 2 and cache._table._held == 0


def test_who_is_erased_through_the_store_is_dropped_at_once(store, put, path, tmp_path, hot):
    put([1, 2], 5)
    host = hot(store, 8)
    device = hot(host, 8)
    for erase in (lambda: store.erase(ids(1), ids(5)), lambda: store.erase(ids(1)), load_an_erasure(store, tmp_path)):
        store.drop_erasures(9)
        put([1, 2], 5)
        with device.gather(ids(1, 2)) as lease:
            check(lease, [1, 2], [5, 5])
            erase()
            check(lease, [1, 2], [5, 5])  # a lease keeps what it has seen
        for cache in (device, host):
            assert cache.stats().users == 1
            assert cache.find(ids(1, 2), FLAG).hits.tolist() == [False, True]
    del host, device, cache, lease
    gc.collect()
    assert not len(store.caches)


def load_an_erasure(store, folder):
    with LmdbStore.create(folder / "elsewhere", SPEC) as other:
        other.erase(ids(1), ids(5))
    return lambda: store.load_snapshot(folder / "elsewhere")


def test_a_failed_erasure_drops_too(store, put, monkeypatch, hot):
    """Some of it may be done."""
    put([1], 5)
    cache = hot(store, 4)
    cache.find(ids(1))
    erase = store._erase
    monkeypatch.setattr(store, "_erase", lambda *users: erase(*users) and 1 // 0)
    with pytest.raises(ZeroDivisionError):
        store.erase(ids(1), ids(5))
    assert not cache.find(ids(1), FLAG).hits.any()


def test_caches_may_join_while_users_are_erased(store, put, hot):
    """As from another thread: here at every step of a walk over weak references."""
    put([1], 5)
    cache, joined, tracing = hot(store, 4), [], sys.gettrace()
    cache.find(ids(1))

    def join(frame, event, arg):
        if "weakref" in frame.f_code.co_filename:
            joined.append(HotCache(store, 1))
        return join

    sys.settrace(join)
    try:
        store.erase(ids(1), ids(5))
    finally:
        sys.settrace(tracing)
    assert joined and not cache.find(ids(1), FLAG).hits.any()


@pytest.mark.parametrize("away", [False, True])
def test_what_another_process_erases_is_served_until_it_is_read_again(backend, path, put, processes, monkeypatch, away):
    """At most `refresh_after` from its reading; where the store does not answer, `stale_for`."""
    now = [100.0]
    monkeypatch.setattr("vista_ext.store.hot.time.monotonic", lambda: now[0])
    put([1, 2], 5)
    cache = HotCache(backend, 4, refresh_after=10, stale_for=30, retry_after=0)
    policy = ReadPolicy(on_miss="flag", on_unavailable="miss")
    assert cache.find(ids(1, 2), policy).hits.all()
    eraser = processes.Process(target=erase_elsewhere, args=(path, 1))
    eraser.start()
    eraser.join(60)
    assert eraser.exitcode == 0 and not backend.store.find(ids(1), policy).hits.any()
    backend.away = away
    for later, served in ((10, True), (10.1, away), (30, away), (30.1, False)):
        now[0] = 100.0 + later
        assert cache.find(ids(1), policy).hits.tolist() == [served], later


def test_an_erased_user_is_forgotten(backend, store, put, monkeypatch, hot):
    now = [100.0]
    monkeypatch.setattr("vista_ext.store.hot.time.monotonic", lambda: now[0])
    put([1], 5)
    cache = hot(backend, 4, refresh_after=1)
    with cache.gather(ids(1)):
        store.erase(ids(1))
    now[0] += 2
    with cache.gather(ids(1), FLAG) as lease:
        assert not lease.hits.any()
    assert cache.stats().users == 0 and cache.stats().unknown == 1


@pytest.mark.parametrize("way", ["update", "refresh"])
def test_nobody_sees_a_mixture(store, put, way, hot):
    """Readers in threads while every summary is replaced all the time, in a cache too small for all users."""
    users = torch.arange(48)
    put(users.tolist(), 0)
    cache = hot(store, 40, wait=30, refresh_after=None if way == "update" else 0)
    stop = time.monotonic() + 4
    seen = set()

    def read(seed):
        generator = torch.Generator().manual_seed(seed)
        reads = 0
        while time.monotonic() < stop:
            mine = users[torch.randperm(48, generator=generator)[:8]]
            with cache.gather(mine) as lease:
                for _ in range(3):  # a lease keeps what it has, however often it is read
                    assert torch.equal(lease.rows[lease.slots].cpu(), rows_of(mine, lease.event_times))
            seen.update(lease.event_times.tolist())
            reads += 1
        return reads

    def write():
        generation = 0
        while time.monotonic() < stop:
            generation += 1
            times = constant(48, generation)
            if way == "update":
                for part in users.split(4):
                    cache.update(part, rows_of(part, times[:4]), times[:4])
            else:
                store.insert(users, rows_of(users, times), times)
        return generation

    with ThreadPoolExecutor(4) as pool:
        writer, *readers = pool.submit(write), *(pool.submit(read, seed) for seed in range(3))
        assert all(reader.result() > 20 for reader in readers) and writer.result() > 5 and len(seen) > 5
    assert cache._table._held == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots must be an integer from 1"),
        ({"slots": 2, "wait": -1.0}, "wait must be at least 0 seconds, found -1.0"),
        ({"slots": 2, "refresh_after": float("nan")}, "refresh_after must be at least 0 seconds, found nan"),
        ({"slots": 2, "stale_for": -1}, "stale_for must be at least 0"),
    ],
)
def test_bad_options(backend, options, message):
    with pytest.raises(ValueError, match=message):
        HotCache(backend, **options)


def test_bad_arguments(backend, hot):
    cache = hot(backend, 2)
    for call, message in [
        (lambda: cache.gather([1]), r"gather: user_ids must be a tensor, int64 \[n\] on cpu, found list"),
        (lambda: cache.update(ids(1), rows_of([1, 2], [1, 1]), ids(1)), r"update: rows must be uint8 \[1, 4224\]"),
        (lambda: cache.find(ids(1), out=rows_of([1, 2], [1, 2])), r"find: out must be uint8 \[1, 4224\]"),
        (lambda: cache.invalidate(torch.ones(1)), "invalidate: user_ids must be int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_int4_rows(path, hot):
    spec = StoreSpec("int4", 4, 128)
    rows = ops.quantize_rows(torch.randn(3, 4, 128), scheme="int4")
    with LmdbStore.create(path, spec) as store:
        store.insert(ids(1, 2, 3), rows, ids(1, 1, 1))
        with hot(store, 3).gather(ids(3, 1)) as lease:
            assert torch.equal(lease.dequantize().cpu(), ops.dequantize_rows(rows[[2, 0]], 4, 128, scheme="int4"))


def test_scoring_reads_through_the_cache(hot, backend, store):
    rows = ops.quantize_rows(torch.randn(3, SPEC.tokens, SPEC.dim))
    store.insert(ids(1, 2, 3), rows, ids(1, 1, 1))
    through = from_cache(hot(backend, 4))(ids(3, 1, 3))
    assert torch.equal(through.cpu(), from_store(store)(ids(3, 1, 3)))
