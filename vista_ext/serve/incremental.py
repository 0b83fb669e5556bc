"""Refresh as events arrive: whose summary is due, and what a summary costs that does not read the whole history."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vista_ext import ops
from vista_ext.data.batch import Histories
from vista_ext.data.dataset import EventDataset
from vista_ext.models import Vista
from vista_ext.processes import Processes
from vista_ext.progress import track
from vista_ext.serve.summarize import history_batches, summarize_users
from vista_ext.store import ReadPolicy, SummaryStore
from vista_ext.store.base import NEVER
from vista_ext.store.checks import check_integer
from vista_ext.store.states import StateStore

_LOOK = 1024  # users whose stored summaries are looked at together


@dataclass(frozen=True)
class RefreshPolicy:
    """When a stored summary is due, and how much is read to make it anew. Who has no summary is always due.

    Args:
        min_events: that many events that the summary does not have; 0 to refresh everybody.
        max_wait: or seconds since the first of these, however few they are; None for no limit.
        max_history: newest events read; 0 for all. Bounds the cost, and forgets what lies before.
        recompute_after: where states are kept: so many times new events are added to one, then the history is read
            anew. Each time adds to the drift, since what was added keeps the ages that it had (docs/delivery.md).

    Raises:
        ValueError: naming the argument, what was expected and what was found.
    """

    min_events: int = 1
    max_wait: int | None = None
    max_history: int = 0
    recompute_after: int = 20

    def __post_init__(self) -> None:
        check_integer("policy", "min_events", self.min_events, 0)
        check_integer("policy", "max_history", self.max_history, 0)
        check_integer("policy", "recompute_after", self.recompute_after, 0)
        if self.max_wait is not None:
            check_integer("policy", "max_wait", self.max_wait, 0)

    def due(self, new_events: Tensor, first_times: Tensor, now: Tensor | int) -> Tensor:
        """bool `[n]`: who is due at a moment.

        Args:
            new_events, first_times: as `EventDataset.events_since` gives them for the stored event times.
            now: seconds, one or `[n]`.
        """
        due = new_events >= self.min_events
        if self.max_wait is not None:
            due |= (new_events > 0) & (torch.as_tensor(now) - first_times >= self.max_wait)
        return due


@dataclass(frozen=True)
class Refreshed:
    """What a refresh did: users looked at, due, and summaries written (the others were overtaken meanwhile); of the
    due, those whose new events were added to a stored state; and those who are not due because they are erased."""

    users: int
    due: int
    written: int
    extended: int = 0
    erased: int = 0

    def __str__(self) -> str:
        how = f" ({self.extended} from states)" if self.extended else ""
        left_out = f", {self.erased} erased" if self.erased else ""
        return f"{self.users} users{left_out}, {self.due} due{how}, {self.written} summaries written"


@torch.no_grad()
def refresh_due(
    model: Vista,
    dataset: EventDataset,
    store: SummaryStore,
    policy: RefreshPolicy,
    *,
    states: StateStore | None = None,
    now: int | None = None,
    users_per_batch: int = 256,
    processes: Processes | None = None,
) -> Refreshed:
    """Summarize whose stored summary is due by a policy. Killed and begun again, it goes on with who is still due. Who
    is erased, and has not come back since, is left out.

    Args:
        states: where states are kept: who has one pays for the new events alone. A state tells how far it has read, so
            that it may lag behind the summary, or be ahead, whatever is interrupted when. Those of before the store's
            erasures are erased.
        now: the moment, seconds: only earlier events are read. None: after the last event of each user.
        processes: among which users are shared, joined if there are several; this one alone by default.

    Returns:
        The counts over all processes, in each of them.
    """
    processes = processes or Processes()
    everybody = torch.arange(dataset.num_users)[processes.rank :: processes.size]
    spec = store.spec
    due = written = extended = erased = 0
    erasures = store.erasures()
    if states is not None:
        states.erase(erasures.user_ids, erasures.until)
    for users in track(everybody.split(_LOOK), "looking for who is due", len(everybody), unit="users", size=len):
        stored = store.find(users, ReadPolicy(on_miss="flag", on_version_mismatch="miss"))
        moments = dataset.end_of_events(users) if now is None else torch.full_like(users, now)
        counts, first_times = dataset.events_since(users, stored.event_times, moments)
        until = erasures.until_of(users)
        later, _ = dataset.events_since(users, until, moments)  # by their own times: `now` is past every erasure soon
        gone = (until > NEVER) & (later == 0)
        chosen = (policy.due(counts, first_times, moments) | ~stored.hits) & ~gone
        who, when = users[chosen], moments[chosen]
        for some, summaries, times, old in _renew(model, dataset, states, policy, who, when, users_per_batch):
            rows = ops.quantize_rows(summaries, scheme=spec.scheme, group=spec.group)
            written += store.insert(some, rows, times)
            extended += old
        due += len(who)
        erased += int(gone.sum())
    return Refreshed(*processes.sum(torch.tensor([len(everybody), due, written, extended, erased])).tolist())


def _renew(
    model: Vista,
    dataset: EventDataset,
    states: StateStore | None,
    policy: RefreshPolicy,
    users: Tensor,
    before: Tensor,
    users_per_batch: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Summaries of users at moments: users, summaries, times, and how many of them from states."""
    if states is None:
        for some, summaries, times in summarize_users(
            model, dataset, users, before=before, max_history=policy.max_history, users_per_batch=users_per_batch
        ):
            yield some, summaries, times, 0
        return
    device = next(model.parameters()).device
    for who, when in zip(users.split(users_per_batch), before.split(users_per_batch), strict=True):
        found = states.find(who)
        old = found.hits & (found.updates < policy.recompute_after) & (found.event_times <= when)
        begin = 0
        for some, new in history_batches(dataset, who[old], when[old], since=found.event_times[old]):
            part = torch.nonzero(old)[begin : begin + len(some), 0]
            begin += len(some)
            lengths = found.events[part] + new.seq_offsets.diff()
            values = found.values[part].to(device)
            summaries = extend(model, values, lengths.to(device), new.to(device)).cpu()
            states.insert(some, values.cpu(), lengths, found.updates[part] + 1, new.now)
            yield some, summaries, new.now, len(some)
        for some, whole in history_batches(dataset, who[~old], when[~old], policy.max_history):
            values = model.encoder.summarizer.empty_states(len(some), device)
            summaries = model.summarize(whole.to(device), states=values).cpu()
            lengths = whole.seq_offsets.diff()
            states.insert(some, values.cpu(), lengths, torch.zeros_like(lengths), whole.now)
            yield some, summaries, whole.now, 0


@torch.no_grad()
def extend(model: Vista, states: Tensor, lengths: Tensor, new: Histories) -> Tensor:
    """Summaries after new events, from the states of the events before (`Summarizer.extend_`): `[n, seeds, dim]`.

    Args:
        model: in evaluation mode.
        states: float32, as `Summarizer.empty_states` or an earlier call left them; changed in place.
        lengths: int64 `[n]`, events of each user, the new ones included.
        new: the new events. Each keeps the age that it has now, where a full summary would let it grow older.
    """
    new.check()
    events = model.embed(new).rows
    return model.encoder.summarizer.extend_(states, lengths, events, new.seq_offsets, new.max_seq_len)
