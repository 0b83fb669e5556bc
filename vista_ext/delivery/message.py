"""Messages: the user id in decimal as key, the record of `store.record` as value, byte for byte what a store holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vista_ext.store import RecordError, StoreSpec, Summaries, record


@dataclass(frozen=True)
class Message:
    """A message of one user.

    Args:
        key: the user id, decimal digits with an optional minus.
        value: the record.
        where: its place in the queue it came from, for reports.
    """

    key: bytes
    value: bytes
    where: str = ""


@dataclass(frozen=True)
class Poison:
    """A message that cannot be used, and what is wrong with it."""

    message: Message
    problem: str

    def __str__(self) -> str:
        # A key may be any bytes of any length: what is shown of it is neither.
        return f"{self.message.where}: key {self.message.key[:24]!r}: {self.problem}"


class PoisonError(RuntimeError):
    """Messages that cannot be used; all are in `poison`, the first in the message."""

    def __init__(self, poison: Sequence[Poison], of: int) -> None:
        self.poison = list(poison)
        super().__init__(f"{len(poison)} of {of} messages cannot be used, such as {poison[0]}")


@dataclass(frozen=True)
class Decoded:
    """What came out of messages: those that can be used with their summaries, in order, and those that cannot."""

    messages: list[Message]
    summaries: Summaries
    poison: list[Poison]


def encode(spec: StoreSpec, summaries: Summaries) -> list[Message]:
    """A message for each summary."""
    users, versions = summaries.user_ids.numpy(), summaries.versions.numpy()
    records = record.pack(spec, users, versions, summaries.event_times.numpy(), summaries.rows.numpy())
    return [Message(b"%d" % user, value.tobytes()) for user, value in zip(users.tolist(), records, strict=True)]


def decode(spec: StoreSpec, messages: Sequence[Message]) -> Decoded:
    """Check messages and take them apart. Nothing of a message is used before its length, header and checksum fit.

    Args:
        spec: the layout that the records must have; their model versions may be any.
        messages: from a queue.
    """
    size = record.HEADER_BYTES + spec.row_bytes
    problems = {
        i: f"size expected {size} bytes, found {len(m.value)}" for i, m in enumerate(messages) if len(m.value) != size
    }
    whole = [i for i in range(len(messages)) if i not in problems]
    fits = [messages[i] for i in whole]
    headers, rows = _parts(spec, fits)
    try:
        _check(spec, fits, headers, rows, range(len(fits)))
    except RecordError:  # find out which
        for j, i in enumerate(whole):
            try:
                _check(spec, fits, headers, rows, [j])
            except RecordError as error:
                problems[i] = str(error)
        good = [j for j, i in enumerate(whole) if i not in problems]
        fits, headers, rows = [fits[j] for j in good], headers[good], rows[good]
    columns = (headers[name].astype(np.int64) for name in ("user_id", "event_time", "model_version"))
    users, times, versions = map(torch.from_numpy, columns)
    poison = [Poison(messages[i], problem) for i, problem in sorted(problems.items())]
    return Decoded(fits, Summaries(users, torch.from_numpy(rows), times, versions), poison)


def _parts(spec: StoreSpec, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    data = bytearray().join(m.value for m in messages)
    records = np.frombuffer(data, dtype=np.uint8).reshape(len(messages), record.HEADER_BYTES + spec.row_bytes)
    headers = np.ascontiguousarray(records[:, : record.HEADER_BYTES]).reshape(-1).view(record.HEADER)
    return headers, np.ascontiguousarray(records[:, record.HEADER_BYTES :])


def _check(
    spec: StoreSpec, messages: Sequence[Message], headers: np.ndarray, rows: np.ndarray, which: Sequence[int]
) -> None:
    users, versions = np.ascontiguousarray(headers["user_id"]), headers["model_version"].astype(np.int64)
    for i in which:
        if messages[i].key != b"%d" % users[i]:
            raise RecordError(int(users[i]), int(versions[i]), f"key expected {users[i]}")
        if versions[i] < 0:
            problem = f"model_version expected below 2^63, found {headers['model_version'][i]}"
            raise RecordError(int(users[i]), int(versions[i]), problem)
    record.check(spec, users, versions, headers, rows, np.array(which, dtype=np.int64))
