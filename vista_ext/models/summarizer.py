"""Stage 1: a history becomes `num_seeds` rows, at a cost linear in its length (paper section 3.2)."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from vista_ext._heap import released
from vista_ext.models.config import VistaConfig
from vista_ext.nn import QlaBlock, RMSNorm


class Summarizer(nn.Module):
    """QLA layers over seeds and history. Source rows are a set to QLA, so the seeds are kept apart from the history:
    their states add up, and in the last layer only the seeds are queried.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.config = config
        self.seeds = nn.Parameter(torch.randn(config.num_seeds, config.dim) * config.dim**-0.5)
        self.layers = nn.ModuleList(
            QlaBlock(
                config.dim,
                config.heads,
                config.head_dim,
                config.hidden,
                activation=config.activation,
                state_activation=config.state_activation,
                dropout=config.dropout,
            )
            for _ in range(config.summary_layers)
        )
        self.norm = RMSNorm(config.dim)
        self.lengths = nn.Embedding(config.length_buckets, config.dim) if config.length_buckets else None
        if self.lengths is not None:
            nn.init.zeros_(self.lengths.weight)

    def begin(self, lengths: Tensor, dtype: torch.dtype) -> Tensor:
        """The seed rows `[n, num_seeds, dim]` that enter the first layer: the seeds, told how long the histories are,
        int64 `[n]`."""
        rows = self.seeds.to(dtype).expand(lengths.shape[0], -1, -1)
        if self.lengths is None:
            return rows
        buckets = (lengths + 1).to(torch.float64).log2().long().clamp(max=self.lengths.num_embeddings - 1)
        return rows + self.lengths(buckets)[:, None].to(dtype)

    def forward(self, events: Tensor, seq_offsets: Tensor, max_seq_len: int) -> Tensor:
        """Summaries of n users.

        Args:
            events: `[total, dim]`, embedded events, packed.
            seq_offsets: int64 `[n + 1]`.
            max_seq_len: at least the longest history.

        Returns:
            `[n, num_seeds, dim]`; for an empty history what the seeds make of themselves.
        """
        walk = _SeedWalk(self, seq_offsets.diff(), events.dtype)
        for number, block in enumerate(self.layers):
            layer = cast(QlaBlock, block)
            state = layer.state(events, seq_offsets, max_seq_len)
            state = walk.advance(layer, state)
            if number + 1 < len(self.layers):
                events = layer.read(events, state, walk.attn_scale, seq_offsets, max_seq_len)
        return walk.summaries()

    def empty_states(self, users: int, device: torch.device | str = "cpu") -> Tensor:
        """The states of histories without events: float32 `[users, layers, heads, head_dim, head_dim]`."""
        config = self.config
        shape = (users, config.summary_layers, config.heads, config.head_dim, config.head_dim)
        return torch.zeros(shape, device=device)

    @torch.no_grad()
    def extend_(self, states: Tensor, lengths: Tensor, events: Tensor, seq_offsets: Tensor, max_seq_len: int) -> Tensor:
        """Summaries of n users after new events, at a cost that does not depend on the events before.

        The first layer is what `forward` makes of all events. In the layers above, an event is read once, when it is
        new; `forward` would read it again in the light of what came later. With one layer there is no difference.

        Args:
            states: of the events before, as this method left them; the new ones are added in place.
            lengths: int64 `[n]`, how many events that makes, the new ones included.
            events, seq_offsets, max_seq_len: of the new events, as in `forward`.
        """
        walk = _SeedWalk(self, lengths, events.dtype)
        for number, block in enumerate(self.layers):
            layer = cast(QlaBlock, block)
            states[:, number] += layer.state(events, seq_offsets, max_seq_len)
            state = walk.advance(layer, states[:, number])
            if number + 1 < len(self.layers):
                events = layer.read(events, state, walk.attn_scale, seq_offsets, max_seq_len)
        return walk.summaries()

    @torch.no_grad()
    def stream_(self, events: Tensor, seq_offsets: Tensor, chunk: int, states: Tensor | None = None) -> Tensor:
        """`forward` without gradients, `chunk` rows at a time; overwrites `events`, so that one set of activations is
        all there is at any length. Equal to `forward` within rounding. Leaves in `states` what `extend_` goes on from.

        Raises:
            ValueError: if `chunk` is not positive.
        """
        require_chunk(chunk)
        walk = _SeedWalk(self, seq_offsets.diff(), events.dtype)
        pieces = _pieces(seq_offsets, chunk)
        for number, block in enumerate(self.layers):
            layer = cast(QlaBlock, block)
            state = events.new_zeros(
                (len(seq_offsets) - 1, layer.heads, layer.head_dim, layer.head_dim), dtype=torch.float32
            )
            for users, rows, offsets in released(pieces):
                state[users] += layer.state(events[rows], offsets, chunk)
            if states is not None:
                states[:, number] = state
            state = walk.advance(layer, state)
            if number + 1 < len(self.layers):
                for users, rows, offsets in released(pieces):
                    events[rows] = layer.read(events[rows], state[users], walk.attn_scale[users], offsets, chunk)
        return walk.summaries()


def require_chunk(chunk: int) -> None:
    """A ValueError unless rows can be taken `chunk` at a time."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, found {chunk}")


class _SeedWalk:
    """The seed rows of a batch on their way through the layers."""

    def __init__(self, summarizer: Summarizer, lengths: Tensor, dtype: torch.dtype) -> None:
        config = summarizer.config
        self.norm = summarizer.norm
        self.users, self.most = lengths.shape[0], config.num_seeds
        self.as_sources = config.seeds == "source"
        self.rows = summarizer.begin(lengths, dtype).reshape(-1, config.dim)
        self.offsets = torch.arange(self.users + 1, device=lengths.device) * self.most
        sources = lengths + (self.most if self.as_sources else 0)
        self.attn_scale = (
            1.0 / sources.clamp(min=1).to(torch.float32)
            if config.scale == "mean"
            else torch.ones(self.users, device=lengths.device)
        )

    def advance(self, layer: QlaBlock, state: Tensor) -> Tensor:
        """Take the seeds through a layer whose state over the history is given; returns the state over all sources."""
        if self.as_sources:
            state = state + layer.state(self.rows, self.offsets, self.most)
        own = None if self.as_sources else layer.keys_values(self.rows)
        self.rows = layer.read(self.rows, state, self.attn_scale, self.offsets, self.most, own=own)
        return state

    def summaries(self) -> Tensor:
        return self.norm(self.rows).view(self.users, self.most, self.rows.shape[1])


def _pieces(seq_offsets: Tensor, chunk: int) -> list[tuple[slice, slice, Tensor]]:
    """Cut packed rows every `chunk` rows: the users and rows of each piece, and the users' offsets within it."""
    total = int(seq_offsets[-1])
    pieces = []
    for begin, end in pairwise([*range(0, total, chunk), total]):
        first = int(torch.searchsorted(seq_offsets, begin, right=True)) - 1
        last = int(torch.searchsorted(seq_offsets, end))
        offsets = seq_offsets[first : last + 1].clamp(begin, end) - begin
        pieces.append((slice(first, last), slice(begin, end), offsets))
    return pieces
