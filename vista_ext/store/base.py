"""What every summary store offers: the interface, its values, its errors and the checks of its arguments."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from vista_ext import _C
from vista_ext.ops.cache_rows import Scheme
from vista_ext.store.checks import check_choice, check_integer

NEVER = torch.iinfo(torch.int64).min  # until when those are erased who are not
_FORMAT = 1  # of a store: keys, records, and what it publishes of its spec


class StoreError(RuntimeError):
    """The store cannot do what was asked; the message names the store and why."""


class StoreUnavailableError(StoreError):
    """The store does not answer, for now: what a reader may bridge with what it holds."""


class _UsersError(StoreError):
    """An error about some users; all of them are in `user_ids`, the first ones in the message."""

    def __init__(self, user_ids: Sequence[int], of: int, what: str) -> None:
        self.user_ids = list(user_ids)
        first = ", ".join(map(str, self.user_ids[:10])) + (", ..." if len(self.user_ids) > 10 else "")
        super().__init__(f"find: {len(self.user_ids)} of {of} users {what}: {first}")


class MissingUserError(_UsersError):
    """Users were asked for that the store has no summary of."""


class VersionMismatchError(_UsersError):
    """Users were asked for whose summaries are all of other model versions."""


class ExpiredError(_UsersError):
    """Users were asked for whose summaries are older than the reader's policy allows."""


class RecordError(StoreError):
    """A stored record is not what was written: torn, corrupt, or of another layout. `user_id` says whose it is."""

    def __init__(self, user_id: int, model_version: int, problem: str) -> None:
        self.user_id = user_id
        super().__init__(f"record of user {user_id}, model version {model_version}: {problem}")


@dataclass(frozen=True)
class ReadPolicy:
    """What a reader does about a summary that it cannot use as it is. The same for every store and cache.

    Args:
        on_miss: a user without a summary: "raise", or "flag" it in `Found.hits` (its row is zeros). Whatever else is
            made a miss below is treated by this, too.
        on_version_mismatch: a user who has summaries, but none of the model version asked for: "raise", treat as a
            "miss", or "accept" the newest version there is (`Found.versions` says which).
        on_damage: a record that is torn, corrupt or of another layout: "raise", or treat as a "miss"
            (`Found.damaged`; logged as a warning).
        max_age: seconds that a summary's event time may lie in the past, of whatever version it is; None for no limit.
        on_expired: an older summary: "raise", or treat as a "miss" (`Found.expired`).
        on_unavailable: a server that does not answer: "raise", or treat as a "miss" of all (`Found.unavailable`).

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """

    on_miss: Literal["raise", "flag"] = "raise"
    on_version_mismatch: Literal["raise", "miss", "accept"] = "raise"
    on_damage: Literal["raise", "miss"] = "raise"
    max_age: int | None = None
    on_expired: Literal["raise", "miss"] = "miss"
    on_unavailable: Literal["raise", "miss"] = "raise"

    def __post_init__(self) -> None:
        check_choice("policy", "on_miss", self.on_miss, ("raise", "flag"))
        check_choice("policy", "on_version_mismatch", self.on_version_mismatch, ("raise", "miss", "accept"))
        check_choice("policy", "on_damage", self.on_damage, ("raise", "miss"))
        check_choice("policy", "on_expired", self.on_expired, ("raise", "miss"))
        check_choice("policy", "on_unavailable", self.on_unavailable, ("raise", "miss"))
        if self.max_age is not None:
            check_integer("policy", "max_age", self.max_age, 0)


STRICT = ReadPolicy()


@dataclass(frozen=True)
class StoreSpec:
    """What a store holds.

    Args:
        scheme, tokens, dim, group: layout of the rows, as in `ops.quantize_rows`; `group` None becomes the default.
        model_version: of the model that makes the summaries, 0 to 2^63 - 1. Vectors of two models do not mix.
        extra: whatever else a reader should know, such as the checkpoint's name; must survive JSON.

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """

    scheme: Scheme
    tokens: int
    dim: int
    group: int | None = None
    model_version: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, limit in [("tokens", self.tokens, 32), ("dim", self.dim, 32), ("group", self.group or 1, 32)]:
            check_integer("spec", name, value, 1, 2**limit - 1)
        check_integer("spec", "model_version", self.model_version, 0)
        layout = _C.row_layout(self.scheme, self.tokens, self.dim, self.group or 0)
        if layout["row_bytes"] >= 2**31:
            raise ValueError(f"spec: a row must be smaller than 2 GiB, found {layout['row_bytes']} bytes")
        object.__setattr__(self, "group", layout["group"])
        try:
            survives = json.loads(json.dumps(self.extra)) == self.extra
        except (TypeError, ValueError):
            survives = False
        if not isinstance(self.extra, dict) or not survives:
            raise ValueError(f"spec: extra must be a dict that survives JSON, found {self.extra!r}")

    @property
    def layout(self) -> dict[str, Any]:
        """The byte layout of a row (`_C.row_layout`)."""
        return _C.row_layout(self.scheme, self.tokens, self.dim, self.group or 0)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, a multiple of 128."""
        return int(self.layout["row_bytes"])

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StoreSpec:
        """The inverse of `to_dict`; other keys than a spec's are a ValueError."""
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise ValueError(f"spec: expected the keys {sorted(known)}, found {sorted(values)}")
        return cls(**values)

    def to_json(self) -> bytes:
        """As a store publishes it."""
        return json.dumps({"format": _FORMAT} | self.to_dict()).encode()

    @classmethod
    def from_json(cls, text: bytes, where: str) -> StoreSpec:
        """What a store has published; a StoreError that says where if it cannot be read."""
        try:
            values = json.loads(text)
            found = values.pop("format", None)
            if found != _FORMAT:
                raise ValueError(f"format expected {_FORMAT}, found {found!r}")
            return cls.from_dict(values)
        except (ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"{where}: its spec cannot be read: {error}") from error

    def for_reader(self, wanted: StoreSpec | None, where: str) -> StoreSpec:
        """With which spec to open a store that has published this one.

        Args:
            wanted: what the caller can read, of any model version; None: as published.

        Raises:
            StoreError: naming what differs, what was expected and what was found.
        """
        if wanted is None:
            return self
        wanted.require_layout_of(self, where)
        if wanted.model_version == self.model_version:
            for name, value in wanted.extra.items():
                found = self.extra.get(name)
                if found != value:
                    raise StoreError(f"{where}: extra[{name!r}]: expected {value!r}, found {found!r}")
        return wanted

    def require_layout_of(self, found: StoreSpec, where: str) -> None:
        """Check that rows of `found` can be read as rows of this spec.

        Raises:
            StoreError: naming what differs, what was expected and what was found.
        """
        for name in ("scheme", "tokens", "dim", "group"):
            if getattr(self, name) != getattr(found, name):
                raise StoreError(f"{where}: {name}: expected {getattr(self, name)!r}, found {getattr(found, name)!r}")


@dataclass(frozen=True)
class Found:
    """What `find` found for n users, in the order they were asked for.

    Args:
        rows: uint8 `[n, row_bytes]`, contiguous: `ops.dequantize_rows` reads it as it is. Zeros where there is no hit.
        hits: bool `[n]`.
        event_times: int64 `[n]`, seconds: how fresh each summary is; -1 where there is no hit.
        versions: int64 `[n]`, the model version of each summary; -1 where there is no hit.
        damaged, expired: bool `[n]`, why there is no hit although something is stored (`ReadPolicy`).
        unavailable: bool `[n]`, there is no hit because the store did not answer.
    """

    rows: Tensor
    hits: Tensor
    event_times: Tensor
    versions: Tensor
    damaged: Tensor
    expired: Tensor
    unavailable: Tensor


@dataclass(frozen=True)
class Summaries:
    """n stored summaries: `user_ids`, `event_times`, `versions` int64 `[n]`, `rows` uint8 `[n, row_bytes]`."""

    user_ids: Tensor
    rows: Tensor
    event_times: Tensor
    versions: Tensor

    def __len__(self) -> int:
        return self.user_ids.shape[0]


@dataclass(frozen=True)
class Erasures:
    """n erased users: `user_ids`, `until` int64 `[n]`, seconds. Nothing of a user with an event time up to `until` is
    kept, or accepted from anybody."""

    user_ids: Tensor
    until: Tensor

    def __len__(self) -> int:
        return self.user_ids.shape[0]

    def until_of(self, user_ids: Tensor) -> Tensor:
        """int64 `[m]`: until when users (int64 `[m]`) are erased, `NEVER` for the others; `self.user_ids` ascend."""
        if not len(self):
            return torch.full_like(user_ids, NEVER)
        at = torch.searchsorted(self.user_ids, user_ids).clamp(max=len(self) - 1)
        return torch.where(self.user_ids[at] == user_ids, self.until[at], NEVER)


class Reader(Protocol):
    """What a cache can stand in front of: a store, or another cache."""

    @property
    def spec(self) -> StoreSpec:
        """What it holds."""

    def find(self, user_ids: Tensor, policy: ReadPolicy = STRICT, *, out: Tensor | None = None) -> Found:
        """As `SummaryStore.find`."""


class SummaryStore(ABC):
    """Quantized summaries by user id and model version. All calls are batched; a context manager closes the store.

    Tensors are on the CPU. A bad argument is a `ValueError` that names it, what was expected and what was found.
    """

    spec: StoreSpec

    @abstractmethod
    def find(self, user_ids: Tensor, policy: ReadPolicy = STRICT, *, out: Tensor | None = None) -> Found:
        """Read the summaries of some users. A record's header and checksum are checked before its row is handed out.

        Args:
            user_ids: int64 `[n]`, in any order, repeats allowed.
            policy: what to do about what cannot be used as it is.
            out: contiguous uint8 `[n, row_bytes]` to read into, pinned perhaps; `Found.rows` is this then.

        Raises:
            MissingUserError, VersionMismatchError, ExpiredError: naming the first such users, and how many there are.
            RecordError: a record that was read is torn or corrupt.
            StoreUnavailableError: a server does not answer.
        """

    @abstractmethod
    def insert(self, user_ids: Tensor, rows: Tensor, event_times: Tensor, *, newest_wins: bool = True) -> int:
        """Write summaries of `spec.model_version`, replacing those of the same users.

        Args:
            user_ids: int64 `[n]`; of equal ids the newest event time is written, the last one of those that tie.
            rows: uint8 `[n, row_bytes]` from `ops.quantize_rows`.
            event_times: int64 `[n]`, seconds.
            newest_wins: leave a stored summary alone if its event time is later; otherwise the last writer wins.

        Returns:
            How many summaries were written. They are durable when this returns, and only then known to be.
        """

    @abstractmethod
    def update(self, user_ids: Tensor, rows: Tensor, event_times: Tensor, *, newest_wins: bool = True) -> int:
        """`insert`, but only for users who have a summary of `spec.model_version`."""

    @abstractmethod
    def erase(self, user_ids: Tensor, until: Tensor | None = None) -> int:
        """Remove summaries of some users, of every model version.

        Args:
            user_ids: int64 `[n]`.
            until: int64 `[n]`, seconds. Summaries with an event time up to then are removed, and an erasure is kept:
                whatever writes this store, such a summary is not written again, and what reads its feed or takes a
                snapshot learns of it. None: all summaries that are here now, and nothing is kept or passed on.

        Returns:
            How many summaries were removed.
        """

    @abstractmethod
    def erasures(self) -> Erasures:
        """What was erased for good, by ascending user id."""

    @abstractmethod
    def drop_erasures(self, before: int) -> int:
        """Forget erasures until moments earlier than `before`, once nothing that old can come any more: after the
        retention of every queue and snapshot. Returns how many."""

    @abstractmethod
    def save_snapshot(self, path: Path | str) -> None:
        """Write a consistent copy to `path`, which must not exist; it is there completely or not at all."""

    @abstractmethod
    def load_snapshot(self, path: Path | str) -> int:
        """Merge a snapshot of the same layout into this store, newest event time wins; returns how many it wrote."""

    def add(self, summaries: Summaries) -> int:
        """Write summaries that came from elsewhere, in any order and more than once: the newest event time wins.

        They keep their model versions, each beside the others. This default is for a store that keeps only its own
        version: a summary of another one is a StoreError.

        Returns:
            How many it wrote, durable when this returns; the others were older than what is there.
        """
        other = summaries.versions[summaries.versions != self.spec.model_version]
        if len(other):
            expected = self.spec.model_version
            raise StoreError(f"add: model version expected {expected}, found {int(other[0])}")
        return self.insert(summaries.user_ids, summaries.rows, summaries.event_times)

    @abstractmethod
    def __iter__(self) -> Iterator[Summaries]:
        """All summaries of every model version in batches, by ascending user id and version.

        Each batch is consistent; the store may be written between two batches.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of summaries, of every model version."""

    @abstractmethod
    def close(self) -> None:
        """Give the store's resources back; closing twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
