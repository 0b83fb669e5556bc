"""The socket: what reads a history for a candidate. What is around it is the same for all."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from vista_ext.data.batch import Candidates
from vista_ext.models.config import VistaConfig
from vista_ext.nn import last_rows, spread


@dataclass(frozen=True)
class Events:
    """Embedded histories.

    Args:
        rows: `[total, dim]`.
        seq_offsets: int64 `[n + 1]`.
        max_seq_len: at least the longest.
        whole: `rows` without dropout, for whoever predicts them.
    """

    rows: Tensor
    seq_offsets: Tensor
    max_seq_len: int
    whole: Tensor


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of candidates: `[m, width]`, the losses it adds to the task's, by name, and of how many
    terms each is the mean (what it weighs where a batch is shared among processes)."""

    rows: Tensor
    losses: dict[str, Tensor]
    counts: dict[str, Tensor] = field(default_factory=dict)


class Encoder(nn.Module):
    """A history encoder: give `name`, `width` and `forward`.

    `forward(events, candidates, rows, kv_index)` gets the embedded histories, the candidates with their `[m, dim]`
    rows, and int64 `kv_index` `[requests]`, the history that each request reads.
    """

    name: str
    width: int

    def forward(self, events: Events, candidates: Candidates, rows: Tensor, kv_index: Tensor) -> Encoded:
        """Rows `[m, width]` for the candidates' rows `[m, dim]`, and losses."""
        raise NotImplementedError


class MeanPooling(Encoder):
    """The average of the history's rows; zeros for an empty one."""

    name = "mean"

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.width = config.dim

    def forward(self, events: Events, candidates: Candidates, rows: Tensor, kv_index: Tensor) -> Encoded:
        """The mean `[m, dim]` of the history that each candidate's request reads."""
        lengths = events.seq_offsets.diff()
        owner = spread(torch.arange(lengths.shape[0], device=rows.device), events.seq_offsets, events.rows.shape[0])
        # As many terms as a history has events: too many for a short format.
        exact = events.rows.to(torch.promote_types(events.rows.dtype, torch.float32))
        sums = exact.new_zeros(lengths.shape[0], self.width).index_add(0, owner, exact)
        means = (sums / lengths.clamp(min=1)[:, None]).to(events.rows.dtype)
        return Encoded(spread(means.index_select(0, kv_index), candidates.offsets, rows.shape[0]), {})


class DIN(Encoder):
    """Deep Interest Network (Zhou et al., KDD 2018): a small network weighs each event by candidate and event; the
    weights are not normalised, so that their sum tells how strong the interest is. Its cost is candidates x events.
    """

    name = "din"

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.width = config.dim
        self.first = nn.Linear(4 * config.dim, 36)
        self.second = nn.Linear(36, 1)

    def forward(self, events: Events, candidates: Candidates, rows: Tensor, kv_index: Tensor) -> Encoded:
        """The weighted sum `[m, dim]` of the events `[total, dim]`, weighed for each candidate's row `[m, dim]`."""
        sequence = spread(kv_index, candidates.offsets, rows.shape[0])
        windows, valid = last_rows(events.rows, events.seq_offsets, events.max_seq_len)
        keys = windows.index_select(0, sequence)
        # The first layer on [q, k, q - k, q * k], with what depends on one of the two taken out of the pairs.
        of_query, of_key, of_difference, of_product = self.first.weight.split(self.width, 1)
        hidden = torch.bmm(keys, rows[:, :, None] * of_product.T)
        hidden = hidden + functional.linear(windows, of_key - of_difference).index_select(0, sequence)
        hidden = hidden + functional.linear(rows, of_query + of_difference, self.first.bias)[:, None]
        weights = self.second(functional.silu(hidden)) * valid[sequence, :, None]
        # The published model sums at most 100 events; the square root keeps its scale bounded on longer histories.
        lengths = events.seq_offsets.diff().clamp(min=1)[sequence]
        return Encoded((weights * keys).sum(1) / lengths.sqrt().to(keys.dtype)[:, None], {})
