"""Summaries of everybody into a store, and scores from it, against scores from the histories."""

import pytest
import torch

from vista_ext.runs import Run
from vista_ext.serve import summarize
from vista_ext.serve.compare import all_summaries, by_precision
from vista_ext.serve.requests import read_requests, score_requests
from vista_ext.serve.scorer import from_store, from_table, predict_from
from vista_ext.serve.summarize import first_moments, open_for_writing, refresh
from vista_ext.store import LmdbStore, MissingUserError, StoreError, VersionMismatchError
from vista_ext.train.evaluate import predict


@pytest.fixture
def store(run, tmp_path):
    with open_for_writing(tmp_path / "store", run.store_spec()) as store:
        yield store


def test_scores_from_the_store_are_those_of_the_quantized_summaries(run, store):
    before = first_moments(run.dataset, "test")
    assert refresh(run.vista, run.dataset, store, before=before) == 60
    assert refresh(run.vista, run.dataset, store, before=before, users_per_batch=7) == 60  # equal times are written
    assert len(store) == 60
    stored = predict_from(from_store(store), run.vista, run.dataset, "test", run.config.data, requests=37)
    exact = predict_from(
        from_table(all_summaries(run.vista, run.dataset, before)), run.vista, run.dataset, "test", run.config.data
    )
    change = (stored.logits.sigmoid() - exact.logits.sigmoid()).abs()
    assert 0 < change.max() < 0.01  # eight bits of a normalized summary
    # The synthetic requests are no events: each user's summary is the same at all of the split's requests, but for age.
    direct = predict(run.vista, run.dataset, "test", run.config.data)
    assert torch.equal(direct.labels, stored.labels) and torch.equal(direct.users, stored.users)
    assert (direct.logits.sigmoid() - exact.logits.sigmoid()).abs().mean() < 0.01


def test_an_older_refresh_does_not_undo_a_newer_one(run, store):
    now = run.dataset.end_of_events(torch.arange(60))
    assert refresh(run.vista, run.dataset, store, before=now) == 60
    assert refresh(run.vista, run.dataset, store, before=now - 1000) == 0


def test_long_histories_are_summarized_in_smaller_batches(run, monkeypatch):
    before = first_moments(run.dataset, "test")
    whole = all_summaries(run.vista, run.dataset, before)
    monkeypatch.setattr(summarize, "EVENT_BUDGET", 200)  # two users at a time
    sizes = [len(users) for users, _, _ in summarize.summarize_users(run.vista, run.dataset, torch.arange(60))]
    assert sum(sizes) == 60 and max(sizes) <= 3
    assert torch.allclose(all_summaries(run.vista, run.dataset, before), whole, atol=1e-5)


def test_comparisons(run):
    precision = {row.name: row for row in by_precision(run.vista, run.dataset, run.config.data, "test")}
    assert list(precision) == ["float32", "int8", "int4", "fp8_e4m3"]
    assert precision["float32"].max_change == 0
    assert 0 < precision["int8"].mean_change < precision["fp8_e4m3"].mean_change < precision["int4"].mean_change


def test_who_is_not_in_the_store_is_an_error(run, store, tmp_path):
    lookup = from_store(store)
    with pytest.raises(MissingUserError, match="1 of 1 users"):
        lookup(torch.tensor([3]))
    refresh(run.vista, run.dataset, store)
    assert lookup(torch.tensor([3])).shape == (1, 8, 32)
    store.close()
    other = run.store_spec()
    other = type(other)(other.scheme, other.tokens, other.dim, other.group, other.model_version + 1)
    with LmdbStore.open(tmp_path / "store", spec=other) as store, pytest.raises(VersionMismatchError):
        from_store(store)(torch.tensor([3]))
    wrong = type(other)("int4", other.tokens, other.dim)
    with pytest.raises(StoreError, match="scheme: expected 'int4', found 'int8'"):
        LmdbStore.open(tmp_path / "store", spec=wrong)


def test_requests_by_source_ids(trained, tmp_path):
    run = Run.open(trained, [f"store.path={tmp_path / 'store'}"])
    with open_for_writing(run.store_path, run.store_spec()) as store:
        refresh(run.vista, run.dataset, store)
    users, items = run.dataset.user_sources, run.dataset.item_sources
    file = tmp_path / "requests.csv"
    file.write_text(f"item,user\n{items[4]},{users[1]}\n{items[0]},{users[1]}\n{items[4]},{users[0]}\n")
    requests = read_requests(file, run.dataset)
    scores = score_requests(run, requests)
    assert [(user, item) for user, item, _ in scores] == [
        (users[1], items[4]),
        (users[1], items[0]),
        (users[0], items[4]),
    ]
    alone = score_requests(run, requests[2:])
    assert alone[0][2] == pytest.approx(scores[2][2], abs=1e-6)
    assert score_requests(run, []) == []
    with pytest.raises(ValueError, match="nobody"):
        score_requests(run, [("nobody", items[0], {})])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"user\n1\n", "columns user, item"),
        (b"user,item,colour\n1,2,3\n", "columns user, item"),
        (b"user,item\n1,\n", "a user and an item in line 2"),
        (b"\xff\xfe", "CSV"),
        (b"", "columns user, item"),
    ],
)
def test_bad_requests(run, tmp_path, content, message):
    file = tmp_path / "requests.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_requests(file, run.dataset)
