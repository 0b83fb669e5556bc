"""Who is due for a refresh, and summaries from states instead of whole histories."""

from itertools import pairwise

import pytest
import torch

from vista_ext.data.batch import Histories
from vista_ext.models import Vista, VistaConfig
from vista_ext.models.config import EmbeddingConfig
from vista_ext.serve.incremental import RefreshPolicy, extend, refresh_due
from vista_ext.serve.summarize import open_for_writing, refresh, summarize_users


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


def test_a_refresh_of_all_is_the_batch_job(run, store, tmp_path):
    refresh_due(run.vista, run.dataset, store, RefreshPolicy())
    with open_for_writing(tmp_path / "other", run.store_spec()) as other:
        refresh(run.vista, run.dataset, other)
        assert torch.equal(store.find(torch.arange(60)).rows, other.find(torch.arange(60)).rows)
    refresh_due(run.vista, run.dataset, store, RefreshPolicy(0, max_history=7))
    parts = [s for _, s, _ in summarize_users(run.vista, run.dataset, torch.arange(60), max_history=7)]
    assert torch.cat(parts).shape[0] == 60


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
