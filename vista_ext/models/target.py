"""Stage 2: candidates attend to a user's summary, at a cost that does not depend on the history (paper section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vista_ext import ops
from vista_ext.data.batch import Candidates
from vista_ext.models.config import VistaConfig
from vista_ext.models.encoders import Events
from vista_ext.nn import RMSNorm, TargetBlock, packed_suffix
from vista_ext.ops.cache_rows import IndexPolicy, Scheme


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

    def attend(
        self, layer: int, q: Tensor, own: tuple[Tensor, Tensor], candidates: Candidates, kv_index: Tensor
    ) -> Tensor:
        """What queries of candidates, with their own keys and values, find in a layer."""
        lengths = candidates.max_len, self.max_len
        return ops.jagged_cross_attn(
            q,
            *self.layers[layer],
            candidates.offsets,
            self.offsets,
            *lengths,
            kv_index=kv_index,
            self_k=own[0],
            self_v=own[1],
        )


@dataclass(frozen=True)
class CachedMemory:
    """The same of many users, as quantized rows by slot (`serve.MemoryCache` keeps them). For inference only.

    Args:
        layers: caches of keys and values of each layer, uint8 `[num_slots, row_bytes]`.
        tokens: rows of a summary.
        heads, scheme, group: what the rows hold.
        policy: of slots out of range, as in `ops.cached_cross_attn`; under "zero" the candidates of such a request see
            themselves only.
    """

    layers: list[tuple[Tensor, Tensor]]
    tokens: int
    heads: int
    scheme: Scheme
    group: int | None
    policy: IndexPolicy

    @property
    def num_slots(self) -> int:
        """Slots of the caches."""
        return self.layers[0][0].shape[0]

    def attend(
        self, layer: int, q: Tensor, own: tuple[Tensor, Tensor], candidates: Candidates, slots: Tensor
    ) -> Tensor:
        """As `Memory.attend`, with a slot for each request."""
        out, _, _ = ops.cached_cross_attn(
            q,
            *self.layers[layer],
            slots,
            candidates.offsets,
            candidates.max_len,
            self.tokens,
            self.heads,
            self_k=own[0],
            self_v=own[1],
            scheme=self.scheme,
            group=self.group,
            policy=self.policy,
        )
        return out


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
        self.norm = RMSNorm(config.dim)

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

    def forward(self, rows: Tensor, candidates: Candidates, memory: Memory | CachedMemory, kv_index: Tensor) -> Tensor:
        """The candidates' rows `[m, dim]` after all layers; request r reads the summary (or slot) `kv_index[r]`."""
        for number, block in enumerate(self.layers):
            layer = cast(TargetBlock, block)
            own = layer.keys_values(rows)
            rows = layer.finish(rows, memory.attend(number, layer.queries(rows), own, candidates, kv_index))
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

    def memory(self, summaries: Tensor, dtype: torch.dtype) -> Memory:
        """The memory of summaries `[n, seeds, dim]` of any floating dtype: a store may hold them in half precision."""
        if tuple(summaries.shape[1:]) != self.shape:
            raise ValueError(f"summaries must be [n, {self.shape[0]}, {self.shape[1]}], found {list(summaries.shape)}")
        return self.target.memory(summaries.to(dtype))

    def forward(
        self,
        summaries: Tensor | CachedMemory,
        candidates: Candidates,
        rows: Tensor,
        kv_index: Tensor,
        recent: Events | None,
    ) -> Tensor:
        """`[m, width]` for candidate rows `[m, dim]` on summaries `[n, seeds, dim]`, or on what a cache has of them;
        then `kv_index` has slots, and `recent` the histories of the requests."""
        cached = isinstance(summaries, CachedMemory)
        memory = summaries if isinstance(summaries, CachedMemory) else self.memory(summaries, rows.dtype)
        attended = self.target(rows, candidates, memory, kv_index)
        if self.recent is None:
            return attended
        if recent is None:
            raise ValueError("recent must be histories (this model has recent_events > 0), found None")
        index = torch.arange(len(kv_index), device=kv_index.device) if cached else kv_index
        return torch.cat([attended, self.recent(recent, candidates, rows, index)], 1)
