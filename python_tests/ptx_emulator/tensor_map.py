"""What a CUtensorMap describes, as fake_cudart.cpp records it in its 128 bytes, and where the parts of a box lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .memory import GlobalMemory
from .parser import UnsupportedPtx

_RECORD = struct.Struct("<4sBBBBQ5I4Q5H5B")
_MAGIC = b"VMAP"
_ELEMENT_BYTES = {
    0: 1,
    1: 2,
    2: 4,
    3: 4,
    4: 8,
    5: 8,
    6: 2,
    7: 4,
    8: 8,
    9: 2,
    10: 4,
    11: 4,
    12: 4,
}  # CUtensorMapDataType
_SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}


class Cells:
    """16-byte places of shared memory and the elements of global memory that belong into each.

    places: bytes from the start of the tile, swizzle included. addresses, inside: [places, elements of `width` bytes].
    """

    def __init__(self, places: np.ndarray, addresses: np.ndarray, inside: np.ndarray, width: int):
        self.places = places
        # Places that are all there go as a whole.
        if width < 16 and (inside.all(axis=1) == inside.any(axis=1)).all() and not (addresses[:, 0] % 16).any():
            addresses, inside, width = addresses[:, :1], inside[:, :1], 16
        self.addresses, self.inside, self.width = addresses.astype(np.uint64), inside, width

    def check_source(self, ins, accesses) -> bool:
        lanes = np.nonzero(self.inside)[0]
        if len(lanes) == 0:
            return True
        return accesses.some(lanes).unit.readable(ins, self.addresses[self.inside], self.width)[1] is None

    def read(self, memory: GlobalMemory) -> np.ndarray:
        """Bytes, zeros outside."""
        offsets = np.where(self.inside, (self.addresses - np.uint64(memory.base)).view(np.int64), 0)
        values = memory.data[offsets[:, :, None] + np.arange(self.width)]
        return np.ascontiguousarray(np.where(self.inside[:, :, None], values, 0)).reshape(-1, 16)

    def write(self, ins, accesses, data: np.ndarray) -> None:
        lanes = np.nonzero(self.inside)[0]
        if len(lanes) == 0:
            return
        values = np.ascontiguousarray(data).view(np.uint8).reshape(*self.inside.shape, self.width)[self.inside]
        raw = np.ascontiguousarray(values).view(np.uint64 if self.width == 16 else f"u{self.width}")
        raw = raw if self.width == 16 else raw[:, 0]
        accesses.some(lanes).unit.write_global(ins, self.addresses[self.inside], self.width, raw)

    @classmethod
    def line(cls, address: int, size: int) -> Cells:
        """`size` bytes in a row."""
        places = np.arange(0, size, 16)
        return cls(places, (address + places)[:, None], np.ones((len(places), 1), bool), 16)


@dataclass
class TensorMap:
    address: int
    element_bytes: int
    extents: list[int]  # the fastest first
    strides: list[int]  # bytes
    box: list[int]
    swizzle: int  # bytes

    @classmethod
    def from_record(cls, record: bytes) -> TensorMap:
        magic, kind, rank, swizzle, interleave, address, *rest = _RECORD.unpack(record[: _RECORD.size])
        if magic != _MAGIC:
            raise UnsupportedPtx("a tensor map that cuTensorMapEncodeTiled has not made")
        extents, strides, box, steps = rest[:5], rest[5:9], rest[9:14], rest[14:19]
        if interleave or any(step != 1 for step in steps[:rank]) or swizzle not in _SWIZZLE_BYTES:
            raise UnsupportedPtx("a tensor map with interleave, strides of elements or an unknown swizzle")
        width = _ELEMENT_BYTES[kind]
        return cls(
            address,
            width,
            [extent + 1 for extent in extents[:rank]],
            [width, *strides[: rank - 1]],
            list(box[:rank]),
            _SWIZZLE_BYTES[swizzle],
        )

    def cells(self, target: int, corner: list[int]) -> Cells:
        """The box at `corner`, in a tile whose address modulo 1024 is `target`'s: the swizzle is one of addresses."""
        per_place = 16 // self.element_bytes
        count = int(np.prod(self.box))
        linear = np.arange(count).reshape(-1, per_place)
        inside = np.ones(linear.shape, bool)
        addresses = np.full(linear.shape, self.address)
        left = linear
        for extent, stride, size, first in zip(self.extents, self.strides, self.box, corner, strict=True):
            coordinate = left % size + first
            left = left // size
            inside &= (coordinate >= 0) & (coordinate < extent)
            addresses = addresses + coordinate * stride
        places = linear[:, 0] * self.element_bytes
        return Cells(swizzled(target + places, self.swizzle) - target, addresses, inside, self.element_bytes)


def swizzled(addresses: np.ndarray, width: int) -> np.ndarray:
    """Lines of `width` bytes: the 16-byte piece of each is chosen by the address's next bits as well."""
    return addresses ^ ((addresses >> 3) & {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}[width])
