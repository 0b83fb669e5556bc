"""Erasures: what stays of a user who was erased, so that nothing of before comes back (docs/row_layout.md).

An erasure is a record's header alone, flagged, with zeros where the layout of a row would be: 64 bytes that fit every
store and queue, whatever rows they hold. Its event time says until when everything of the user is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vista_ext import _C
from vista_ext.store import record
from vista_ext.store.base import Erasures, RecordError, StoreError

if TYPE_CHECKING:
    from vista_ext.store.environment import Environment

FLAG = 1
# Where a model version stands in the key of a record. No version is as high, so a user's erasure comes last.
VERSION_BYTES = b"\xff" * 8
_PREFIX = b"erased/"  # then the user's part of a key: in LMDB's meta
_COUNT = b"erasures"  # how many there are; not there as long as there were none


def pack(users: np.ndarray, until: np.ndarray) -> np.ndarray:
    """Erasures of int64 `[n]` users: uint8 `[n, 64]`."""
    headers = _expected(users, until)
    headers["crc32"] = _C.record_checksums(record.as_bytes(headers))
    return record.as_bytes(headers)


def parse(values: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Users and times, int64 `[n]`, of n values of 64 bytes, and what is wrong with those that are no erasures."""
    data = np.frombuffer(b"".join(values), dtype=np.uint8).reshape(len(values), record.HEADER_BYTES)
    headers = data.view(record.HEADER).reshape(len(values))
    users, until = headers["user_id"].astype(np.int64), headers["event_time"].astype(np.int64)
    expected = _expected(users, until)
    expected["crc32"] = _C.record_checksums(data)
    problems: dict[int, str] = {}
    for name in record.HEADER.names or ():
        for i in np.flatnonzero(headers[name] != expected[name]).tolist():
            problems.setdefault(i, f"erasure: {name} expected {expected[name][i]}, found {headers[name][i]}")
    return users, until, problems


def checked(where: str, values: Sequence[bytes]) -> Erasures:
    """Stored erasures.

    Raises:
        StoreError: one is damaged. Not a miss: without it, what was erased could come back.
    """
    for value in values:
        if len(value) != record.HEADER_BYTES:
            raise StoreError(f"{where}: erasure: size expected {record.HEADER_BYTES} bytes, found {len(value)}")
    users, until, problems = parse(values)
    for i, problem in problems.items():
        raise RecordError(int(users[i]), 0, problem)
    order = np.argsort(users)
    return Erasures(torch.from_numpy(users[order]), torch.from_numpy(until[order]))


def time_of(value: bytes) -> int:
    """Until when an erasure, which was checked before, reaches."""
    return int(np.frombuffer(value, dtype=record.HEADER)["event_time"][0])


def key_of(user: bytes) -> bytes:
    """Of the erasure in a change feed, from the user's part of a key."""
    return user + VERSION_BYTES


def read(environment: Environment) -> list[bytes]:
    """All erasures of an LMDB environment, by ascending user."""
    found: list[bytes] = []
    with environment.read(environment.meta) as txn:
        cursor = txn.cursor()
        more = cursor.set_range(_PREFIX)
        while more and bytes(cursor.key()).startswith(_PREFIX):
            found.append(bytes(cursor.value()))
            more = cursor.next()
    return found


def get(txn: Any, meta: Any, user: bytes) -> bytes | None:
    """The erasure of a user, from the user's part of a key."""
    value = txn.get(_PREFIX + user, db=meta)
    return None if value is None else bytes(value)


def put(txn: Any, meta: Any, user: bytes, value: bytes) -> bool:
    """Keep an erasure, in a write transaction, unless there is a later one; whether it was kept."""
    stored = get(txn, meta, user)
    if stored is not None and len(stored) == len(value) and time_of(stored) >= time_of(value):
        return False
    txn.put(_PREFIX + user, value, db=meta)
    if stored is None:
        _count(txn, meta, +1)
    return True


def drop(txn: Any, meta: Any, user: bytes) -> None:
    """Forget an erasure, in a write transaction."""
    txn.delete(_PREFIX + user, db=meta)
    _count(txn, meta, -1)


def barrier(txn: Any, meta: Any) -> Callable[[bytes, int], bool]:
    """A function that says, of the user's part of a key and an event time, whether an erasure forbids to write that.
    Where nobody was erased it looks nothing up."""
    if not txn.get(_COUNT, db=meta):
        return lambda user, time: False

    def erased(user: bytes, time: int) -> bool:
        value = get(txn, meta, user)
        return value is not None and time <= int(checked("store", [value]).until[0])

    return erased


def _count(txn: Any, meta: Any, step: int) -> None:
    before = txn.get(_COUNT, db=meta)
    now = (0 if before is None else int.from_bytes(before, "big")) + step
    if now:
        txn.put(_COUNT, now.to_bytes(8, "big"), db=meta)
    else:
        txn.delete(_COUNT, db=meta)


def _expected(users: np.ndarray, until: np.ndarray) -> np.ndarray:
    headers = np.zeros(len(users), dtype=record.HEADER)
    headers["magic"], headers["format"], headers["flags"] = record.MAGIC, record.FORMAT, FLAG
    headers["user_id"], headers["event_time"] = users, until
    return headers
