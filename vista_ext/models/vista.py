"""VISTA: both stages trained together, or apart with the summaries between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vista_ext._heap import released
from vista_ext.data.batch import Candidates, FeatureSchema, Histories
from vista_ext.models.config import VistaConfig
from vista_ext.models.decoder import Reconstruction
from vista_ext.models.embedding import EventEmbedding, ItemEmbedding
from vista_ext.models.encoders import Encoded, Encoder, Events
from vista_ext.models.ranker import Head, Ranker
from vista_ext.models.summarizer import Summarizer, require_chunk
from vista_ext.models.target import CachedMemory, Stage2


class VistaEncoder(Encoder):
    """Summarize, then let the candidates attend to the summary.

    Args:
        config: sizes and choices.
    """

    name = "vista"

    def __init__(self, config: VistaConfig) -> None:
        super().__init__()
        self.config = config
        self.summarizer = Summarizer(config)
        self.stage2 = Stage2(config)
        self.reconstruction = Reconstruction(config) if config.reconstruction_weight else None
        self.width = self.stage2.width

    def forward(self, events: Events, candidates: Candidates, rows: Tensor, kv_index: Tensor) -> Encoded:
        """What candidates `[m, dim]` take from the summaries of events `[total, dim]`: `[m, width]`, and losses."""
        summaries = self.summarizer(events.rows, events.seq_offsets, events.max_seq_len)
        losses, counts = {}, {}
        if self.reconstruction is not None and self.training:
            loss = self.reconstruction(summaries, events.rows, events.seq_offsets, events.max_seq_len, events.whole)
            losses["reconstruction"] = self.config.reconstruction_weight * loss
            counts["reconstruction"] = self.reconstruction.predictions(events.seq_offsets)
        return Encoded(self.stage2(summaries, candidates, rows, kv_index, events), losses, counts)


class Vista(Ranker):
    """The two-stage model. `forward` trains both stages; `summarize` and `score` are the stages on their own.

    Args:
        schema: of the data.
        config: sizes and choices.
        item_features: int64 `[num_items + 1, features]`, see `ItemEmbedding`.
    """

    encoder: VistaEncoder

    def __init__(self, schema: FeatureSchema, config: VistaConfig, item_features: Tensor | None = None) -> None:
        super().__init__(schema, config, VistaEncoder(config), item_features)

    @torch.no_grad()
    def summarize(
        self,
        histories: Histories,
        *,
        chunk: int = 8192,
        deterministic: bool = False,
        states: Tensor | None = None,
    ) -> Tensor:
        """Stage 1 without gradients and without dropout, whatever mode the model is in: `[users, seeds, dim]`, in the
        dtype of the parameters.

        Args:
            histories: of any length; 10 million events of a user are fine.
            chunk: events at work at a time. Memory is one row of `dim` values an event, plus a chunk's worth.
            deterministic: the same bits for a user whatever the number of threads and whoever else is in the batch.
                Takes one user at a time on one thread, since matrix products round by their shape.
            states: float32, as `Summarizer.empty_states` makes them, to keep what `Summarizer.extend_` goes on from.

        Raises:
            ValueError, IndexError: naming the argument, what was expected and what was found.
        """
        require_chunk(chunk)
        histories.check()
        with _evaluating(self):
            if not deterministic:
                return self._summarize(histories, chunk, states)
            with _one_thread():
                parts = [
                    self._summarize(histories.rows(i, i + 1), chunk, None if states is None else states[i : i + 1])
                    for i in range(len(histories))
                ]
            return torch.cat(parts) if parts else self._summarize(histories, chunk, states)

    def _summarize(self, histories: Histories, chunk: int, states: Tensor | None) -> Tensor:
        total = int(histories.seq_offsets[-1])
        events = self.encoder.summarizer.seeds.new_empty((total, self.config.dim))
        for begin in released(range(0, total, chunk)):
            part = _events(histories, begin, min(begin + chunk, total))
            events[begin : begin + chunk] = self.embed(part).rows
        return self.encoder.summarizer.stream_(events, histories.seq_offsets, chunk, states)

    def score(
        self,
        summaries: Tensor | CachedMemory,
        candidates: Candidates,
        kv_index: Tensor,
        *,
        recent: Histories | None = None,
    ) -> Tensor:
        """Stage 2: logits `[m, tasks]`.

        Args:
            summaries: `[n, seeds, dim]`, from `summarize` or from a store; or what a `serve.MemoryCache` has of them.
            candidates: of the requests.
            kv_index: int64 `[requests]`, the summary (or slot) that each request reads.
            recent: histories of the n users (with a cache, of the requests), of which the last `recent_events` are
                read; only for that option.

        Raises:
            ValueError, IndexError: naming the argument, what was expected and what was found.
        """
        users = _check(summaries, candidates, kv_index)
        rows = self.dropout(self.items(candidates.items).to(self.dtype))
        newest = _newest(recent, self.config.recent_events, users)
        events = None if newest is None else self.embed(newest)
        encoded = self.encoder.stage2(summaries, candidates, rows, kv_index, events)
        return self.head(encoded[:, : self.config.dim], rows, candidates, encoded[:, self.config.dim :])


class SummaryRanker(nn.Module):
    """A downstream model: stage 2 on summaries that somebody else made; it never sees a history.

    Args:
        schema: of the data.
        config: of the summaries (`num_seeds`, `dim`) and of this model's stage 2.
        item_features: int64 `[num_items + 1, features]`, see `ItemEmbedding`.
    """

    def __init__(self, schema: FeatureSchema, config: VistaConfig, item_features: Tensor | None = None) -> None:
        super().__init__()
        self.schema, self.config = schema, config
        self.items = ItemEmbedding(schema, config.dim, config.embedding, item_features)
        self.events = EventEmbedding(schema, config.dim, config.embedding) if config.recent_events else None
        self.stage2 = Stage2(config)
        self.head = Head(schema, config, self.stage2.width - config.dim)
        self.dropout = nn.Dropout(config.embedding.dropout)

    def forward(
        self,
        summaries: Tensor | CachedMemory,
        candidates: Candidates,
        kv_index: Tensor,
        *,
        recent: Histories | None = None,
    ) -> Tensor:
        """Logits `[m, tasks]`; arguments as in `Vista.score`."""
        users = _check(summaries, candidates, kv_index)
        rows = self.dropout(self.items(candidates.items).to(self.head.dtype))
        newest, events = _newest(recent, self.config.recent_events, users), None
        if newest is not None and self.events is not None:
            whole = self.events(self.items(newest.items).to(rows.dtype), newest)
            events = Events(self.dropout(whole), newest.seq_offsets, newest.max_seq_len, whole)
        encoded = self.stage2(summaries, candidates, rows, kv_index, events)
        return self.head(encoded[:, : self.config.dim], rows, candidates, encoded[:, self.config.dim :])

    @classmethod
    def from_vista(cls, model: Vista) -> SummaryRanker:
        """Start from the stage 2 of a trained model: the same scores from the same summaries."""
        ranker = cls(model.schema, model.config, model.items.features)
        parts: dict[str, nn.Module] = {"items": model.items, "stage2": model.encoder.stage2, "head": model.head}
        if ranker.events is not None:
            parts["events"] = model.events
        for name, part in parts.items():
            getattr(ranker, name).load_state_dict(part.state_dict())
        return ranker


def _check(summaries: Tensor | CachedMemory, candidates: Candidates, kv_index: Tensor) -> int:
    """Refuse candidates that do not fit; of how many users histories of recent events have to be."""
    if isinstance(summaries, Tensor):
        candidates.check(kv_index, summaries.shape[0])
        return summaries.shape[0]
    candidates.check(kv_index, summaries.num_slots if summaries.policy == "raise" else None)
    return kv_index.shape[0]


def _newest(recent: Histories | None, most: int, users: int) -> Histories | None:
    """What stage 2 reads of `recent`, cut before it is embedded: the cost must not depend on what lies further back."""
    if recent is None or not most:
        return None
    if torch.compiler.is_compiling():
        return recent  # the cut reads offsets on the host; stage 2 cuts by itself
    recent.check()
    if len(recent) != users:
        raise ValueError(f"recent must be histories of {users} users, found {len(recent)}")
    return recent if recent.max_seq_len <= most else recent.suffix(most)


def _events(histories: Histories, begin: int, end: int) -> Histories:
    """The packed events `begin` to `end`, with all users."""
    offsets = histories.seq_offsets.clamp(begin, end) - begin
    items, actions, times = (x[begin:end] for x in (histories.items, histories.actions, histories.timestamps))
    return Histories(offsets, histories.max_seq_len, items, actions, times, histories.now)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; each module then gets its own mode back, since a part may be frozen in a model that trains."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
