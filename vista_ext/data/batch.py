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


def _to(value: Any, device: torch.device | str) -> Any:
    moved = (getattr(value, f.name) for f in fields(value))
    return type(value)(*(x.to(device) if isinstance(x, Tensor | Histories | Candidates) else x for x in moved))
