"""Additive states of stage 1, kept where refreshes run: what new events are added to instead of reading all again.

A folder with an LMDB environment of its own, apart from the summaries, which are much smaller and travel. Keys are
those of the summaries (record.py); a value is `HEADER` and the float32 state, little-endian. It can always be computed
anew, so a damaged one is just not there.
"""

from __future__ import annotations

import json
import logging
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vista_ext.store import record
from vista_ext.store.base import StoreError
from vista_ext.store.checks import check_integer, check_tensor
from vista_ext.store.environment import Environment

log = logging.getLogger(__name__)

HEADER = np.dtype([("crc32", "<u4"), ("updates", "<u4"), ("events", "<i8"), ("event_time", "<i8")])
_BATCH_BYTES = 32 << 20  # of a transaction


@dataclass(frozen=True)
class StateSpec:
    """What a store of states holds.

    Args:
        layers, heads, head_dim: float32 `[layers, heads, head_dim, head_dim]` a user.
        model_version: of the model that made them; of another one they are not found.
    """

    layers: int
    heads: int
    head_dim: int
    model_version: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_dim"):
            check_integer("states", name, getattr(self, name), 1, 2**16)
        check_integer("states", "model_version", self.model_version, 0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a user's state."""
        return self.layers, self.heads, self.head_dim, self.head_dim

    @property
    def value_bytes(self) -> int:
        """Bytes of a user."""
        return HEADER.itemsize + 4 * self.layers * self.heads * self.head_dim**2

    def to_json(self) -> bytes:
        """As a store publishes it."""
        return json.dumps({"states": 1, **asdict(self)}).encode()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> StateSpec:
        """What a store has published; a StoreError that says where if it is not a spec of states."""
        try:
            values = json.loads(text)
            if values.pop("states", None) != 1 or set(values) != {f.name for f in fields(cls)}:
                raise ValueError("it is not a store of states")
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"{where}: its spec cannot be read: {error}") from error


@dataclass(frozen=True)
class States:
    """States of n users.

    Args:
        values: float32 `[n, layers, heads, head_dim, head_dim]`; zeros where there is none.
        events: int64 `[n]`, how many are in it.
        updates: int64 `[n]`, how often events were added since the history was read as a whole.
        event_times: int64 `[n]`, seconds: all earlier events are in it.
        hits: bool `[n]`, who has one.
    """

    values: Tensor
    events: Tensor
    updates: Tensor
    event_times: Tensor
    hits: Tensor


class StateStore:
    """States in a folder; several processes may write. Made by `open`."""

    def __init__(self, environment: Environment, spec: StateSpec) -> None:
        self._environment, self.spec = environment, spec
        self._batch = max(1, _BATCH_BYTES // spec.value_bytes)

    @classmethod
    def open(cls, path: Path | str, spec: StateSpec, map_size: int = 1 << 30) -> StateStore:
        """Open the store at a path for reading and writing, made if it is not there yet.

        Args:
            spec: of the caller's model. The shape must be the store's; states of other model versions stay beside.
            map_size: bytes of address space of a new store; it doubles when full.

        Raises:
            StoreError: something else is there, or states of another shape.
        """
        folder = Path(path)
        if not folder.exists():
            try:
                Environment.create(folder, spec, map_size)
            except StoreError:
                if not folder.exists():  # else another process was faster
                    raise
        environment = Environment(folder, readonly=False)
        try:
            found = StateSpec.from_json(environment.published(), f"states {folder}")
            if found.shape != spec.shape:
                raise StoreError(f"states {folder}: shape: expected {list(spec.shape)}, found {list(found.shape)}")
        except BaseException:
            environment.close()
            raise
        return cls(environment, spec)

    def find(self, user_ids: Tensor) -> States:
        """The states of int64 `[n]` users; whose is not there, or damaged, is not a hit."""
        users = check_tensor("find", "user_ids", user_ids, torch.int64, (None,))
        values = np.zeros((len(users), self.spec.value_bytes), np.uint8)
        hits = np.zeros(len(users), bool)
        keys = self._keys(users)
        for begin in range(0, len(users), self._batch):
            with self._environment.read() as txn:
                for i, key in enumerate(keys[begin : begin + self._batch], begin):
                    found = txn.get(key)
                    if found is not None and len(found) == self.spec.value_bytes:
                        values[i] = np.frombuffer(found, np.uint8)
                        hits[i] = True
                    elif found is not None:
                        self._damaged(users[i])
        for i in np.flatnonzero(hits).tolist():
            if _checksum(keys[i], values[i]) != values[i, : HEADER.itemsize].view(HEADER)["crc32"][0]:
                self._damaged(users[i])
                values[i], hits[i] = 0, False
        headers = np.ascontiguousarray(values[:, : HEADER.itemsize]).view(HEADER).reshape(len(users))
        events, updates, event_times = (
            torch.from_numpy(headers[name].astype(np.int64)) for name in ("events", "updates", "event_time")
        )
        states = torch.from_numpy(values[:, HEADER.itemsize :].copy().view("<f4")).view(len(users), *self.spec.shape)
        return States(states, events, updates, event_times, torch.from_numpy(hits))

    def insert(self, user_ids: Tensor, values: Tensor, events: Tensor, updates: Tensor, event_times: Tensor) -> int:
        """Keep states, durably; one that is there and later stays. Returns how many were written.

        Args:
            user_ids: int64 `[n]`, each once.
            values, events, updates, event_times: of them, as in `States`.
        """
        users = check_tensor("insert", "user_ids", user_ids, torch.int64, (None,))
        table = check_tensor("insert", "values", values, torch.float32, (len(users), *self.spec.shape))
        headers = np.zeros(len(users), HEADER)
        columns = {"events": events, "updates": updates, "event_time": event_times}
        for name, column in columns.items():
            headers[name] = check_tensor("insert", name, column, torch.int64, (len(users),))
        packed = np.empty((len(users), self.spec.value_bytes), np.uint8)
        packed[:, : HEADER.itemsize] = headers.view(np.uint8).reshape(len(users), HEADER.itemsize)
        packed[:, HEADER.itemsize :] = table.view(np.uint8).reshape(packed[:, HEADER.itemsize :].shape)
        keys = self._keys(users)
        sums = np.array([_checksum(key, value) for key, value in zip(keys, packed, strict=True)], "<u4")
        packed[:, :4] = sums.view(np.uint8).reshape(len(users), 4)

        def put(txn: Any, order: list[int]) -> int:
            written = 0
            for i in order:
                stored = txn.get(keys[i])
                if stored is None or not self._is_later(keys[i], stored, int(headers["event_time"][i])):
                    txn.put(keys[i], packed[i])
                    written += 1
            return written

        order = sorted(range(len(users)), key=keys.__getitem__)
        parts = (order[begin : begin + self._batch] for begin in range(0, len(order), self._batch))
        return sum(self._environment.write(put, part) for part in parts)

    def erase(self, user_ids: Tensor, until: Tensor) -> int:
        """Remove what erasures cover: states of int64 `[n]` users, of every model version, that have read no further
        than int64 `[n]` moments, and damaged ones. Returns how many there were."""
        users = check_tensor("erase", "user_ids", user_ids, torch.int64, (None,))
        times = check_tensor("erase", "until", until, torch.int64, (len(users),))

        def delete(txn: Any, begin: int) -> int:
            cursor, covered = txn.cursor(), []
            for key, time in zip(keys[begin : begin + self._batch], times[begin : begin + self._batch], strict=True):
                more = cursor.set_range(key[:8])
                while more and bytes(cursor.key()[:8]) == key[:8]:
                    if not self._is_later(bytes(cursor.key()), cursor.value(), int(time)):
                        covered.append(bytes(cursor.key()))
                    more = cursor.next()
            return sum(map(txn.delete, covered))

        keys = self._keys(users)
        return sum(self._environment.write(delete, begin) for begin in range(0, len(users), self._batch))

    def __len__(self) -> int:
        return self._environment.entries()

    def close(self) -> None:
        """Give the environment back; closing twice is fine."""
        self._environment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _keys(self, users: np.ndarray) -> list[bytes]:
        return record.keys(users, np.full(len(users), self.spec.model_version, np.int64))

    def _is_later(self, key: bytes, stored: Any, event_time: int) -> bool:
        """Whether a stored state is sound and later."""
        if len(stored) != self.spec.value_bytes:
            return False
        value = np.frombuffer(stored, np.uint8)
        header = value[: HEADER.itemsize].view(HEADER)[0]
        return bool(header["event_time"] > event_time and header["crc32"] == _checksum(key, value))

    def _damaged(self, user: int) -> None:
        log.warning("states %s: the state of user %d is damaged: it is computed anew", self._environment.path, user)


def _checksum(key: bytes, value: np.ndarray) -> int:
    return zlib.crc32(value[4:], zlib.crc32(key))
