"""Summaries as they were some events, or some time, before the request that reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vista_ext.data.batch import Histories
from vista_ext.data.dataset import EventDataset

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Age:
    """How far a summary lags behind the history of its request: by events or by seconds; 0 is a fresh one.

    Args:
        events: newest events before the request that it misses.
        seconds: before the request at which it was made.
    """

    events: int = 0
    seconds: int = 0

    @classmethod
    def parse(cls, text: str) -> Age:
        """Of "5" (events), "90s", "30m", "2h" or "1d".

        Raises:
            ValueError: what was expected and what was found.
        """
        match = re.fullmatch(r"(\d{1,9})([smhd]?)", text.strip())
        if match is None:
            raise ValueError(f"an age must be a number of events, or of s, m, h or d such as 2h, found {text!r}")
        count, unit = int(match[1]), match[2]
        return cls(seconds=count * UNITS[unit]) if unit else cls(events=count)

    def __str__(self) -> str:
        if self.seconds:
            unit = max((u for u in UNITS if self.seconds % UNITS[u] == 0), key=UNITS.__getitem__)
            return f"{self.seconds // UNITS[unit]} {unit}"
        return f"{self.events} event{'s' if self.events > 1 else ''}" if self.events else "fresh"

    def histories(self, dataset: EventDataset, users: Tensor, moments: Tensor, max_history: int) -> Histories:
        """What a summary of this age has read of users `[n]` who ask at moments `[n]` (int64, seconds).

        By seconds: the events strictly earlier than that long before the moment, as a job that ran then found them. By
        events: all before the moment but the newest so many, as a job found them just before the first of those came.
        A user with no more events than that had none then.
        """
        if self.seconds:
            return dataset.histories(users, moments - self.seconds, max_history)
        known = dataset.histories(users, moments, max_history, self.events)
        if not self.events:
            return known
        missed = dataset.histories(users, moments, self.events)
        first = missed.seq_offsets[:-1]
        made = moments.clone()
        some = missed.seq_offsets.diff() > 0
        made[some] = missed.timestamps[first[some]]
        return replace(known, now=made)


def history_lengths(dataset: EventDataset, users: Tensor, moments: Tensor) -> Tensor:
    """How many events users `[n]` have before moments `[n]`: int64 `[n]`."""
    counts, _ = dataset.events_since(users, torch.zeros_like(moments), moments)
    return counts
