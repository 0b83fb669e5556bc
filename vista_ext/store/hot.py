"""A hot cache: quantized summaries in fixed slots of host or device memory, in front of a store or of another cache.

Two tiers are two caches: `HotCache(HotCache(store, slots=1_000_000), slots=100_000, device="cuda")`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from vista_ext import ops
from vista_ext.store.base import STRICT, Found, MissingUserError, Reader, ReadPolicy, StoreError, StoreUnavailableError
from vista_ext.store.checks import check_integer, check_tensor
from vista_ext.store.keyed import KeyedStore, invalidate
from vista_ext.store.lease import Lease, StreamOrder
from vista_ext.store.metrics import CacheStats, LatencyRecorder
from vista_ext.store.reading import is_expired, landing_for, why_missing
from vista_ext.store.record import in_key_order
from vista_ext.store.slots import SlotTable


class CacheFullError(StoreError):
    """Requests hold so many slots that another finds no room for what it has to read."""


class HotCache:
    """Summaries of the users asked for last, in front of a reader. May be shared between threads.

    A reader sees the old or the new summary of a user, never a mixture: `SlotTable` says why. Rows are written with
    `ops.cache_scatter_` into the one tensor that the cache has from its beginning to its end.

    Args:
        store: what is read on a miss.
        slots: summaries that fit; `slots * store.spec.row_bytes` bytes. More than all requests at a time hold together.
        device: of the rows. Host memory is pinned where there is CUDA.
        refresh_after: seconds after which a summary is read from the store again when it is asked for; None for never,
            where `update` brings what is new.
        stale_for: seconds after its reading that a summary is served while the store does not answer.
        retry_after: seconds after the store did not answer in which it is not asked again: requests go on at once.
        wait: seconds that a request waits for slots which others hold.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """

    def __init__(
        self,
        store: Reader,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        refresh_after: float | None = None,
        stale_for: float = 0.0,
        retry_after: float = 1.0,
        wait: float = 1.0,
    ) -> None:
        check_integer("cache", "slots", slots, 1)
        seconds = {"refresh_after": refresh_after, "stale_for": stale_for, "retry_after": retry_after, "wait": wait}
        for name, value in seconds.items():
            if value is not None and not value >= 0:
                raise ValueError(f"cache: {name} must be at least 0 seconds, found {value}")
        self.spec = store.spec
        self.caches: WeakValueDictionary[int, HotCache] = WeakValueDictionary()  # in front of this one, by themselves
        self._store = store
        self._refresh_after, self._stale_for = refresh_after, stale_for
        self._retry_after, self._wait = retry_after, wait
        self._pinned = torch.cuda.is_available()
        on_host = torch.device(device).type == "cpu"
        size = slots, store.spec.row_bytes
        self.rows = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=self._pinned and on_host)
        self._table = SlotTable(slots, store.spec.model_version)
        self._freed = threading.Condition()  # its lock guards all below
        self._readings: dict[int, set[int]] = {}  # users being read from the store, by the identity of the set
        self._releases = 0
        self._away_until = 0.0
        self._counts: Counter[str] = Counter()
        self._gather_times, self._read_times = LatencyRecorder(), LatencyRecorder()
        self._streams = None if on_host else StreamOrder(slots, self.rows.device)
        if isinstance(store, KeyedStore | HotCache):
            store.caches[id(self)] = self

    def gather(self, user_ids: Tensor, policy: ReadPolicy = STRICT) -> Lease:
        """Bring the summaries of some users into slots, and hold them there.

        Args:
            user_ids: int64 `[n]` on the CPU, in any order, repeats allowed.
            policy: as in `SummaryStore.find`; a cached summary is judged by it like a stored one.

        Raises:
            CacheFullError: no slots for what must be read, for `wait` seconds.
            As `SummaryStore.find`.
        """
        begin = time.monotonic()
        users = check_tensor("gather", "user_ids", user_ids, torch.int64, (None,))
        distinct, inverse = np.unique(users, return_inverse=True)
        if len(distinct) > len(self.rows):
            raise ValueError(
                f"gather: user_ids must be at most {len(self.rows)} different users, the cache's slots, "
                f"found {len(distinct)}"
            )
        while not isinstance(lease := self._try(distinct, inverse, policy), Lease):
            left = begin + self._wait - time.monotonic()
            with self._freed:
                if not self._freed.wait_for(partial(self._released_since, lease), max(left, 0)):
                    raise CacheFullError(
                        f"cache: no slots for {len(distinct)} users within {self._wait} seconds: "
                        f"requests hold too many of {len(self.rows)}"
                    )
        self._gather_times.observe(time.monotonic() - begin)
        return lease

    def find(self, user_ids: Tensor, policy: ReadPolicy = STRICT, *, out: Tensor | None = None) -> Found:
        """As `SummaryStore.find`: rows are copied out of their slots, to the CPU."""
        users = check_tensor("find", "user_ids", user_ids, torch.int64, (None,))
        rows = landing_for(self.spec, len(users), out).rows
        with self.gather(user_ids, policy) as lease:
            # A slot of -1 reads any row, which is wiped below. numpy copies rows of bytes whole, torch byte by byte.
            if self._streams is None:
                np.take(self.rows.numpy(), lease.slots.numpy(), axis=0, out=rows.numpy(), mode="clip")
            else:
                rows.copy_(self.rows.index_select(0, lease.slots.clamp(min=0)))
        rows.numpy()[~lease.hits.numpy()] = 0
        masks = lease.damaged, lease.expired, lease.unavailable
        return Found(rows, lease.hits, lease.event_times, lease.versions, *masks)

    def update(self, user_ids: Tensor, rows: Tensor, event_times: Tensor) -> int:
        """Replace cached summaries, of `spec.model_version`, by newer ones: what a consumer of a queue calls.

        Users who are not cached are left out. Where there is no free slot the old summary is dropped instead.

        Args:
            As `SummaryStore.insert`.

        Returns:
            How many summaries were replaced.
        """
        users = check_tensor("update", "user_ids", user_ids, torch.int64, (None,))
        data = check_tensor("update", "rows", rows, torch.uint8, (len(users), self.spec.row_bytes))
        times = check_tensor("update", "event_times", event_times, torch.int64, (len(users),))
        versions = self._own_versions(len(users))
        order = in_key_order(users, versions, times, newest_wins=True)
        with self._freed:
            slots = self._table.lookup(users[order])
            known = slots >= 0
            # Whoever is just being read counts as cached: what is read may be older than this.
            read = [any(user in reading for reading in self._readings.values()) for user in users[order].tolist()]
            older = self._table.event_times[slots] <= times[order]
            older |= self._table.versions[slots] != self.spec.model_version
            chosen = order[np.where(known, older, np.array(read, dtype=bool))]
            taken = self._table.take(len(chosen))
            if taken is None:
                self._table.drop(users[chosen])
                return 0
        arrived = users[chosen], taken, torch.from_numpy(data[chosen]), times[chosen], versions[chosen]
        self._release(self._fill(*arrived, None))
        self._count(refreshed=len(chosen))
        return len(chosen)

    def invalidate(self, user_ids: Tensor) -> int:
        """Forget some users, here and in caches in front of this one; their summaries are read again when asked for.
        A store's `erase` calls this for caches in front of that object. Returns how many were cached here."""
        users = check_tensor("invalidate", "user_ids", user_ids, torch.int64, (None,))
        with self._freed:
            for reading in self._readings.values():
                reading.difference_update(users.tolist())
            dropped = self._table.drop(users)
        invalidate(self.caches, user_ids)  # after this one, from which they might read an old summary again
        return dropped

    def stats(self) -> CacheStats:
        """What the cache has done until now."""
        with self._freed:
            counts, evictions, users = self._counts.copy(), self._table.evictions, len(self._table)
        return CacheStats(
            hits=counts["hits"],
            misses=counts["misses"],
            stale=counts["stale"],
            unknown=counts["unknown"],
            failures=counts["failures"],
            refreshed=counts["refreshed"],
            evictions=evictions,
            users=users,
            gather=self._gather_times.snapshot(),
            read=self._read_times.snapshot(),
        )

    def _try(self, users: np.ndarray, inverse: np.ndarray, policy: ReadPolicy) -> Lease | int:
        """A lease of distinct users. If there was no room, the count of releases before: one since then may have made
        some. Nothing is held while waiting for that, so that requests do not wait for each other."""
        with self._freed:
            releases = self._releases
            slots = self._table.lookup(users)
            fresh = self._usable(slots, policy, self._refresh_after)
            slots[~fresh] = -1
            self._table.hold(slots[fresh])
            missing = np.flatnonzero(~fresh)
            reading = set(users[missing].tolist())
            self._readings[id(reading)] = reading
        state = {name: np.zeros(len(users), dtype=bool) for name in ("damaged", "expired", "unavailable", "stale")}
        state["slots"] = slots
        try:
            if len(missing) and not self._read(users, missing, reading, policy, state):
                held = slots[slots >= 0]
                self._release(held)
                return releases + (len(held) > 0)
            unknown = int(((slots < 0) & ~state["unavailable"]).sum())
            self._count(hits=len(users) - len(missing), misses=len(missing), unknown=unknown)
            if policy.on_miss == "raise" and (slots < 0).any():
                causes = {name: state[name] for name in ("damaged", "expired", "unavailable")}
                raise MissingUserError(users[slots < 0].tolist(), len(inverse), why_missing(**causes))
        except BaseException:
            self._release(slots[slots >= 0])
            raise
        finally:
            with self._freed:
                del self._readings[id(reading)]
        table, hit = self._table, slots >= 0
        state["event_times"] = np.where(hit, table.event_times[slots], -1)
        state["versions"] = np.where(hit, table.versions[slots], -1)
        if self._streams is not None:
            self._streams.before_reading(slots[hit])
        return Lease(self.spec, self.rows, state, inverse, self._give_back)

    def _read(
        self,
        users: np.ndarray,
        missing: np.ndarray,
        reading: set[int],
        policy: ReadPolicy,
        state: dict[str, np.ndarray],
    ) -> bool:
        """Bring what is missing from the store into slots, and say so in `state`; False if there are no slots."""
        size = len(missing), self.spec.row_bytes
        landing = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        begin = time.monotonic()
        try:
            if begin < self._away_until:
                raise StoreUnavailableError("cache: its store did not answer a moment ago and is not asked again yet")
            asked = torch.from_numpy(users[missing])
            found = self._store.find(asked, replace(policy, on_miss="flag", on_unavailable="raise"), out=landing)
        except StoreUnavailableError:
            if begin >= self._away_until:
                self._count(failures=1)
                self._away_until = time.monotonic() + self._retry_after
            self._hold_stale(users, missing, policy, state)
            if policy.on_unavailable == "raise" and (state["slots"] < 0).any():
                raise
            state["unavailable"] = state["slots"] < 0
            return True
        self._read_times.observe(time.monotonic() - begin)
        hits = found.hits.numpy()
        state["damaged"][missing], state["expired"][missing] = found.damaged.numpy(), found.expired.numpy()
        with self._freed:
            self._table.drop(users[missing[~hits]])  # erased since, or not to be used any more
            taken = self._table.take(int(hits.sum()))
        if taken is None:
            return False
        rows = found.rows if hits.all() else torch.from_numpy(found.rows.numpy()[hits])
        arrived = users[missing[hits]], taken, rows, found.event_times.numpy()[hits], found.versions.numpy()[hits]
        state["slots"][missing[hits]] = self._fill(*arrived, reading)
        return True

    def _fill(
        self,
        users: np.ndarray,
        slots: np.ndarray,
        rows: Tensor,
        times: np.ndarray,
        versions: np.ndarray,
        reading: set[int] | None,
    ) -> np.ndarray:
        """Write rows into slots that were taken, and point the index there; returns the slots that are held then.

        Users who are no longer in `reading` were invalidated: they get their rows but no place in the index.
        """
        try:
            if self._streams is not None:
                self._streams.before_writing(slots)
            device = self.rows.device
            ops.cache_scatter_(
                self.rows, torch.from_numpy(slots).to(device), rows.to(device, non_blocking=True).contiguous()
            )
            if self._streams is not None:
                self._streams.after_writing(slots)
        except BaseException:
            self._release(slots)
            raise
        now = time.monotonic()
        held = slots.copy()
        with self._freed:
            for i, user in enumerate(users.tolist()):
                if reading is None or user in reading:
                    held[i] = self._table.assign(user, int(slots[i]), int(times[i]), int(versions[i]), now)
                else:
                    self._table.event_times[slots[i]], self._table.versions[slots[i]] = times[i], versions[i]
        return held

    def _hold_stale(
        self, users: np.ndarray, missing: np.ndarray, policy: ReadPolicy, state: dict[str, np.ndarray]
    ) -> None:
        with self._freed:
            slots = self._table.lookup(users[missing])
            good = self._usable(slots, policy, self._stale_for)
            self._table.hold(slots[good])
        state["slots"][missing[good]] = slots[good]
        state["stale"][missing[good]] = True
        self._count(stale=int(good.sum()))

    def _usable(self, slots: np.ndarray, policy: ReadPolicy, age: float | None) -> np.ndarray:
        """Which slots hold a summary that the policy allows and that was read at most `age` seconds ago."""
        table = self._table
        usable = (slots >= 0) & ~is_expired(policy, table.event_times[slots])
        if policy.on_version_mismatch != "accept":
            usable &= table.versions[slots] == self.spec.model_version
        if age is not None:
            usable &= table.read_at[slots] >= time.monotonic() - age
        return usable

    def _release(self, slots: np.ndarray) -> None:
        if len(slots) == 0:
            return
        with self._freed:
            self._table.release(slots)
            self._releases += 1
            self._freed.notify_all()

    def _give_back(self, slots: np.ndarray) -> None:
        """The end of a lease."""
        if self._streams is not None:
            self._streams.after_reading(slots)
        self._release(slots)

    def _released_since(self, releases: int) -> bool:
        return self._releases != releases

    def _own_versions(self, n: int) -> np.ndarray:
        return np.full(n, self.spec.model_version, dtype=np.int64)

    def _count(self, **counts: int) -> None:
        with self._freed:
            self._counts.update(counts)
