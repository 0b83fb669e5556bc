"""Records: a 64-byte header and a row (csrc/include/vista/record.h, docs/row_layout.md), and the keys they lie under.

A key is 16 bytes, user id then model version, both big-endian and the id with its sign bit flipped: bytes compare as
the numbers do, and the versions of a user lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vista_ext import _C
from vista_ext.store.base import RecordError, StoreSpec

_LAYOUT = _C.record_header_layout()
HEADER_BYTES: int = _LAYOUT["bytes"]
HEADER = np.dtype(
    {
        "names": [name for name, _, _ in _LAYOUT["fields"]],
        "formats": [kind for _, kind, _ in _LAYOUT["fields"]],
        "offsets": [offset for _, _, offset in _LAYOUT["fields"]],
        "itemsize": HEADER_BYTES,
    }
)
MAGIC, FORMAT = _LAYOUT["magic"], _LAYOUT["format"]
KEY_BYTES = 16
_SIGN = np.uint64(1 << 63)


def keys(users: np.ndarray, versions: np.ndarray) -> list[bytes]:
    """The keys of int64 `[n]` user ids and model versions."""
    table = np.empty((len(users), 2), dtype=">u8")
    table[:, 0] = users.view(np.uint64) ^ _SIGN
    table[:, 1] = versions.view(np.uint64)
    data = table.tobytes()
    return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]


def parse_keys(packed: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """User ids and model versions, int64 `[n]` each: the inverse of `keys`."""
    table = np.frombuffer(b"".join(packed), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return (table[:, 0] ^ _SIGN).view(np.int64), np.ascontiguousarray(table[:, 1]).view(np.int64)


def pack(
    spec: StoreSpec, users: np.ndarray, versions: np.ndarray, event_times: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Records of `[n, row_bytes]` rows: uint8 `[n, 64 + row_bytes]`."""
    headers = _expected_headers(spec, users, versions)
    headers["event_time"] = event_times
    records = np.empty((len(users), HEADER_BYTES + spec.row_bytes), dtype=np.uint8)
    records[:, :HEADER_BYTES] = as_bytes(headers)
    records[:, HEADER_BYTES:] = rows
    headers["crc32"] = _C.record_checksums(records)
    records[:, :HEADER_BYTES] = as_bytes(headers)
    return records


class Landing:
    """Where n fetched records are taken apart, and what was found of each before anybody trusts it.

    Args:
        spec: of the store.
        n: how many records were asked for.
        rows: uint8 `[n, row_bytes]` to read into; made here if None.

    Attributes:
        headers: `HEADER` `[n]`; rows: uint8 `[n, row_bytes]`, a tensor. Zeros where there is no whole record.
        versions: int64 `[n]`, from the keys, -1 for no record.
        sizes: int64 `[n]`, bytes of what was found, -1 for no record.
        checksums: uint32 `[n]`, of what was found.
    """

    def __init__(self, spec: StoreSpec, n: int, rows: Tensor | None = None) -> None:
        self.spec = spec
        self.rows = torch.empty((n, spec.row_bytes), dtype=torch.uint8) if rows is None else rows
        self.versions = np.full(n, -1, dtype=np.int64)
        self.sizes = np.full(n, -1, dtype=np.int64)
        self.checksums = np.zeros(n, dtype=np.uint32)
        self.header_bytes = np.zeros((n, HEADER_BYTES), dtype=np.uint8)
        self.headers = self.header_bytes.view(HEADER).reshape(n)

    def take(self, values: Sequence[bytes | memoryview | None], first: int = 0) -> None:
        """Take records apart, None for one that there is not. They land from index `first` on."""
        part = slice(first, first + len(values))
        parts = self.header_bytes[part], self.rows.numpy()[part], self.sizes[part], self.checksums[part]
        _C.unpack_records(values, *parts)

    def damage(self, users: np.ndarray) -> dict[int, RecordError]:
        """What is wrong with the records that are not whole or do not belong under their keys, by index.

        Args:
            users: int64 `[n]`, from the keys.
        """
        found: dict[int, RecordError] = {}
        expected = _expected_headers(self.spec, users, self.versions)
        right_size = HEADER_BYTES + self.spec.row_bytes
        present = self.sizes >= 0

        def compare(name: str, wanted: np.ndarray, have: np.ndarray, form: str = "", unit: str = "") -> None:
            for i in np.flatnonzero(present & (wanted != have)).tolist():
                problem = f"{name} expected {wanted[i]:{form}}{unit}, found {have[i]:{form}}"
                found.setdefault(i, RecordError(int(users[i]), int(self.versions[i]), problem))

        compare("size", np.full_like(self.sizes, right_size), self.sizes, unit=" bytes")
        for name in HEADER.names or ():
            if name not in ("event_time", "crc32"):
                compare(name, expected[name], self.headers[name])
        compare("crc32", self.headers["crc32"], self.checksums, form="#010x")
        return found


def is_newer(spec: StoreSpec, key: bytes, stored: memoryview, event_time: int) -> bool:
    """Whether a stored record is later than `event_time`. A corrupt one is not: a fresh summary may heal it."""
    if len(stored) != HEADER_BYTES + spec.row_bytes:
        return False
    if np.frombuffer(stored[:HEADER_BYTES], dtype=HEADER)["event_time"][0] <= event_time:
        return False
    landing = Landing(spec, 1)
    landing.take([stored])
    user, landing.versions = parse_keys([key])
    return not landing.damage(user)


def in_key_order(users: np.ndarray, versions: np.ndarray, times: np.ndarray, newest_wins: bool) -> np.ndarray:
    """Indices of what to write of a batch, by ascending key, each key once: its newest summary, or just its last."""
    order = np.lexsort((times, versions, users) if newest_wins else (versions, users))
    last = np.ones(len(order), dtype=bool)
    last[:-1] = (np.diff(users[order]) != 0) | (np.diff(versions[order]) != 0)
    return order[last]


def _expected_headers(spec: StoreSpec, users: np.ndarray, versions: np.ndarray) -> np.ndarray:
    headers = np.zeros(len(users), dtype=HEADER)
    headers["magic"], headers["format"] = MAGIC, FORMAT
    headers["scheme"] = spec.layout["scheme_id"]
    for name in ("tokens", "dim", "group", "row_bytes"):
        headers[name] = getattr(spec, name)
    headers["user_id"], headers["model_version"] = users, versions
    return headers


def as_bytes(headers: np.ndarray) -> np.ndarray:
    """`HEADER` `[n]` as uint8 `[n, 64]`."""
    return headers.view(np.uint8).reshape(len(headers), HEADER_BYTES)
