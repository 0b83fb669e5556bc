"""What a model reads: packed histories, the candidates of requests, and labels."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureSchema:
    """The columns of a data set and how many values each has. Value 0 of an item feature, and item 0, mean unknown.

    Args:
        num_items: items have the ids 1 to `num_items`.
        num_actions: actions have the codes 0 to `num_actions - 1`.
        item_features: number of values of each categorical item feature.
        context: number of values of each categorical feature of a request's row.
        tasks: names of the labels; the first is the main one.
    """

    num_items: int
    num_actions: int
    item_features: dict[str, int] = field(default_factory=dict)
    context: dict[str, int] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("label",)

    def __post_init__(self) -> None:
        counts = {"num_items": self.num_items, "num_actions": self.num_actions, **self.item_features, **self.context}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"schema: {name} must be a number of values of at least 1, found {count!r}")
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"schema: tasks must be different names, at least one, found {self.tasks}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"tasks": list(self.tasks)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FeatureSchema:
        """The inverse of `to_dict`; other keys than a schema's are a ValueError."""
        known = {f.name for f in fields(cls)}
        if set(values) - known or {"num_items", "num_actions"} - set(values):
            raise ValueError(f"schema: expected the keys {sorted(known)}, found {sorted(values)}")
        return cls(**values)


@dataclass(frozen=True)
class Histories:
    """Event histories of n users, packed, oldest event first.

    Args:
        seq_offsets: int64 `[n + 1]`.
        max_seq_len: at least the longest history.
        items, actions, timestamps: int64 `[total]`; timestamps in seconds.
        now: int64 `[n]`, seconds: the moment at which each history is read.
    """

    seq_offsets: Tensor
    max_seq_len: int
    items: Tensor
    actions: Tensor
    timestamps: Tensor
    now: Tensor

    def __len__(self) -> int:
        return self.seq_offsets.shape[0] - 1

    def to(self, device: torch.device | str) -> Histories:
        """With all tensors on a device."""
        return _to(self, device)

    def check(self) -> None:
        """Refuse histories whose parts do not fit each other; nothing is looked at while compiling.

        Raises:
            ValueError: naming the part, what was expected and what was found.
        """
        if torch.compiler.is_compiling():
            return
        total = self.items.shape[0] if self.items.dim() else 0
        for name in ("items", "actions", "timestamps"):
            _check_integers(f"histories.{name}", getattr(self, name), (total,))
        _check_offsets("histories.seq_offsets", self.seq_offsets, total, "histories.max_seq_len", self.max_seq_len)
        _check_integers("histories.now", self.now, (len(self),))

    def rows(self, begin: int, end: int) -> Histories:
        """The users `begin` to `end`, as views."""
        offsets = self.seq_offsets[begin : end + 1]
        events = slice(int(offsets[0]), int(offsets[-1]))
        return Histories(
            offsets - offsets[0],
            int(offsets.diff().max()) if end > begin else 0,
            self.items[events],
            self.actions[events],
            self.timestamps[events],
            self.now[begin:end],
        )

    def suffix(self, most: int) -> Histories:
        """The last `most` events of each user."""
        lengths = self.seq_offsets.diff()
        kept = lengths.clamp(max=most)
        offsets = torch.zeros_like(self.seq_offsets)
        torch.cumsum(kept, 0, out=offsets[1:])
        first = self.seq_offsets[1:] - kept
        index = torch.arange(int(offsets[-1]), device=kept.device) + torch.repeat_interleave(first - offsets[:-1], kept)
        return Histories(
            offsets,
            min(self.max_seq_len, most),
            self.items[index],
            self.actions[index],
            self.timestamps[index],
            self.now,
        )


@dataclass(frozen=True)
class Candidates:
    """The items to score in each request, packed.

    Args:
        offsets: int64 `[requests + 1]`.
        max_len: at least the longest request.
        items: int64 `[m]`.
        context: int64 `[m, features]`, columns as in `FeatureSchema.context`.
    """

    offsets: Tensor
    max_len: int
    items: Tensor
    context: Tensor

    def check(self, kv_index: Tensor, users: int | None) -> None:
        """Refuse candidates whose parts do not fit each other; nothing is looked at while compiling.

        Args:
            kv_index: of the requests.
            users: how many there are for `kv_index` to choose from; None if it may name nobody.

        Raises:
            ValueError, IndexError: naming the part, what was expected and what was found.
        """
        if torch.compiler.is_compiling():
            return
        total = self.items.shape[0] if self.items.dim() else 0
        _check_integers("candidates.items", self.items, (total,))
        _check_integers("candidates.context", self.context, (total, *self.context.shape[1:2]))
        _check_offsets("candidates.offsets", self.offsets, total, "candidates.max_len", self.max_len)
        _check_integers("kv_index", kv_index, (self.offsets.shape[0] - 1,))
        if users is not None:
            check_range("kv_index", kv_index, users - 1)

    def to(self, device: torch.device | str) -> Candidates:
        """With all tensors on a device."""
        return _to(self, device)


@dataclass(frozen=True)
class Batch:
    """Labelled requests.

    Args:
        histories: of the batch.
        candidates: of the batch's requests.
        kv_index: int64 `[requests]`, the history that each request reads.
        labels: float32 `[m, tasks]`.
        users, timestamps: int64 `[m]`, of each candidate.
    """

    histories: Histories
    candidates: Candidates
    kv_index: Tensor
    labels: Tensor
    users: Tensor
    timestamps: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """With all tensors on a device."""
        return _to(self, device)


def check_range(name: str, values: Tensor, last: int) -> None:
    """An IndexError unless all values are from 0 to `last`. On a device it would have to wait for the values, so only
    the host's are looked at, and none while compiling."""
    if torch.compiler.is_compiling() or values.device.type != "cpu" or not values.numel():
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > last:
        raise IndexError(f"{name} must be in [0, {last}], found {low if low < 0 else high}")


def _check_integers(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if values.dtype not in (torch.int64, torch.int32) or tuple(values.shape) != shape:
        raise ValueError(f"{name} must be integers {list(shape)}, found {values.dtype} {list(values.shape)}")


def _check_offsets(name: str, offsets: Tensor, total: int, longest_name: str, longest: int) -> None:
    if offsets.dim() != 1 or not offsets.numel():
        raise ValueError(f"{name} must be integers [n + 1], found {list(offsets.shape)}")
    _check_integers(name, offsets, (offsets.shape[0],))
    if offsets.device.type != "cpu":
        return
    first, last, lengths = int(offsets[0]), int(offsets[-1]), offsets.diff()
    if first != 0 or last != total:
        raise ValueError(f"{name} must go from 0 to {total}, the number of items, found {first} to {last}")
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"{name} must not decrease, found a step of {int(lengths.min())}")
    if lengths.numel() and int(lengths.max()) > longest:
        raise ValueError(f"{longest_name} must be at least the longest, {int(lengths.max())}, found {longest}")


def _to(value: Any, device: torch.device | str) -> Any:
    moved = (getattr(value, f.name) for f in fields(value))
    return type(value)(*(x.to(device) if isinstance(x, Tensor | Histories | Candidates) else x for x in moved))
