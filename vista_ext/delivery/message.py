"""Messages: the user id in decimal as key, a record or an erasure as value, byte for byte what a store holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vista_ext.store import Erasures, RecordError, StoreSpec, Summaries, erasure, record


@dataclass(frozen=True)
class Message:
    """A message of one user.

    Args:
        key: the user id, decimal digits with an optional minus.
        value: the record, or the erasure.
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
    """What came out of messages: those that can be used, with their summaries and erasures, each in order, and those
    that cannot."""

    messages: list[Message]
    summaries: Summaries
    erasures: Erasures
    poison: list[Poison]


def encode(spec: StoreSpec, summaries: Summaries) -> list[Message]:
    """A message for each summary."""
    users, versions = summaries.user_ids.numpy(), summaries.versions.numpy()
    records = record.pack(spec, users, versions, summaries.event_times.numpy(), summaries.rows.numpy())
    return [Message(b"%d" % user, value.tobytes()) for user, value in zip(users.tolist(), records, strict=True)]


def encode_erasures(erasures: Erasures) -> list[Message]:
    """A message for each erased user."""
    users, values = erasures.user_ids.numpy(), erasure.pack(erasures.user_ids.numpy(), erasures.until.numpy())
    return [Message(b"%d" % user, value.tobytes()) for user, value in zip(users.tolist(), values, strict=True)]


def decode(spec: StoreSpec, messages: Sequence[Message]) -> Decoded:
    """Check messages and take them apart. Nothing of a message is used before its length, header and checksum fit.

    Args:
        spec: the layout that the records must have; their model versions may be any. Erasures have none.
        messages: from a queue.
    """
    small = [i for i, message in enumerate(messages) if len(message.value) == record.HEADER_BYTES]
    erased, until, not_erasures = erasure.parse([messages[i].value for i in small])
    landing = record.Landing(spec, len(messages))
    landing.take([message.value for message in messages])
    users, times, landing.versions = (
        landing.headers[name].astype(np.int64) for name in ("user_id", "event_time", "model_version")
    )
    size = record.HEADER_BYTES + spec.row_bytes
    problems = {  # of a record that is not whole nobody knows whose it is
        i: str(error) if landing.sizes[i] == size else f"size expected {size} bytes, found {landing.sizes[i]}"
        for i, error in landing.damage(users).items()
    }
    for i, user, at in zip(small, erased.tolist(), until.tolist(), strict=True):
        users[i], times[i], landing.versions[i] = user, at, 0
        del problems[i]
    problems |= {small[i]: problem for i, problem in not_erasures.items()}
    for i, message in enumerate(messages):
        user, version = int(users[i]), int(landing.versions[i])
        if message.key != b"%d" % user:
            problems.setdefault(i, str(RecordError(user, version, f"key expected {user}")))
        if version < 0:
            problem = f"model_version expected below 2^63, found {landing.headers['model_version'][i]}"
            problems.setdefault(i, str(RecordError(user, version, problem)))
    good = [i for i in range(len(messages)) if i not in problems]
    gone = [i for i in small if i not in problems]
    kept = np.setdiff1d(good, gone).astype(np.int64)
    columns = users[kept], landing.rows.numpy()[kept], times[kept], landing.versions[kept]
    poison = [Poison(messages[i], problem) for i, problem in sorted(problems.items())]
    erasures = Erasures(torch.from_numpy(users[gone]), torch.from_numpy(times[gone]))
    return Decoded([messages[i] for i in good], Summaries(*map(torch.from_numpy, columns)), erasures, poison)
