"""Bytes, what is known of each byte, and who may touch it.

Global memory is one arena of the process's own memory, so that host code which only passes pointers around runs as it
is. An address is checked against the allocations in it; between two of them lies a red zone.
"""

from __future__ import annotations

import bisect
import mmap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .wave import Wave

UNWRITTEN, WRITTEN, IN_FLIGHT, RED_ZONE = 0, 1, 2, 3
POISON = 0xFF  # NaN in every float format, -1 as an integer

# Generic addresses: a window per space above every address a process has. The windows' low 32 bits are zero, since
# nvcc narrows a shared address to 32 bits.
SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW = 1 << 60, 2 << 60, 3 << 60


def sparse_zeros(count: int, dtype) -> np.ndarray:
    """Zeros that cost nothing until they are touched, however many: an arena is larger than the machine's memory."""
    size = max(count, 1) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype, count=count)


class Bytes:
    """Bytes and their states, gathered and scattered by arrays of offsets, one access width at a time."""

    def __init__(self, size: int):
        self.size = size
        self.data = sparse_zeros(size, np.uint8)
        self.state = sparse_zeros(size, np.uint8)
        self._data = {w: self._view(self.data, w) for w in (1, 2, 4, 8, 16)}
        self._state = {w: self._view(self.state, w) for w in (1, 2, 4, 8, 16)}
        self._written = {w: np.uint64(int.from_bytes(bytes([WRITTEN]) * min(w, 8), "little")) for w in (1, 2, 4, 8, 16)}

    @staticmethod
    def _view(array: np.ndarray, width: int) -> np.ndarray:
        if width == 16:
            return array.view(np.uint64).reshape(-1, 2)
        return array.view(f"u{width}")

    def gather(self, index: np.ndarray, width: int) -> np.ndarray:
        """`index` counts accesses of `width` bytes, not bytes."""
        return self._data[width].take(index, axis=0)

    def scatter(self, index: np.ndarray, width: int, values: np.ndarray) -> None:
        self._data[width][index] = values
        self._state[width][index] = self._written[width]

    def written(self, index: np.ndarray, width: int) -> np.ndarray:
        """Per access: whether every byte of it is."""
        same = self._state[width].take(index, axis=0) == self._written[width]
        return same.all(axis=1) if width == 16 else same

    def states(self, index: np.ndarray, width: int) -> np.ndarray:
        return self._state[width].take(index, axis=0).reshape(len(index), -1).view(np.uint8)

    def fill(self, index: np.ndarray, width: int, state: int) -> None:
        """Poisons whole accesses and gives them a state."""
        self._data[width][index] = self._data[width].dtype.type(
            int.from_bytes(bytes([POISON]) * min(width, 8), "little")
        )
        self._state[width][index] = self._state[width].dtype.type(
            int.from_bytes(bytes([state]) * min(width, 8), "little")
        )


class GlobalMemory(Bytes):
    ALIGNMENT = 256
    RED_ZONE_BYTES = 4096

    def __init__(self, size: int = 1 << 36):
        super().__init__(size)
        self.base = self.data.ctypes.data
        self.top = self.RED_ZONE_BYTES
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._names: list[str] = []

    def allocate(self, size: int, name: str, misalign: int = 0) -> int:
        start = -(-self.top // self.ALIGNMENT) * self.ALIGNMENT + misalign
        if start + size + self.RED_ZONE_BYTES > self.size:
            raise MemoryError(f"the emulated device's memory of {self.size} bytes is full")
        self._starts.append(start)
        self._ends.append(start + size)
        self._names.append(name)
        self.top = start + size + self.RED_ZONE_BYTES
        return self.base + start

    def _allocation(self, offset: int) -> int | None:
        """The allocation that holds the byte."""
        at = bisect.bisect_right(self._starts, offset) - 1
        return at if at >= 0 and offset < self._ends[at] else None

    def allocated(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Per access: whether it lies in one allocation."""
        if not self._starts:
            return np.zeros(len(offsets), bool)
        starts, ends = np.array(self._starts, np.uint64), np.array(self._ends, np.uint64)
        at = np.searchsorted(starts, offsets, side="right") - 1
        # Compared by room left: offsets of wild addresses are near 2^64, where adding the width would wrap.
        return (at >= 0) & (offsets < ends[at]) & (ends[at] - np.minimum(offsets, ends[at]) >= width)

    def describe(self, offset: int) -> str:
        """Where an address is, in terms of the allocation at or before it."""
        at = bisect.bisect_right(self._starts, offset) - 1
        if at < 0 or offset >= self.top:
            return f"address {(self.base + offset) % 2**64:#x}, far from every allocation"
        start, end = self._starts[at], self._ends[at]
        place = f"byte {offset - start} of {self._names[at]}, which has {end - start}"
        if at + 1 < len(self._starts) and offset >= end:
            place += f"; {self._starts[at + 1] - offset} before {self._names[at + 1]}"
        return place

    def view(self, address: int, size: int) -> np.ndarray:
        return self.data[address - self.base :][:size]

    def check_range(self, address: int, size: int) -> str | None:
        """What is wrong with a host-side copy or fill of these bytes."""
        if size == 0:
            return None
        at = self._allocation(address - self.base) if address >= self.base else None
        if at is None or address - self.base + size > self._ends[at]:
            return f"{size} bytes at {self.describe(address - self.base)}"
        return None

    def unwritten(self, address: int, size: int) -> np.ndarray:
        offset = address - self.base
        return np.flatnonzero(self.state[offset : offset + size] != WRITTEN)

    def mark_written(self, address: int, size: int) -> None:
        offset = address - self.base
        self.state[offset : offset + size] = WRITTEN


class SharedMemory(Bytes):
    """The shared memory of every block of a wave, one after the other."""

    def __init__(self, blocks: int, layout: SharedLayout):
        self.stride = -(-layout.size // 128) * 128 + 128
        super().__init__(blocks * self.stride)
        self.layout = layout
        self.pins = sparse_zeros(self.size // 16, np.uint16)  # asynchronous reads under way, by 16 bytes
        self.data[:] = POISON
        state = self.state.reshape(blocks, self.stride)
        state[:] = RED_ZONE
        for start, size in layout.variables.values():
            state[:, start : start + size] = UNWRITTEN

    def pin(self, index: np.ndarray) -> None:
        """`index` counts 16 bytes; none twice."""
        self.pins[index] += 1

    def unpin(self, index: np.ndarray) -> None:
        self.pins[index] -= 1


class SharedLayout:
    """Where a kernel's shared variables lie: bank-aligned, a red zone behind each."""

    def __init__(self) -> None:
        self.variables: dict[str, tuple[int, int]] = {}
        self.size = 0

    def add(self, name: str, size: int, align: int) -> None:
        start = -(-self.size // max(align, 128)) * max(align, 128)
        self.variables[name] = (start, size)
        self.size = start + size + 128

    def alias(self, name: str, other: str) -> None:
        self.variables[name] = self.variables[other]

    def describe(self, offset: int) -> str:
        for name, (start, size) in sorted(self.variables.items(), key=lambda item: -item[1][0]):
            if offset >= start:
                return f"byte {offset - start} of shared {name}, which has {size}"
        return f"shared address {offset:#x}"


class MemoryUnit:
    """Checked accesses of a wave's active lanes. Values come and go as raw bits, one row per active lane."""

    def __init__(self, wave: Wave):
        self.wave = wave
        self.memory = wave.launch.memory
        self.shared = wave.shared
        self.global_races = wave.launch.races
        self.shared_races = wave.shared_races

    # Global memory. `addresses` are those of the active lanes; the checks return which of them are sound.

    def _checked(self, ins, offsets: np.ndarray, width: int, what: str) -> np.ndarray | None:
        """None when all accesses are in bounds and aligned, else which of them are."""
        if int(offsets.max()) < self.memory.top and not (width > 1 and (offsets & np.uint64(width - 1)).any()):
            return None
        return self._bounds(ins, offsets, width, what)

    def _bounds(self, ins, offsets: np.ndarray, width: int, what: str) -> np.ndarray:
        aligned = (offsets & np.uint64(width - 1)) == 0
        if not aligned.all():
            at = int(np.argmin(aligned))
            detail = f"{what} of {width} bytes at {self.memory.describe(int(offsets[at]))}"
            self.wave.report("misaligned", ins, detail, at)
        inside = self.memory.allocated(offsets, width)
        if not inside.all():
            at = int(np.argmin(inside))
            detail = f"{what} of {width} bytes at {self.memory.describe(int(offsets[at]))}"
            self.wave.report("out of bounds", ins, detail, at)
        return aligned & inside

    def readable(self, ins, addresses: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Checks a read; the index into the data, and which accesses are in bounds and aligned (None for all)."""
        offsets = addresses - np.uint64(self.memory.base)
        sound = self._checked(ins, offsets, width, "read")
        index = (offsets >> _SHIFT[width]).view(np.int64)
        written = self.memory.written(index if sound is None else np.where(sound, index, 0), width)
        if not written.all():
            if sound is None:
                sound = self._bounds(ins, offsets, width, "read")
            stale = sound & ~written
            if stale.any():
                at = int(np.argmax(stale))
                detail = f"{width} bytes at {self.memory.describe(int(offsets[at]))}"
                self.wave.report("uninitialised read", ins, detail, at)
            if sound.all():
                sound = None
        if sound is not None:
            return np.where(sound, index, 0), sound
        self.wave.metrics.global_request(self.wave, ins, addresses, width)
        self.global_races.on_read(self.wave, ins, offsets, width)
        return index, None

    def read_global(self, ins, addresses: np.ndarray, width: int) -> np.ndarray:
        index, sound = self.readable(ins, addresses, width)
        values = self.memory.gather(index, width)
        if sound is not None:
            values[~sound] = values.dtype.type(2 ** (8 * min(width, 8)) - 1)
        return values

    def write_global(self, ins, addresses: np.ndarray, width: int, values: np.ndarray) -> None:
        offsets = addresses - np.uint64(self.memory.base)
        sound = self._checked(ins, offsets, width, "write")
        index = (offsets >> _SHIFT[width]).view(np.int64)
        # A byte that was ever written is allocated: only the others need looking up.
        if sound is None and not self.memory.written(index, width).all():
            sound = self._bounds(ins, offsets, width, "write")
        if sound is not None and not sound.all():
            return
        self.wave.metrics.global_request(self.wave, ins, addresses, width)
        self.memory.scatter(index, width, values)
        self.global_races.on_write(self.wave, ins, offsets, width)
        self._same_value(ins, self.memory, index, width, values)

    def _same_value(self, ins, space: Bytes, index: np.ndarray, width: int, values: np.ndarray) -> None:
        differs = space.gather(index, width) != values
        if differs.any():
            at = int(np.argmax(differs.reshape(len(index), -1).any(axis=1)))
            self.wave.report("race", ins, "threads of one instruction write different values to one place", at)

    def atomic_global(self, ins, addresses: np.ndarray, width: int) -> np.ndarray | None:
        """Checks an atomic access; the index into the data by width, None when it may not be done."""
        offsets = addresses - np.uint64(self.memory.base)
        sound = self._bounds(ins, offsets, width, "atomic")
        if not sound.all():
            return None
        index = (offsets >> _SHIFT[width]).view(np.int64)
        written = self.memory.written(index, width)
        if not written.all():
            at = int(np.argmin(written))
            detail = f"atomic on {self.memory.describe(int(offsets[at]))}"
            self.wave.report("uninitialised read", ins, detail, at)
        self.wave.metrics.global_request(self.wave, ins, addresses, width)
        self.global_races.on_write(self.wave, ins, offsets, width, atomic=True)
        return index

    # Shared memory. `addresses` count from the start of the block's shared memory.

    def shared_offsets(self, ins, addresses: np.ndarray, width: int, what: str) -> tuple[np.ndarray, bool]:
        """Offsets into the wave's shared memory and whether all may be accessed."""
        addresses = addresses.astype(np.int64)
        offsets = addresses + self.wave.pick(self.wave.slice.shared_base)
        if int(addresses.max()) + width > self.shared.stride or int(addresses.min()) < 0:
            at = int(np.argmax((addresses + width > self.shared.stride) | (addresses < 0)))
            detail = f"{what} of {width} bytes at {self.shared.layout.describe(int(addresses[at]))}"
            self.wave.report("out of bounds", ins, detail, at)
            return offsets, False
        misaligned = (addresses & (width - 1)) != 0 if width > 1 else None
        if misaligned is not None and misaligned.any():
            at = int(np.argmax(misaligned))
            detail = f"{what} of {width} bytes at {self.shared.layout.describe(int(addresses[at]))}"
            self.wave.report("misaligned", ins, detail, at)
            return offsets, False
        return offsets, True

    def _red_zone(self, ins, addresses: np.ndarray, index: np.ndarray, width: int, what: str) -> bool:
        red = (self.shared.states(index, width) == RED_ZONE).any(axis=1)
        if red.any():
            at = int(np.argmax(red))
            detail = f"{what} of {width} bytes at {self.shared.layout.describe(int(addresses[at]))}"
            self.wave.report("out of bounds", ins, detail, at)
        return bool(red.any())

    def read_shared(self, ins, addresses: np.ndarray, width: int, generic: bool = True) -> np.ndarray:
        """By the asynchronous proxy, if not `generic`: the caller says later when the reading is done."""
        offsets, sound = self.shared_offsets(ins, addresses, width, "read")
        if not sound:
            shape = (len(addresses), 2) if width == 16 else len(addresses)
            return np.full(shape, 2 ** (8 * min(width, 8)) - 1, f"u{min(width, 8)}")
        index = offsets >> _SHIFT_SIGNED[width]
        written = self.shared.written(index, width)
        if not written.all() and not self._red_zone(ins, addresses, index, width, "read"):
            at = int(np.argmin(written))
            where = self.shared.layout.describe(int(addresses[at]))
            if (self.shared.states(index[at : at + 1], width) == IN_FLIGHT).any():
                self.wave.report(
                    "in flight", ins, f"read of {where}, which an asynchronous copy has not filled yet", at
                )
            else:
                self.wave.report("uninitialised read", ins, f"{width} bytes at {where}", at)
        if generic:
            self.shared_races.on_read(self.wave, ins, offsets, width)
        else:
            self.shared_races.check_read(self.wave, ins, offsets, width)
            self.shared_races.check_proxy(self.wave, ins, offsets, width)
        return self.shared.gather(index, width)

    def write_shared(self, ins, addresses: np.ndarray, width: int, values: np.ndarray) -> None:
        index = self.claim_shared(ins, addresses, width)
        if index is not None:
            self.shared.scatter(index, width, values)
            self._same_value(ins, self.shared, index, width, values)

    def claim_shared(
        self, ins, addresses: np.ndarray, width: int, atomic: bool = False, generic: bool = True
    ) -> np.ndarray | None:
        """Checks a write, by the asynchronous proxy if not `generic`; where to write, None when it may not be done."""
        offsets, sound = self.shared_offsets(ins, addresses, width, "write")
        if not sound:
            return None
        index = offsets >> _SHIFT_SIGNED[width]
        states = self.shared.states(index, width)
        if (states != WRITTEN).any():
            if self._red_zone(ins, addresses, index, width, "write"):
                return None
            flying = (states == IN_FLIGHT).any(axis=1)
            if flying.any():
                at = int(np.argmax(flying))
                where = self.shared.layout.describe(int(addresses[at]))
                self.wave.report("in flight", ins, f"write to {where}, which an asynchronous copy is to fill", at)
            if atomic and (states == UNWRITTEN).any():
                at = int(np.argmax((states == UNWRITTEN).any(axis=1)))
                self.wave.report(
                    "uninitialised read", ins, f"atomic on {self.shared.layout.describe(int(addresses[at]))}", at
                )
        pinned = self.shared.pins.take(offsets >> 4)
        if pinned.any():
            at = int(np.argmax(pinned))
            where = self.shared.layout.describe(int(addresses[at]))
            self.wave.report("in flight", ins, f"write to {where}, which an asynchronous operation still reads", at)
        if not generic:
            self.shared_races.check_proxy(self.wave, ins, offsets, width)
        self.shared_races.on_write(self.wave, ins, offsets, width, atomic=atomic)
        return index


_SHIFT = {1 << s: np.uint64(s) for s in range(5)}
_SHIFT_SIGNED = {1 << s: s for s in range(5)}
