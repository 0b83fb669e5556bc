"""Scoring from what candidates read of summaries, kept on the device: nothing of a user is computed for a request."""

from __future__ import annotations

import torch
from torch import Tensor

from vista_ext import ops
from vista_ext.data.batch import Candidates
from vista_ext.models import Histories, SummaryRanker, Vista
from vista_ext.models.target import CachedMemory
from vista_ext.ops.cache_rows import IndexPolicy, Scheme


class MemoryCache:
    """Keys and values of stage 2's layers for summaries, as quantized rows by slot; of one model, and stale with it.

    Who has which slot is the caller's business. A slot that was never refreshed holds zeros.

    Args:
        model: whose stage 2 reads the summaries. Rows are on its device.
        num_slots: users that fit; one takes `slot_bytes`.
        scheme, group: of the rows, as in `ops.quantize_rows`.
        policy: of a slot out of range, such as -1 for a user without a summary: "raise", or "zero" to score the
            candidates of its request without a memory.
    """

    def __init__(
        self,
        model: Vista | SummaryRanker,
        num_slots: int,
        *,
        scheme: Scheme = "int8",
        group: int | None = None,
        policy: IndexPolicy = "raise",
    ) -> None:
        self.model = model
        self.stage2 = model.encoder.stage2 if isinstance(model, Vista) else model.stage2
        config = model.config
        self._like = next(model.parameters())
        width = config.heads * config.head_dim
        one = ops.quantize_rows(torch.zeros(1, config.num_seeds, width), scheme=scheme, group=group)

        def cache() -> Tensor:
            return torch.zeros(num_slots, one.shape[1], dtype=torch.uint8, device=self._like.device)

        layers = [(cache(), cache()) for _ in range(config.target_layers)]
        self.memory = CachedMemory(layers, config.num_seeds, config.heads, scheme, group, policy)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a user, over all layers."""
        return sum(rows.shape[1] for pair in self.memory.layers for rows in pair)

    @torch.no_grad()
    def refresh_(self, slots: Tensor, summaries: Tensor) -> None:
        """Overwrite slots.

        Args:
            slots: int64 or int32 `[n]`; of equal ones the last summary stays.
            summaries: `[n, seeds, dim]`, of any floating dtype.

        Raises:
            ValueError, RuntimeError: naming the argument, what was expected and what was found.
        """
        memory = self.stage2.memory(summaries, self._like.dtype)
        for caches, keys_values in zip(self.memory.layers, memory.layers, strict=True):
            for cache, rows in zip(caches, keys_values, strict=True):
                table = rows.reshape(len(summaries), self.memory.tokens, -1)
                quantized = ops.quantize_rows(table, scheme=self.memory.scheme, group=self.memory.group)
                ops.cache_scatter_(cache, slots, quantized)

    @torch.no_grad()
    def score(self, slots: Tensor, candidates: Candidates, *, recent: Histories | None = None) -> Tensor:
        """Logits `[m, tasks]`.

        Args:
            slots: int64 `[requests]`.
            candidates: of the requests.
            recent: of each request, for a model that attends to recent events.

        Raises:
            ValueError, IndexError: naming the argument, what was expected and what was found.
        """
        score = self.model.score if isinstance(self.model, Vista) else self.model
        return score(self.memory, candidates, slots, recent=recent)
