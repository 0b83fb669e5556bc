"""The reconstruction loss: a summary must suffice to predict the history's next item (paper section 3.2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vista_ext.models.config import VistaConfig
from vista_ext.nn import RMSNorm, causal_attention, owners, packed_suffix, silu_mlp


class Reconstruction(nn.Module):
    """A causal transformer block over `[summary; events]`, judged by how well event i predicts event i + 1.

    Args:
        config: sizes; `reconstruction_window` bounds the quadratic block.
    """

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_dim
        self.norm = RMSNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.dim, bias=False)
        self.mlp_norm = RMSNorm(config.dim)
        self.mlp = silu_mlp(config.dim, config.hidden)
        self.predict = nn.Linear(config.dim, config.dim)

    def decode(self, summaries: Tensor, events: Tensor, seq_offsets: Tensor, max_seq_len: int) -> Tensor:
        """`v` of the paper: `[total, dim]` from summaries `[n, seeds, dim]` and packed events `[total, dim]`; a row
        depends on its user's summary, on itself and on the events before it. Rows behind the last user are rows of
        nobody: finite, and without influence."""
        users, seeds, dim = summaries.shape
        total, longest = events.shape[0], seeds + max_seq_len
        at = torch.arange(users + 1, device=events.device) * seeds
        starts = seq_offsets + at  # of [summary; events]
        of_summaries = starts[:-1, None] + torch.arange(seeds, device=events.device)
        of_events = torch.arange(total, device=events.device) + at[1:][owners(seq_offsets, total)]
        place = torch.cat([of_summaries.flatten(), of_events])
        rows = torch.cat([summaries.reshape(users * seeds, dim), events])
        rows = torch.zeros_like(rows).index_copy(0, place, rows)
        # Attention must define every row: what lies behind the last user is cut into sequences like the others. One
        # more than may be needed, and never a single one, for which a compiler would make code of its own.
        rest = torch.arange(1, 3 + total // longest, device=events.device) * longest
        starts = torch.cat([starts, (starts[-1] + rest).clamp(max=rows.shape[0])])
        q, k, v = self.qkv(self.norm(rows)).view(-1, 3, self.config.heads, self.config.head_dim).unbind(1)
        attended = causal_attention(q, k, v, starts, longest)
        rows = events + self.out(attended.flatten(1).index_select(0, of_events))
        rows = rows + self.mlp(self.mlp_norm(rows))
        return self.predict(rows)

    def forward(
        self, summaries: Tensor, events: Tensor, seq_offsets: Tensor, max_seq_len: int, whole: Tensor
    ) -> Tensor:
        """The loss, a scalar: squared error, mean over predicted events and dimensions; 0 if there is none.

        Args:
            summaries: `[n, seeds, dim]`.
            events: `[total, dim]`, embedded events, packed.
            seq_offsets: int64 `[n + 1]`.
            max_seq_len: at least the longest history.
            whole: `[total, dim]`, `events` without dropout: what is predicted. An event is its item, its action and
                its age, all of which a summary should keep; what dropout takes from it nobody could predict.
        """
        window = self.config.reconstruction_window
        newest, offsets = packed_suffix(seq_offsets, window, events.shape[0])
        predicted = self.decode(summaries, events.index_select(0, newest), offsets, torch.sym_min(window, max_seq_len))
        targets = whole.index_select(0, newest)
        if self.config.reconstruct_constants:
            targets = targets.detach()
        # A mean over all of it is no place for a short format.
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        error = (predicted[:-1].to(dtype) - targets[1:].to(dtype)).square().mean(-1)
        # A row predicts the next one if that is of the same user, and of any.
        user, row = owners(offsets, newest.shape[0]), torch.arange(newest.shape[0], device=newest.device)
        counts = (user[:-1] == user[1:]) & (row[1:] < offsets[-1])
        return torch.where(counts, error, 0.0).sum() / counts.sum().clamp(min=1)

    def predictions(self, seq_offsets: Tensor) -> Tensor:
        """Of how many predicted events the loss of histories `[n]` is the mean: int64, a scalar."""
        return (seq_offsets.diff().clamp(max=self.config.reconstruction_window) - 1).clamp(min=0).sum()
