"""A ranking model around an encoder: embeddings, encoder, head with one logit for each task."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from vista_ext.data.batch import Candidates, FeatureSchema, Histories
from vista_ext.models.config import VistaConfig
from vista_ext.models.embedding import ContextEmbedding, EventEmbedding, ItemEmbedding
from vista_ext.models.encoders import Encoder, Events
from vista_ext.nn import RMSNorm


@dataclass(frozen=True)
class RankerOutput:
    """Logits `[m, tasks]`, the losses that the encoder adds to the task's, weighted, by name, and of how many terms
    each is the mean."""

    logits: Tensor
    losses: dict[str, Tensor]
    counts: dict[str, Tensor] = field(default_factory=dict)


class Head(nn.Module):
    """The multi-task MLP on [what the encoder gives, the candidate, their product, context]: logits `[m, tasks]`.

    Args:
        schema: of the data.
        config: sizes.
        extra: columns of further rows that `forward` gets.
    """

    def __init__(self, schema: FeatureSchema, config: VistaConfig, extra: int = 0) -> None:
        super().__init__()
        self.context = ContextEmbedding(schema, config.dim)
        widths = [3 * config.dim + self.context.width + extra, *config.mlp]
        layers: list[nn.Module] = [RMSNorm(widths[0])]
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU(), nn.Dropout(config.dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], len(schema.tasks)))

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers' parameters."""
        return self.mlp[-1].weight.dtype  # type: ignore[return-value]

    def forward(self, encoded: Tensor, rows: Tensor, candidates: Candidates, *extra: Tensor) -> Tensor:
        """Logits `[m, tasks]` from `[m, dim]` encoded and candidate rows, and `extra` rows `[m, extra]`."""
        return self.mlp(torch.cat([encoded, rows, encoded * rows, self.context(candidates).to(rows.dtype), *extra], 1))


class Ranker(nn.Module):
    """Score candidates from histories.

    Args:
        schema: of the data.
        config: sizes.
        encoder: reads the histories.
        item_features: int64 `[num_items + 1, features]`, see `ItemEmbedding`; zeros by default.
    """

    def __init__(
        self, schema: FeatureSchema, config: VistaConfig, encoder: Encoder, item_features: Tensor | None = None
    ) -> None:
        super().__init__()
        self.schema, self.config = schema, config
        self.items = ItemEmbedding(schema, config.dim, config.embedding, item_features)
        self.events = EventEmbedding(schema, config.dim, config.embedding)
        self.encoder = encoder
        self.head = Head(schema, config, encoder.width - config.dim)
        self.dropout = nn.Dropout(config.embedding.dropout)

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers, and of all rows between them; embedding tables may have another."""
        return self.head.dtype

    def embed(self, histories: Histories, items: Tensor | None = None) -> Events:
        """The histories' events as rows.

        Args:
            items: `[total, dim]`, the vectors of their items; looked up unless given.
        """
        if items is None:
            items = self.items(histories.items).to(self.dtype)
        whole = self.events(items, histories)
        return Events(self.dropout(whole), histories.seq_offsets, histories.max_seq_len, whole)

    def forward(self, histories: Histories, candidates: Candidates, kv_index: Tensor) -> RankerOutput:
        """Score the candidates of requests.

        Args:
            histories: of n users.
            candidates: of the requests, m in all.
            kv_index: int64 `[requests]`, the history that each request reads.

        Raises:
            ValueError, IndexError: naming the argument, what was expected and what was found.
        """
        histories.check()
        candidates.check(kv_index, histories.seq_offsets.shape[0] - 1)
        # One lookup: each makes a gradient as large as the table.
        items = self.items(torch.cat([histories.items, candidates.items])).to(self.dtype)
        of_events, of_candidates = items.split([histories.items.shape[0], candidates.items.shape[0]])
        rows = self.dropout(of_candidates)
        encoded = self.encoder(self.embed(histories, of_events), candidates, rows, kv_index)
        first, rest = encoded.rows[:, : self.config.dim], encoded.rows[:, self.config.dim :]
        return RankerOutput(self.head(first, rows, candidates, rest), encoded.losses, encoded.counts)
