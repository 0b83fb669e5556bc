"""Stage 2: candidates attend to a user's summary, at a cost that does not depend on the history (paper section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vista_ext.data.batch import Candidates
from vista_ext.models.config import VistaConfig
from vista_ext.models.encoders import Events
from vista_ext.nn import TargetBlock, packed_suffix


@dataclass(frozen=True)
class Memory:
    """What candidates read of a batch of summaries, computed once however many candidates there are.

    Args:
        layers: keys and values of each layer, `[n * seeds, heads, head_dim]`.
        offsets: int64 `[n + 1]`.
        max_len: rows of a summary.
    """

    layers: list[tuple[Tensor, Tensor]]
    offsets: Tensor
    max_len: int


class TargetAttention(nn.Module):
    """Softmax layers over `[summary; candidates]`. A summary row sees the summary; a candidate sees the summary and
    itself, never another candidate.

    Args:
        config: sizes.
    """

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TargetBlock(config.dim, config.heads, config.head_dim, config.hidden, dropout=config.dropout)
            for _ in range(config.target_layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)

    def memory(self, summaries: Tensor) -> Memory:
        """The memory of summaries `[n, seeds, dim]`."""
        users, seeds, dim = summaries.shape
        offsets = torch.arange(users + 1, device=summaries.device) * seeds
        rows = summaries.reshape(users * seeds, dim)
        layers = []
        for number, block in enumerate(self.layers):
            layer = cast(TargetBlock, block)
            layers.append(layer.keys_values(rows))
            if number + 1 < len(self.layers):
                rows = layer(rows, layers[-1], offsets, offsets, seeds, seeds)
        return Memory(layers, offsets, seeds)

    def forward(self, rows: Tensor, candidates: Candidates, memory: Memory, kv_index: Tensor) -> Tensor:
        """The candidates' rows `[m, dim]` after all layers; request r reads the summary `kv_index[r]`."""
        for block, keys_values in zip(self.layers, memory.layers, strict=True):
            rows = block(
                rows,
                keys_values,
                candidates.offsets,
                memory.offsets,
                candidates.max_len,
                memory.max_len,
                kv_index=kv_index,
                sees_itself=True,
            )
        return self.norm(rows)


class RecentEvents(nn.Module):
    """Candidates attend to the newest raw events beside the summary: what happened since it was made is not lost.

    Args:
        config: sizes; the last `recent_events` are read.
    """

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.most = config.recent_events
        self.block = TargetBlock(config.dim, config.heads, config.head_dim, config.hidden, dropout=config.dropout)

    def forward(self, events: Events, candidates: Candidates, rows: Tensor, kv_index: Tensor) -> Tensor:
        """`[m, dim]`."""
        newest, offsets = packed_suffix(events.seq_offsets, self.most, events.rows.shape[0])
        memory = self.block.keys_values(events.rows.index_select(0, newest))
        lengths = candidates.max_len, self.most
        return self.block(rows, memory, candidates.offsets, offsets, *lengths, kv_index=kv_index, sees_itself=True)


class Stage2(nn.Module):
    """What a candidate takes from a summary and, as an option, from the newest raw events.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.shape = config.num_seeds, config.dim
        self.target = TargetAttention(config)
        self.recent = RecentEvents(config) if config.recent_events else None
        self.width = config.dim * (2 if config.recent_events else 1)

    def forward(
        self, summaries: Tensor, candidates: Candidates, rows: Tensor, kv_index: Tensor, recent: Events | None
    ) -> Tensor:
        """`[m, width]` for candidate rows `[m, dim]` on summaries `[n, seeds, dim]` of any floating dtype: a store may
        hold them in half precision."""
        if tuple(summaries.shape[1:]) != self.shape:
            raise ValueError(f"summaries must be [n, {self.shape[0]}, {self.shape[1]}], found {list(summaries.shape)}")
        attended = self.target(rows, candidates, self.target.memory(summaries.to(rows.dtype)), kv_index)
        if self.recent is None:
            return attended
        if recent is None:
            raise ValueError("recent must be histories (this model has recent_events > 0), found None")
        return torch.cat([attended, self.recent(recent, candidates, rows, kv_index)], 1)
