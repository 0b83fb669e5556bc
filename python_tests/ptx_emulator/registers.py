"""The registers of a wave: one array over the lanes for each, seen as the types that instructions see them as."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .parser import TYPE_BYTES, Register, UnsupportedPtx

if TYPE_CHECKING:
    from .wave import Wave

# bfloat16 has no numpy type: handlers get its bits.
NUMPY = {
    f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
    for kind, code in (("b", "u"), ("u", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
}
NUMPY |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
NUMPY |= {"bf16": np.dtype("u2"), "tf32": np.dtype("u4")}
PAIRS = {"f16x2": np.dtype("f2"), "bf16x2": np.dtype("u2")}

Source = tuple[str, object, str]  # kind, key and type of a slot: see Decoder


class RegisterFile:
    """Made once per launch and size of wave, and filled anew for each wave."""

    def __init__(self, sources: list[Source], lanes: int):
        self.lanes = lanes
        registers = list(dict.fromkeys(key for _, key, _ in sources if isinstance(key, Register)))
        by_width: dict[int, list[Register]] = {}
        for register in registers:
            by_width.setdefault(_width(register), []).append(register)
        # One block per width, 0 for predicates: filling a block is one call.
        self._blocks = {
            width: np.zeros((len(group), lanes), bool if width == 0 else f"u{width}")
            for width, group in by_width.items()
        }
        rows = {
            register: self._blocks[width][row]
            for width, group in by_width.items()
            for row, register in enumerate(group)
        }
        self._per_wave: list[tuple[np.ndarray, str, str]] = []  # what a wave gives: array, kind and name
        self._slots = [self._slot(rows, *source) for source in sources]
        self._views: dict[tuple[int, int], list[np.ndarray]] = {}

    def _slot(self, rows: dict[Register, np.ndarray], kind: str, key, type_: str) -> np.ndarray:
        if kind == "register":
            return _seen_as(rows[key], key, type_)
        if kind == "constant":
            return _constant(key, type_)
        array = np.zeros(self.lanes, NUMPY[type_])
        self._per_wave.append((array, kind, key))
        return array

    def reset(self, wave: Wave) -> None:
        """Garbage in the registers, as on the device: what is computed from it must not matter."""
        for width, block in self._blocks.items():
            if width == 0:
                block[:] = False
            else:
                garbage = wave.scheduler.garbage(len(block)) & np.uint64((1 << 8 * width) - 1)
                block[:] = garbage.astype(block.dtype)[:, None]
        for array, kind, name in self._per_wave:
            if kind == "special":
                array[:] = wave.launch.special(wave, name)
            else:
                array[:] = wave.launch.variables[name]

    def all(self, slot: int) -> np.ndarray:
        """Over all lanes."""
        return self._slots[slot]

    def views(self, first: int, last: int) -> list[np.ndarray]:
        """By slot, the lanes from `first` to `last`; constants are of length one."""
        key = (first, last)
        if key not in self._views:
            if len(self._views) > 64:
                self._views.clear()
            self._views[key] = [array if len(array) == 1 else array[first:last] for array in self._slots]
        return self._views[key]


def _width(register: Register) -> int:
    return 0 if register.type == "pred" else TYPE_BYTES[register.type]


def _seen_as(array: np.ndarray, register: Register, type_: str) -> np.ndarray:
    if type_ == "pred" or register.type == "pred":
        if type_ != register.type:
            raise UnsupportedPtx(f"{register.name} as {type_}")
        return array
    if type_ in PAIRS:
        return array.view(PAIRS[type_]).reshape(-1, 2)
    view = array.view(NUMPY[type_])
    return view[:: len(view) // len(array)]  # the low part of a wider register


def _constant(value, type_: str) -> np.ndarray:
    if type_ == "pred":
        return np.array([value != 0])
    if type_ in PAIRS:
        return np.array([value % (1 << 32)], np.uint32).view(PAIRS[type_]).reshape(1, 2)
    bits = 8 * NUMPY[type_].itemsize
    return np.array([value % (1 << bits)], f"u{bits // 8}").view(NUMPY[type_])
