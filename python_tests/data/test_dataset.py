"""Histories and batches against loops in Python over the same rows."""

import json
from itertools import chain

import numpy as np
import pytest
import torch

from vista_ext.data.batch import FeatureSchema
from vista_ext.data.dataset import SPLITS, DataError, EventDataset, write_dataset

USERS, ITEMS = 23, 40
SCHEMA = FeatureSchema(ITEMS, 5, {"genre": 7, "year": 3}, {"tab": 4}, ("click", "like"))


def made_up(seed=0):
    """Unsorted rows with many equal timestamps; the last user has no event, the first no sample."""
    rng = np.random.default_rng(seed)
    events, samples = 900, 700
    return {
        "name": "made up",
        "schema": SCHEMA,
        "source": "rng",
        "items": {
            "source_id": [f"i{i}" for i in range(1, ITEMS + 1)],
            "genre": rng.integers(0, 7, ITEMS),
            "year": rng.integers(0, 3, ITEMS),
        },
        "users": {"source_id": [f"u{i}" for i in range(USERS)]},
        "events": {
            "user_id": rng.integers(0, USERS - 1, events),
            "timestamp": 1000 + rng.integers(0, 60, events),
            "item_id": rng.integers(0, ITEMS + 1, events),
            "action": rng.integers(0, 5, events),
        },
        "samples": {
            "user_id": rng.integers(1, USERS, samples),
            "timestamp": 990 + rng.integers(0, 80, samples),
            "item_id": rng.integers(1, ITEMS + 1, samples),
            "split": np.array(SPLITS)[rng.integers(0, 3, samples)],
            "label_click": rng.integers(0, 2, samples),
            "label_like": rng.random(samples).astype(np.float32),
            "ctx_tab": rng.integers(0, 4, samples),
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set"
    write_dataset(path, **made_up())
    return path


@pytest.fixture(scope="module")
def dataset(folder):
    return EventDataset(folder)


@pytest.mark.parametrize(
    "nothing", [[], np.zeros(0, dtype=object), np.zeros(0, dtype=str)], ids=["list", "object", "str"]
)
def test_a_set_without_samples_or_events(tmp_path, nothing):
    given = made_up()
    for table in ("events", "samples"):
        columns = {column: np.zeros(0, dtype=np.int64) for column in given[table]}
        given[table] = {**columns, "split": nothing} if table == "samples" else columns
    if isinstance(nothing, list):
        given["events"] = dict.fromkeys(given["events"], nothing)
    write_dataset(tmp_path / "set", **given)
    dataset = EventDataset(tmp_path / "set")
    assert [dataset.split_size(split) for split in SPLITS] == [0, 0, 0]
    assert list(dataset.batches("train", requests_per_batch=4, max_history=5)) == []
    assert len(dataset.histories(torch.arange(USERS), None, 5)) == USERS


def events_before(user, before):
    """(item, action, timestamp) of a user's events, oldest first, ties in the order they were given in."""
    events = made_up()["events"]
    rows = [
        i for i in range(len(events["user_id"])) if events["user_id"][i] == user and events["timestamp"][i] < before
    ]
    rows.sort(key=lambda i: events["timestamp"][i])
    return [(events["item_id"][i], events["action"][i], events["timestamp"][i]) for i in rows]


def as_rows(histories, i):
    begin, end = histories.seq_offsets[i : i + 2].tolist()
    columns = (histories.items, histories.actions, histories.timestamps)
    return list(zip(*(column[begin:end].tolist() for column in columns), strict=True))


@pytest.mark.parametrize(("max_history", "skip_last"), [(1000, 0), (7, 0), (7, 3), (0, 0), (5, 1000)])
def test_histories_are_the_last_events_strictly_before(dataset, max_history, skip_last):
    users = torch.arange(USERS).repeat(4)
    before = torch.arange(len(users)) % 66 + 997
    got = dataset.histories(users, before, max_history, skip_last)
    assert len(got) == len(users)
    assert torch.equal(got.now, before)
    for i, (user, moment) in enumerate(zip(users.tolist(), before.tolist(), strict=True)):
        expected = events_before(user, moment)
        expected = expected[: max(len(expected) - skip_last, 0)][-max_history or len(expected) :]
        assert as_rows(got, i) == expected
    assert got.max_seq_len == got.seq_offsets.diff().max()
    assert {x.dtype for x in (got.seq_offsets, got.items, got.actions, got.timestamps, got.now)} == {torch.int64}


def test_histories_without_a_moment_end_after_the_last_event(dataset):
    got = dataset.histories(torch.tensor([3, USERS - 1, 3]), None, 1000)
    everything = events_before(3, 10**9)
    assert as_rows(got, 0) == as_rows(got, 2) == everything
    assert as_rows(got, 1) == []
    assert got.now.tolist() == [everything[-1][2] + 1, 0, everything[-1][2] + 1]
    assert dataset.end_of_events(3) == everything[-1][2] + 1
    assert len(dataset.histories(torch.tensor([], dtype=torch.int64), None, 5)) == 0


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("window", [0, 4, 10**6])
def test_batches_hold_every_sample_once_with_its_history(dataset, split, window):
    rows = made_up()["samples"]
    samples = sorted(
        (u, t, i, c, k, like)
        for u, t, i, s, k, like, c in zip(*(np.asarray(x).tolist() for x in rows.values()), strict=True)
        if s == split
    )
    requests = []
    for sample in samples:
        if requests and requests[-1][0][0] == sample[0] and sample[1] <= requests[-1][0][1] + window:
            requests[-1].append(sample)
        else:
            requests.append([sample])

    batches = list(dataset.batches(split, requests_per_batch=16, max_history=9, request_window=window))
    assert len(batches) == dataset.num_batches(split, 16, window) == -(-len(requests) // 16)
    found = []
    for batch in batches:
        offsets = batch.candidates.offsets.tolist()
        assert torch.equal(batch.kv_index, torch.arange(len(offsets) - 1))
        assert batch.candidates.max_len == max(np.diff(offsets))
        columns = (batch.users, batch.timestamps, batch.candidates.items, batch.candidates.context[:, 0])
        values = list(zip(*(x.tolist() for x in (*columns, *batch.labels.T)), strict=True))
        for i in range(len(offsets) - 1):
            request = values[offsets[i] : offsets[i + 1]]
            user, moment = request[0][:2]
            assert as_rows(batch.histories, i) == events_before(user, moment)[-9:]
            assert batch.histories.now[i] == moment
            found.append(sorted(request))
    assert found == [sorted(request) for request in requests]
    assert sum(map(len, found)) == dataset.split_size(split)


@pytest.mark.parametrize("window", [0, 4, 10**6])
def test_requests_within_a_window_share_the_history_of_the_first(dataset, window):
    alone = list(dataset.batches("train", requests_per_batch=1, max_history=9, request_window=2))
    groups = []  # of the requests' indices
    for i, batch in enumerate(alone):
        user, moment = int(batch.users[0]), int(batch.histories.now[0])
        if window and groups:
            first = alone[groups[-1][0]]
            if int(first.users[0]) == user and moment <= int(first.histories.now[0]) + window:
                groups[-1].append(i)
                continue
        groups.append([i])
    sizes = {"requests_per_batch": 3, "request_window": 2, "share_window": window}
    shared = list(dataset.batches("train", max_history=9, **sizes))
    assert len(shared) == dataset.num_batches("train", 3, 2, window) == -(-len(groups) // 3)
    for index, batch in enumerate(shared):
        mine = groups[3 * index : 3 * index + 3]
        assert len(batch.histories) == len(mine)
        assert batch.kv_index.tolist() == [i for i, group in enumerate(mine) for _ in group]
        members = [alone[i] for group in mine for i in group]
        assert torch.equal(batch.candidates.offsets.diff(), torch.tensor([len(m.users) for m in members]))
        assert torch.equal(batch.candidates.items, torch.cat([m.candidates.items for m in members]))
        for i, group in enumerate(mine):
            first = alone[group[0]].histories
            assert as_rows(batch.histories, i) == as_rows(first, 0) and batch.histories.now[i] == first.now[0]
    if window == 10**6:
        assert max(map(len, groups)) > 1


def test_histories_since_a_moment(dataset):
    users = torch.arange(USERS)
    end = dataset.end_of_events(users)
    for since in (end - 10, end, torch.zeros_like(end)):
        for most in (3, 10**6):
            found = dataset.histories(users, end - 2, most, since=since)
            for user in range(USERS):
                later = [e for e in events_before(user, int(end[user]) - 2) if e[2] >= since[user]]
                assert as_rows(found, user) == later[-most:]
    assert torch.equal(dataset.histories(users, None, 10**6, since=end - 9).seq_offsets.diff(),
                       dataset.events_since(users, end - 9)[0])  # fmt: skip
    with pytest.raises(ValueError, match=r"since must have the shape \(2,\), found \(1,\)"):
        dataset.histories(users[:2], None, 5, since=end[:1])


def test_parts_of_batches_are_whole_histories(dataset):
    sizes = {"requests_per_batch": 7, "max_history": 5, "share_window": 5, "shuffle_seed": 3}
    whole = list(dataset.batches("train", **sizes))
    parts = [list(dataset.batches("train", part=(i, 3), **sizes)) for i in range(3)]
    assert [len(part) for part in parts] == [len(whole)] * 3
    for batch, *pieces in zip(whole, *parts, strict=True):
        moments = [piece.histories.now.tolist() for piece in pieces]
        assert moments == [batch.histories.now[i::3].tolist() for i in range(3)]
        assert sorted(torch.cat([p.candidates.items for p in pieces]).tolist()) == sorted(
            batch.candidates.items.tolist()
        )
    assert any(len(piece.histories) == 0 for piece in parts[2]) or len(whole[-1].histories) > 2
    for part in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"part must be \(i, n\)"):
            dataset.batches("train", part=part, **sizes)


def test_samples_are_in_the_order_of_unshuffled_batches(dataset):
    samples = dataset.samples("valid")
    batches = list(dataset.batches("valid", requests_per_batch=10, max_history=3, request_window=5))
    assert torch.equal(torch.cat([b.labels for b in batches]), samples.labels)
    assert torch.equal(torch.cat([b.candidates.items for b in batches]), samples.items)


def test_shuffled_passes_repeat_differ_by_seed_and_resume(dataset):
    def passes(**options):
        batches = dataset.batches("train", requests_per_batch=8, max_history=5, **options)
        return [batch.candidates.items.tolist() for batch in batches]

    shuffled = passes(shuffle_seed=1)
    assert shuffled == passes(shuffle_seed=1)
    assert shuffled != passes(shuffle_seed=2)
    assert sorted(chain(*shuffled)) == sorted(chain(*passes()))
    assert passes(shuffle_seed=1, start_batch=3) == shuffled[3:]
    assert passes(start_batch=10**6) == []


def test_ids_and_features(dataset):
    items = made_up()["items"]
    assert (dataset.name, dataset.source, dataset.schema, dataset.num_users) == ("made up", "rng", SCHEMA, USERS)
    assert dataset.item_features.shape == (ITEMS + 1, 2)
    assert dataset.item_features[0].tolist() == [0, 0]
    assert dataset.item_features[1:, 0].tolist() == items["genre"].tolist()
    assert dataset.user_index("u7") == 7
    assert dataset.item_index("i7") == 7
    assert dataset.item_sources[dataset.item_index("i9") - 1] == "i9"
    with pytest.raises(DataError, match=r"users\.parquet: source_id: expected 'nobody', found no such id"):
        dataset.user_index("nobody")


def test_schema_without_features_or_events(tmp_path):
    none = np.zeros(0, np.int64)
    write_dataset(
        tmp_path / "x",
        name="x",
        schema=FeatureSchema(1, 1),
        source="",
        items={"source_id": ["a"]},
        users={"source_id": ["b"]},
        events={"user_id": none, "timestamp": none, "item_id": none, "action": none},
        samples={"user_id": [0], "timestamp": [5], "item_id": [1], "split": ["train"], "label_label": [1.0]},
    )
    dataset = EventDataset(tmp_path / "x")
    (batch,) = dataset.batches("train", requests_per_batch=4, max_history=4)
    assert batch.candidates.context.shape == (1, 0)
    assert dataset.item_features.shape == (2, 0)
    assert batch.histories.seq_offsets.tolist() == [0, 0]
    assert list(dataset.batches("test", requests_per_batch=4, max_history=4)) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.batches("dev", requests_per_batch=1, max_history=1), "split must be one of .* found 'dev'"),
        (
            lambda d: d.batches("train", requests_per_batch=0, max_history=1),
            "requests_per_batch .* found 0",
        ),
        (lambda d: d.batches("train", requests_per_batch=1, max_history=-1), "max_history .* found -1"),
        (lambda d: d.batches("train", requests_per_batch=1, max_history=1, start_batch=-1), "start_batch .* found -1"),
        (lambda d: d.num_batches("train", 1, -1), "request_window .* found -1"),
        (lambda d: d.histories(torch.tensor([USERS]), None, 1), f"users must be integers from 0 to {USERS - 1}"),
        (lambda d: d.histories(torch.tensor([0.0]), None, 1), "users must be integers"),
        (lambda d: d.histories(torch.tensor([0]), torch.tensor([1, 2]), 1), r"before .* found \(2,\)"),
        (lambda d: d.histories(torch.tensor([0]), None, 1, skip_last=-1), "skip_last"),
    ],
)
def test_arguments_are_checked_at_the_call(dataset, call, message):
    with pytest.raises(ValueError, match=message):
        call(dataset)


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        ("items", "genre", [7] * ITEMS, r"items\.parquet: genre: expected values from 0 to 6, found 7 in row 0"),
        ("items", "source_id", ["i"] * ITEMS, r"items\.parquet: source_id: expected different ids"),
        ("users", "source_id", [1, 2], r"users\.parquet: source_id: expected a column of kind string"),
        ("events", "item_id", [ITEMS + 1] * 900, r"events\.parquet: item_id: expected values from 0 to 40, found 41"),
        ("events", "timestamp", [1_700_000_000_000] * 900, r"events\.parquet: timestamp"),
        ("events", "action", [0.5] * 900, r"events\.parquet: action: expected a column of kind int, found dtype float"),
        ("events", "action", [1, 2], r"events\.parquet: action: expected one value per row"),
        ("samples", "label_click", [float("nan")] * 700, r"label_click: expected values from 0 to 1, found nan"),
        ("samples", "split", ["dev"] * 700, r"samples\.parquet: split: expected one of .*found \['dev'\]"),
        ("samples", "ctx_tab", None, r"samples\.parquet: ctx_tab: expected one column of that name, found 0"),
    ],
)
def test_nothing_is_written_when_a_column_is_wrong(tmp_path, table, column, value, message):
    data = made_up()
    if value is None:
        del data[table][column]
    else:
        data[table][column] = value
    with pytest.raises(DataError, match=message):
        write_dataset(tmp_path / "set", **data)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(folder):
    before = (folder / "meta.json").read_text()
    with pytest.raises(DataError, match="overwritten"):
        write_dataset(folder, **made_up())
    assert (folder / "meta.json").read_text() == before
    assert json.loads(before)["format"] == 1
