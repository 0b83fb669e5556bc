"""Which user lies in which slot of a cache, who is reading it, and who has to go. The caller holds a lock."""

from __future__ import annotations

import numpy as np

_WINDOW = 1024  # slots that the hand of the clock looks at together


class SlotTable:
    """A fixed number of slots. A slot is free, or has an owner in the index, or is just held by those who still use it.

    Nothing is ever written into a slot that somebody holds or finds in the index: a new summary of a user goes into
    another slot, and `assign` points the index there. Who holds the old slot goes on reading the old summary; when the
    last one lets go, it is free. Whoever has to go is chosen by CLOCK: a slot that was used since the hand last passed
    it is spared once; held ones are passed over.

    Args:
        slots: how many.
        version: the model version of which a summary is preferred to those of others.
    """

    def __init__(self, slots: int, version: int) -> None:
        self.event_times = np.zeros(slots, dtype=np.int64)
        self.versions = np.zeros(slots, dtype=np.int64)
        self.read_at = np.zeros(slots)  # on the clock of the caller
        self.evictions = 0
        self._version = version
        self._index: dict[int, int] = {}
        self._owners = np.zeros(slots, dtype=np.int64)
        self._owned = np.zeros(slots, dtype=bool)
        self._used = np.zeros(slots, dtype=bool)
        self._holders = np.zeros(slots, dtype=np.int32)
        self._held = 0  # slots with holders
        self._free = list(range(slots - 1, -1, -1))
        self._hand = 0

    def __len__(self) -> int:
        """How many users have a slot."""
        return len(self._index)

    def lookup(self, users: np.ndarray) -> np.ndarray:
        """int64 `[n]`, -1 for a user without a slot."""
        index = self._index
        return np.array([index.get(user, -1) for user in users.tolist()], dtype=np.int64)

    def hold(self, slots: np.ndarray) -> None:
        """Keep distinct slots as they are until they are released."""
        self._held += int((self._holders[slots] == 0).sum())
        self._holders[slots] += 1
        self._used[slots] = True

    def release(self, slots: np.ndarray) -> None:
        """Let go of distinct slots."""
        self._holders[slots] -= 1
        unheld = slots[self._holders[slots] == 0]
        self._held -= len(unheld)
        self._free.extend(unheld[~self._owned[unheld]].tolist())

    def take(self, count: int) -> np.ndarray | None:
        """Slots to write into, held by the caller; None if so many are not to be had while others hold theirs."""
        if count > len(self._owned) - self._held:
            return None
        self._evict(count - len(self._free))
        taken = np.array([self._free.pop() for _ in range(count)], dtype=np.int64)
        self.hold(taken)
        return taken

    def assign(self, user: int, slot: int, event_time: int, version: int, read_at: float) -> int:
        """Make a slot that was taken and written the user's, unless the user's is of a later event by now, or of the
        version that is preferred when this one is not.

        Returns:
            The user's slot, which the caller holds instead of `slot` if it is another.
        """
        old = self._index.get(user)
        if old is not None and self._rank(self.versions[old], self.event_times[old]) > self._rank(version, event_time):
            mine, other = np.array([slot]), np.array([old])
            self.hold(other)
            self.release(mine)
            self.read_at[old] = read_at
            return old
        if old is not None:
            self._disown(old)
        self._index[user] = slot
        self._owners[slot], self._owned[slot] = user, True
        self.event_times[slot], self.versions[slot], self.read_at[slot] = event_time, version, read_at
        return slot

    def drop(self, users: np.ndarray) -> int:
        """Forget some users; returns how many had a slot."""
        slots = [slot for user in users.tolist() if (slot := self._index.pop(user, None)) is not None]
        for slot in slots:
            self._disown(slot)
        return len(slots)

    def _rank(self, version: int, event_time: int) -> tuple[bool, int]:
        return version == self._version, event_time

    def _disown(self, slot: int) -> None:
        self._owned[slot] = False
        if self._holders[slot] == 0:
            self._free.append(slot)

    def _evict(self, count: int) -> None:
        """Free that many slots; there are as many that nobody holds."""
        while count > 0:
            end = min(self._hand + _WINDOW, len(self._owned))
            idle = self._owned[self._hand : end] & (self._holders[self._hand : end] == 0)
            victims = np.flatnonzero(idle & ~self._used[self._hand : end])[:count] + self._hand
            passed = int(victims[-1]) + 1 if len(victims) == count else end
            self._used[self._hand : passed] = False
            self._hand = passed % len(self._owned)
            self.drop(self._owners[victims])
            self.evictions += len(victims)
            count -= len(victims)
