"""Records: a 64-byte header and a row (csrc/include/vista/record.h, docs/row_layout.md), and the keys they lie under.

A key is 16 bytes, user id then model version, both big-endian and the id with its sign bit flipped: bytes compare as
the numbers do, and the versions of a user lie side by side.
"""

from __future__ import annotations

import zlib

import numpy as np

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
    records[:, :HEADER_BYTES] = _as_bytes(headers)
    records[:, HEADER_BYTES:] = rows
    headers["crc32"] = [zlib.crc32(record) for record in records]
    records[:, :HEADER_BYTES] = _as_bytes(headers)
    return records


def check(
    spec: StoreSpec, users: np.ndarray, versions: np.ndarray, headers: np.ndarray, rows: np.ndarray, which: np.ndarray
) -> None:
    """Check that records are whole and belong under their keys.

    Args:
        users, versions: int64 `[n]`, from the keys.
        headers: `HEADER` `[n]`.
        rows: `[n, row_bytes]`.
        which: indices of the records to check.

    Raises:
        RecordError: of the first that is not, naming user, field, expected and found.
    """
    found, expected = headers[which], _expected_headers(spec, users[which], versions[which])
    for name in HEADER.names or ():
        if name in ("event_time", "crc32"):
            continue
        for j in np.flatnonzero(found[name] != expected[name])[:1]:
            problem = f"{name} expected {expected[name][j]}, found {found[name][j]}"
            raise RecordError(int(users[which[j]]), int(versions[which[j]]), problem)
    written = found["crc32"].tolist()
    found["crc32"] = 0
    for i, header, stated in zip(which, _as_bytes(found), written, strict=True):
        crc = zlib.crc32(rows[i], zlib.crc32(header))
        if crc != stated:
            raise RecordError(int(users[i]), int(versions[i]), f"crc32 expected {stated:#010x}, found {crc:#010x}")


def is_newer(spec: StoreSpec, key: bytes, stored: memoryview, event_time: int) -> bool:
    """Whether a stored record is later than `event_time`. A corrupt one is not: a fresh summary may heal it."""
    if len(stored) != HEADER_BYTES + spec.row_bytes:
        return False
    headers = np.frombuffer(stored[:HEADER_BYTES], dtype=HEADER)
    if headers["event_time"][0] <= event_time:
        return False
    try:
        row = np.frombuffer(stored[HEADER_BYTES:], dtype=np.uint8)
        check(spec, *parse_keys([key]), headers, row[None], np.arange(1))
    except RecordError:
        return False
    return True


def _expected_headers(spec: StoreSpec, users: np.ndarray, versions: np.ndarray) -> np.ndarray:
    headers = np.zeros(len(users), dtype=HEADER)
    headers["magic"], headers["format"] = _LAYOUT["magic"], _LAYOUT["format"]
    headers["scheme"] = spec.layout["scheme_id"]
    for name in ("tokens", "dim", "group", "row_bytes"):
        headers[name] = getattr(spec, name)
    headers["user_id"], headers["model_version"] = users, versions
    return headers


def _as_bytes(headers: np.ndarray) -> np.ndarray:
    return headers.view(np.uint8).reshape(len(headers), HEADER_BYTES)
