"""Who is due for a refresh, and summaries from states instead of whole histories."""

from itertools import pairwise

import pytest
import torch

from vista_ext import ops
from vista_ext.data.batch import Histories
from vista_ext.models import Vista, VistaConfig
from vista_ext.models.config import EmbeddingConfig
from vista_ext.serve.incremental import RefreshPolicy, extend, refresh_due
from vista_ext.serve.summarize import open_for_writing, refresh, summarize_users
from vista_ext.store import ReadPolicy
from vista_ext.store.states import StateStore


@pytest.fixture
def store(run, tmp_path):
    with open_for_writing(tmp_path / "store", run.store_spec()) as store:
        yield store


def times(store, users=60):
    return store.find(torch.arange(users)).event_times


def test_events_since_counts_what_histories_hold(run):
    data, users = run.dataset, torch.arange(60)
    end = data.end_of_events(users)
    for since in (torch.zeros_like(end), end - 500, end):
        counts, first = data.events_since(users, since)
        whole = data.histories(users, None, 10**6)
        for user in range(60):
            own = whole.timestamps[whole.seq_offsets[user] : whole.seq_offsets[user + 1]]
            later = own[own >= since[user]]
            assert counts[user] == len(later) and first[user] == (later.min() if len(later) else -1)
    counts, first = data.events_since(users, end - 500, end - 600)
    assert not counts.any() and (first == -1).all()


def test_who_is_due():
    counts, first = torch.tensor([0, 1, 5, 1]), torch.tensor([-1, 90, 90, 10])
    assert RefreshPolicy(min_events=5).due(counts, first, 100).tolist() == [False, False, True, False]
    assert RefreshPolicy(min_events=5, max_wait=50).due(counts, first, 100).tolist() == [False, False, True, True]
    assert RefreshPolicy(min_events=0).due(counts, first, 100).all()
    for bad in ({"min_events": -1}, {"max_wait": 1.5}, {"max_history": True}):
        with pytest.raises(ValueError, match=f"policy: {next(iter(bad))} must be an integer"):
            RefreshPolicy(**bad)


def test_only_who_is_due_is_summarized(run, store):
    data, users = run.dataset, torch.arange(60)
    early = int(data.end_of_events(users).min()) - 400
    policy = RefreshPolicy(min_events=10)
    first = refresh_due(run.vista, data, store, policy, now=early)
    assert (first.users, first.due, first.written) == (60, 60, 60)  # nobody had one
    assert str(refresh_due(run.vista, data, store, policy, now=early)) == "60 users, 0 due, 0 summaries written"
    counts, _ = data.events_since(users, times(store))
    assert (counts >= 10).any() and (counts < 10).any()
    assert refresh_due(run.vista, data, store, policy).due == int((counts >= 10).sum())
    assert torch.equal(times(store) > early, counts >= 10)
    assert refresh_due(run.vista, data, store, RefreshPolicy(10, max_wait=0)).due == int(
        ((counts < 10) & (counts > 0)).sum()
    )
    assert refresh_due(run.vista, data, store, RefreshPolicy(0)).written == 60


def test_the_erased_are_left_out(run, store, states):
    """Until they come back; of a state of before nothing is used then."""
    data, users = run.dataset, torch.arange(60)
    ends = data.end_of_events(users)
    early = int(ends.min()) - 400
    refresh_due(run.vista, data, store, RefreshPolicy(), states=states, now=early)
    gone, back, unknown = 3, 5, 10**6
    until = torch.tensor([int(ends[gone]), early, 1])
    store.erase(torch.tensor([gone, back, unknown]), until)
    for _ in range(2):
        done = refresh_due(run.vista, data, store, RefreshPolicy(0), states=states, now=early)
        assert (done.users, done.erased, done.due, done.written) == (60, 2, 58, 58)
        assert str(done).startswith("60 users, 2 erased, 58 due")
        assert not states.find(torch.tensor([gone, back])).hits.any()
    done = refresh_due(run.vista, data, store, RefreshPolicy(0), states=states)
    assert (done.erased, done.due, done.written, done.extended) == (1, 59, 59, 58)
    assert store.find(users, ReadPolicy(on_miss="flag")).hits.tolist() == [user != gone for user in range(60)]


def test_the_erased_stay_so_when_time_passes(run, store, states):
    """A moment after the erasure brings nobody back: later events do."""
    data, users = run.dataset, torch.arange(60)
    ends = data.end_of_events(users)
    now = int(ends.max()) + 10**6
    gone, back = 3, 5
    store.erase(torch.tensor([gone, back]), torch.tensor([int(ends[gone]), int(ends[back]) - 1]))
    for _ in range(2):
        done = refresh_due(run.vista, data, store, RefreshPolicy(0), states=states, now=now)
        assert (done.erased, done.due, done.written) == (1, 59, 59)
        assert store.find(users, ReadPolicy(on_miss="flag")).hits.tolist() == [user != gone for user in range(60)]
        assert not states.find(torch.tensor([gone])).hits.any()
        now += 1


def test_a_refresh_of_all_is_the_batch_job(run, store, tmp_path):
    refresh_due(run.vista, run.dataset, store, RefreshPolicy())
    with open_for_writing(tmp_path / "other", run.store_spec()) as other:
        refresh(run.vista, run.dataset, other)
        assert torch.equal(store.find(torch.arange(60)).rows, other.find(torch.arange(60)).rows)
    refresh_due(run.vista, run.dataset, store, RefreshPolicy(0, max_history=7))
    parts = [s for _, s, _ in summarize_users(run.vista, run.dataset, torch.arange(60), max_history=7)]
    assert torch.cat(parts).shape[0] == 60


@pytest.fixture
def states(run, tmp_path):
    with StateStore.open(tmp_path / "states", run.state_spec()) as states:
        yield states


def summaries_in(store, users=60):
    spec = store.spec
    return ops.dequantize_rows(store.find(torch.arange(users)).rows, spec.tokens, spec.dim)


def steps_of(run, n):
    """Moments that lead to the end of everybody's events."""
    end = run.dataset.end_of_events(torch.arange(60))
    return [int(end.min()) - 400 + (int(end.max()) - int(end.min()) + 400) * i // n for i in range(n + 1)]


def test_refresh_from_states(run, store, states):
    """Summaries of the states' own arithmetic; each user's events are read once until the history is read again."""
    policy = RefreshPolicy(recompute_after=2)
    expected, updates = run.vista.encoder.summarizer.empty_states(60), torch.zeros(60, dtype=torch.int64)
    before = None
    for step, now in enumerate(steps_of(run, 6)):
        moment = torch.full((60,), now)
        due = torch.ones(60, dtype=torch.bool)
        if before is not None:
            due = run.dataset.events_since(torch.arange(60), before, moment)[0] > 0
        old = due & (updates < 2) if step else torch.zeros_like(due)
        done = refresh_due(run.vista, run.dataset, store, policy, states=states, now=now, users_per_batch=7)
        assert (done.due, done.written, done.extended) == (int(due.sum()), int(due.sum()), int(old.sum()))
        updates = torch.where(old, updates + 1, torch.where(due, 0, updates))
        for user in torch.nonzero(due)[:, 0].tolist():
            mine = torch.tensor([user])
            since = before[mine] if old[user] else None
            new = run.dataset.histories(mine, now, 10**6, since=since)
            if not old[user]:
                expected[user] = 0
            length = run.dataset.histories(mine, now, 10**6).seq_offsets.diff()
            right = extend(run.vista, expected[user : user + 1], length, new)
            assert torch.allclose(summaries_in(store)[user], right[0], atol=0.03)  # of eight bits
        found = states.find(torch.arange(60))
        assert torch.allclose(found.values, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.updates, updates) and found.hits.all()
        before = moment if before is None else torch.where(due, moment, before)
        assert torch.equal(found.event_times, before)
        assert torch.equal(found.events, run.dataset.histories(torch.arange(60), before, 10**6).seq_offsets.diff())


def test_without_ages_states_give_what_the_whole_history_gives(run, store, states):
    """One layer and no ages: exact, however many updates; a bounded history forgets at each recomputation."""
    config = VistaConfig(dim=32, num_seeds=8, heads=2, embedding=EmbeddingConfig(time_buckets=0))
    torch.manual_seed(0)
    model = Vista(run.dataset.schema, config, run.dataset.item_features).eval()
    for now in steps_of(run, 5):
        refresh_due(model, run.dataset, store, RefreshPolicy(), states=states, now=now)
    updates = states.find(torch.arange(60)).updates
    assert updates.max() >= 3
    moments = states.find(torch.arange(60)).event_times
    whole = model.summarize(run.dataset.histories(torch.arange(60), moments, 10**6))
    assert torch.allclose(summaries_in(store), whole, atol=0.03)
    forgetful = RefreshPolicy(0, max_history=5, recompute_after=0)
    refresh_due(model, run.dataset, store, forgetful, states=states, now=int(moments.max()))
    assert states.find(torch.arange(60)).events.eq(5).all()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("where", ["states", "store"])
def test_cut_off_between_state_and_summary_nothing_is_added_twice(run, store, states, monkeypatch, where):
    early, late = steps_of(run, 2)[1:]
    refresh_due(run.vista, run.dataset, store, RefreshPolicy(), states=states, now=early)
    victim = type(states) if where == "states" else type(store)
    write, left = victim.insert, [2]

    def dying(*arguments):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return write(*arguments)

    monkeypatch.setattr(victim, "insert", dying)
    with pytest.raises(Killed):
        refresh_due(run.vista, run.dataset, store, RefreshPolicy(), states=states, now=late, users_per_batch=9)
    monkeypatch.undo()
    refresh_due(run.vista, run.dataset, store, RefreshPolicy(), states=states, now=late, users_per_batch=9)
    found = states.find(torch.arange(60))
    assert torch.equal(
        found.events, run.dataset.histories(torch.arange(60), found.event_times, 10**6).seq_offsets.diff()
    )
    assert torch.equal(found.event_times, times(store))


def test_states_come_with_the_summary(run):
    """As `extend_` makes them of everything at once, also chunk by chunk and user by user."""
    histories = run.dataset.histories(torch.arange(60), None, 10**6)
    right = run.vista.encoder.summarizer.empty_states(60)
    summaries = extend(run.vista, right, histories.seq_offsets.diff(), histories)
    for options in ({}, {"chunk": 100}, {"deterministic": True}):
        states = torch.full_like(right, 9.0)
        found = run.vista.summarize(histories, states=states, **options)
        assert torch.allclose(states, right, atol=1e-4) and torch.allclose(found, summaries, atol=1e-5)


def parts_of(histories, cuts):
    """The events of all users between cuts (fractions), each part read at the moment of the whole."""
    lengths = histories.seq_offsets.diff()
    bounds = [(lengths * cut).long() for cut in cuts]
    for low, high in pairwise(bounds):
        kept = high - low
        offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
        start = histories.seq_offsets[:-1] + low - offsets[:-1]
        index = torch.arange(int(offsets[-1])) + torch.repeat_interleave(start, kept)
        events = (x[index] for x in (histories.items, histories.actions, histories.timestamps))
        yield Histories(offsets, int(kept.max()), *events, histories.now), high


@pytest.mark.parametrize("seeds", ["source", "target"])
@pytest.mark.parametrize("layers", [1, 2])
def test_states_add_up(run, seeds, layers):
    """Exact with one layer, close with more."""
    config = VistaConfig(dim=32, num_seeds=4, heads=2, summary_layers=layers, seeds=seeds, embedding=EmbeddingConfig())
    torch.manual_seed(0)
    model = Vista(run.dataset.schema, config, run.dataset.item_features).eval()
    histories = run.dataset.histories(torch.arange(60), None, 10**6)
    whole = model.summarize(histories)
    states = model.encoder.summarizer.empty_states(60)
    for part, lengths in parts_of(histories, (0, 0.5, 0.9, 0.9, 1)):
        found = extend(model, states, lengths, part)
    error = (found - whole).norm() / whole.norm()
    assert error < 1e-5 if layers == 1 else 1e-5 < error < 0.5


def test_states_of_nothing(run):
    model = run.vista.eval()
    histories = run.dataset.histories(torch.arange(5), 0, 10)
    states = model.encoder.summarizer.empty_states(5)
    assert torch.allclose(
        extend(model, states, torch.zeros(5).long(), histories), model.summarize(histories), atol=1e-6
    )
    assert not states.any()
