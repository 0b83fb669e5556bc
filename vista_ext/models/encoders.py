"""The socket: what reads a history for a candidate. What is around it is the same for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vista_ext.data.batch import Candidates
from vista_ext.models.config import VistaConfig
from vista_ext.nn import spread


@dataclass(frozen=True)
class Events:
    """Embedded histories.

    Args:
        rows: `[total, dim]`.
        seq_offsets: int64 `[n + 1]`.
        max_seq_len: at least the longest.
    """

    rows: Tensor
    seq_offsets: Tensor
    max_seq_len: int


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of candidates: `[m, width]`, and the losses it adds to the task's, by name."""

    rows: Tensor
    losses: dict[str, Tensor]


class Encoder(nn.Module):
    """A history encoder: give `name`, `width` and `forward`.

    `forward(events, candidates, rows, kv_index)` gets the embedded histories, the candidates with their `[m, dim]`
    rows, and int64 `kv_index` `[requests]`, the history that each request reads.
    """

    name: str
    width: int

    def forward(self, events: Events, candidates: Candidates, rows: Tensor, kv_index: Tensor) -> Encoded:
        raise NotImplementedError


class MeanPooling(Encoder):
    """The average of the history's rows; zeros for an empty one."""

    name = "mean"

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.width = config.dim

    def forward(self, events: Events, candidates: Candidates, rows: Tensor, kv_index: Tensor) -> Encoded:
        lengths = events.seq_offsets.diff()
        owner = spread(torch.arange(lengths.shape[0], device=rows.device), events.seq_offsets, events.rows.shape[0])
        sums = events.rows.new_zeros(lengths.shape[0], self.width).index_add(0, owner, events.rows)
        means = sums / lengths.clamp(min=1)[:, None]
        return Encoded(spread(means[kv_index], candidates.offsets, rows.shape[0]), {})


class DIN(Encoder):
    """Deep Interest Network (Zhou et al., KDD 2018): a small network weighs each event by candidate and event; the
    weights are not normalised, so that their sum tells how strong the interest is. Its cost is candidates x events.
    """

    name = "din"

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.width = config.dim
        self.weigh = nn.Sequential(nn.Linear(4 * config.dim, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, events: Events, candidates: Candidates, rows: Tensor, kv_index: Tensor) -> Encoded:
        sequence = spread(kv_index, candidates.offsets, rows.shape[0])
        lengths = events.seq_offsets.diff()[sequence]
        candidate = torch.repeat_interleave(lengths)
        first = events.seq_offsets[sequence] - (lengths.cumsum(0) - lengths)
        event = torch.arange(candidate.shape[0], device=rows.device) + first[candidate]
        queries, keys = rows[candidate], events.rows[event]
        weights = self.weigh(torch.cat([queries, keys, queries - keys, queries * keys], 1))
        # The published model sums at most 100 events; the square root keeps its scale bounded on longer histories.
        damped = weights / lengths.clamp(min=1).sqrt()[candidate][:, None]
        return Encoded(torch.zeros_like(rows).index_add(0, candidate, damped * keys), {})
