"""Ids become vectors: items with their features, events, the context of a request."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vista_ext.data.batch import Candidates, FeatureSchema, Histories, check_range
from vista_ext.models.config import EmbeddingConfig
from vista_ext.nn import spread

_STD = 0.02  # small against the layers' own scale, so that an item never seen in training stays near its features

# Odd 64-bit multipliers (Fibonacci hashing and one of xxHash's primes), as signed numbers: int64 wraps around.
_HASHES = (-0x61C8864680B583EB, -0x3D4D51C2D82B14B1)


def _table(rows: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(rows, dim)
    nn.init.normal_(table.weight, std=_STD)
    return table


class ItemEmbedding(nn.Module):
    """An item's vector: the sum of its own row and a row for each of its features.

    Args:
        schema: of the data.
        dim: of the vectors.
        config: table or hash.
        item_features: int64 `[num_items + 1, features]`, columns as in `schema.item_features`; part of the saved
            state, so that whoever scores needs ids only.
    """

    features: Tensor

    def __init__(self, schema: FeatureSchema, dim: int, config: EmbeddingConfig, item_features: Tensor | None) -> None:
        super().__init__()
        shape = (schema.num_items + 1, len(schema.item_features))
        if item_features is None:
            item_features = torch.zeros(shape, dtype=torch.int64)
        if item_features.dtype != torch.int64 or tuple(item_features.shape) != shape:
            raise ValueError(
                f"item_features must be int64 {list(shape)}, found {item_features.dtype} {list(item_features.shape)}"
            )
        for column, (name, count) in enumerate(schema.item_features.items()):
            values = item_features[:, column]
            if int(values.min()) < 0 or int(values.max()) >= count:
                found = f"{int(values.min())} to {int(values.max())}"
                raise ValueError(f"item_features: {name} must be in [0, {count}), found {found}")
        self.num_items = schema.num_items
        self.hash_rows = config.hash_rows if config.items == "hash" else 0
        self.rows = _table(self.hash_rows or shape[0], dim)
        self.feature_rows = nn.ModuleList(_table(count, dim) for count in schema.item_features.values())
        self.register_buffer("features", item_features.clone())

    def forward(self, items: Tensor) -> Tensor:
        """int64 `[m]` ids from 0 (unknown) to `num_items` become `[m, dim]`."""
        check_range("items", items, self.num_items)
        if self.hash_rows:
            vectors = sum(self.rows(self._hash(items, multiplier)) for multiplier in _HASHES)
        else:
            vectors = self.rows(items)
        features = self.features[items]
        for column, table in enumerate(self.feature_rows):
            vectors = vectors + table(features[:, column])
        return vectors

    def _hash(self, items: Tensor, multiplier: int) -> Tensor:
        # The high bits of a product are the well-mixed ones.
        return torch.remainder((items * multiplier) >> 24, self.hash_rows)


class EventEmbedding(nn.Module):
    """What turns an item's vector into an event's: the action, and how long ago it was (paper section 3.2.2).

    An action scales the item's dimensions and adds a row of its own: liking and disliking an item are opposites, which
    a sum alone cannot say.

    Args:
        schema: of the data.
        dim: of the vectors.
        config: of the time buckets.
    """

    def __init__(self, schema: FeatureSchema, dim: int, config: EmbeddingConfig) -> None:
        super().__init__()
        self.actions = _table(schema.num_actions, dim)
        self.gates = nn.Embedding(schema.num_actions, dim)
        nn.init.ones_(self.gates.weight)
        self.ages = _table(config.time_buckets, dim) if config.time_buckets else None

    def forward(self, item_vectors: Tensor, histories: Histories) -> Tensor:
        """`[total, dim]`, one row an event, in the dtype of the items' vectors."""
        check_range("actions", histories.actions, self.actions.num_embeddings - 1)
        dtype = item_vectors.dtype
        vectors = item_vectors * self.gates(histories.actions).to(dtype) + self.actions(histories.actions).to(dtype)
        if self.ages is not None:
            now = spread(histories.now, histories.seq_offsets, histories.items.shape[0])
            age = (now - histories.timestamps).clamp(min=1).to(torch.float64)
            vectors = vectors + self.ages(age.log2().long().clamp(max=self.ages.num_embeddings - 1)).to(dtype)
        return vectors


class ContextEmbedding(nn.Module):
    """The context features of candidates, side by side.

    Args:
        schema: of the data.
        dim: of each feature's vector.
    """

    def __init__(self, schema: FeatureSchema, dim: int) -> None:
        super().__init__()
        self.counts = dict(schema.context)
        self.tables = nn.ModuleList(_table(count, dim) for count in schema.context.values())
        self.width = len(schema.context) * dim

    def forward(self, candidates: Candidates) -> Tensor:
        """`[m, width]`."""
        context = candidates.context
        if context.shape[1] != len(self.tables):
            raise ValueError(f"candidates.context must have {len(self.tables)} columns, found {context.shape[1]}")
        for i, (name, count) in enumerate(self.counts.items()):
            check_range(f"candidates.context: {name}", context[:, i], count - 1)
        columns = [table(context[:, i]) for i, table in enumerate(self.tables)]
        return torch.cat(columns, 1) if columns else context.new_zeros((context.shape[0], 0), dtype=torch.float32)
