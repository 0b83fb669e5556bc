"""The refresh job: every user's history becomes a quantized row in the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vista_ext import ops
from vista_ext.data.batch import Histories
from vista_ext.data.dataset import EventDataset
from vista_ext.models import Vista, VistaConfig
from vista_ext.ops.cache_rows import Scheme
from vista_ext.progress import track
from vista_ext.store import (
    LmdbStore,
    RedisConfig,
    RedisStore,
    StoreError,
    StoreSpec,
    StoreUnavailableError,
    SummaryStore,
)

# Events summarized together: bounds the memory of a batch of users, however long their histories are.
EVENT_BUDGET = 1 << 20


def store_spec(config: VistaConfig, scheme: Scheme, group: int, model_version: int) -> StoreSpec:
    """How the summaries of a model lie in a store; group 0 is the scheme's default."""
    return StoreSpec(scheme, config.num_seeds, config.dim, group or None, model_version)


def open_for_writing(path: Path, spec: StoreSpec) -> LmdbStore:
    """The store at a path, made if it is not there yet; several processes may do this at once."""
    if not path.exists():
        try:
            return LmdbStore.create(path, spec)
        except StoreError:
            if not path.exists():  # else another process was faster
                raise
    return LmdbStore.open(path, readonly=False, spec=spec)


def open_on_server(config: RedisConfig, spec: StoreSpec) -> RedisStore:
    """The store on a server, made if it is not there yet; several processes may do this at once."""
    try:
        return RedisStore.create(config, spec)
    except StoreUnavailableError:
        raise
    except StoreError:  # there is one
        return RedisStore.open(config, spec=spec)


def summarize_users(
    model: Vista,
    dataset: EventDataset,
    users: Tensor,
    *,
    before: Tensor | None = None,
    max_history: int = 0,
    skip_last: int = 0,
    users_per_batch: int = 256,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Summaries of users, a batch at a time.

    Args:
        users: int64 `[n]`.
        before: int64 `[n]`, seconds: only earlier events are read; all by default.
        max_history: newest events read of each user; 0 for all.
        skip_last: newest events left out, as if the summary were that old.

    Yields:
        users `[b]`, summaries `[b, seeds, dim]`, and the int64 times `[b]` that they stand for (seconds).
    """
    device = next(model.parameters()).device
    batches = history_batches(dataset, users, before, max_history, skip_last, users_per_batch)
    for chosen, histories in track(batches, "summarizing", len(users), unit="users", size=lambda b: len(b[0])):
        yield chosen, model.summarize(histories.to(device)).cpu(), histories.now


def history_batches(
    dataset: EventDataset,
    users: Tensor,
    before: Tensor | None,
    max_history: int = 0,
    skip_last: int = 0,
    users_per_batch: int = 256,
    since: Tensor | None = None,
) -> Iterator[tuple[Tensor, Histories]]:
    """Users and their histories, as many at a time as fit the event budget; arguments as for `summarize_users`, and
    `since` as for `EventDataset.histories`."""
    begin = 0
    most = max_history or 2**62
    while begin < len(users):
        size = min(users_per_batch, len(users) - begin)
        while True:
            chosen = users[begin : begin + size]
            moments = None if before is None else before[begin : begin + size]
            earliest = None if since is None else since[begin : begin + size]
            histories = dataset.histories(chosen, moments, most, skip_last, earliest)
            if size == 1 or int(histories.seq_offsets[-1]) <= EVENT_BUDGET:
                break
            size = (size + 1) // 2
        yield chosen, histories
        begin += size


@torch.no_grad()
def refresh(
    model: Vista,
    dataset: EventDataset,
    store: SummaryStore,
    *,
    users: Tensor | None = None,
    before: Tensor | None = None,
    max_history: int = 0,
    users_per_batch: int = 256,
) -> int:
    """Summarize users into a store. Killed and begun again it repeats work but loses and doubles nothing.

    Args:
        users: int64 `[n]`; everybody by default. The other arguments are those of `summarize_users`.

    Returns:
        How many rows were written; a newer row that was there already stays.
    """
    written = 0
    chosen = torch.arange(dataset.num_users) if users is None else users
    spec = store.spec
    batches = summarize_users(
        model, dataset, chosen, before=before, max_history=max_history, users_per_batch=users_per_batch
    )
    for some, summaries, times in batches:
        rows = ops.quantize_rows(summaries, scheme=spec.scheme, group=spec.group)
        written += store.insert(some, rows, times)
    return written


def first_moments(dataset: EventDataset, split: str) -> Tensor:
    """For each user the time of the first sample in a split, where a summary for it must stop reading; for a user
    without samples there the end of the events. int64 `[users]`, seconds."""
    moments = dataset.end_of_events(torch.arange(dataset.num_users)).clone()
    samples = dataset.samples(split)
    # Samples are sorted by user and time: written from the back, the first one stays.
    moments[samples.users.flip(0)] = samples.timestamps.flip(0)
    return moments
