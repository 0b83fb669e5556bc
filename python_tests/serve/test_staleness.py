"""Where a stale summary stops reading, exactly, and what is made of it."""

import numpy as np
import pytest
import torch

from vista_ext.data.batch import FeatureSchema
from vista_ext.data.dataset import EventDataset, write_dataset
from vista_ext.serve.compare import AGES, FRESH, PRECISIONS, deliveries
from vista_ext.serve.scorer import from_table, predict_from
from vista_ext.serve.staleness import Age, history_lengths
from vista_ext.train.evaluate import predict

NOW = 100_000
# User 0 has events right at, before and behind every cut, two of them in one second; user 1 has one; user 2 none.
TIMES = {0: [NOW - 86_401, NOW - 86_400, NOW - 3_601, NOW - 3_600, NOW - 3_599, NOW - 7, NOW - 7, NOW - 1, NOW], 1: [5]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuts") / "data"
    users = [user for user, times in TIMES.items() for _ in times]
    events = {
        "user_id": np.array(users),
        "timestamp": np.concatenate([np.array(times) for times in TIMES.values()]),
        "item_id": np.arange(len(users)) + 1,
        "action": np.zeros(len(users), np.int64),
    }
    samples = {"user_id": [0], "timestamp": [NOW], "item_id": [1], "split": ["test"], "label_label": [1]}
    write_dataset(
        folder,
        name="cuts",
        schema=FeatureSchema(num_items=len(users), num_actions=1),
        source="",
        items={"source_id": [str(i) for i in range(len(users))]},
        users={"source_id": ["a", "b", "c"]},
        events=events,
        samples=samples,
    )
    return EventDataset(folder)


def read(dataset, age, max_history=99):
    users = torch.tensor([0, 1, 2])
    found = Age.parse(age).histories(dataset, users, torch.full((3,), NOW), max_history)
    return [part.tolist() for part in found.timestamps.split(found.seq_offsets.diff().tolist())], found.now.tolist()


@pytest.mark.parametrize(
    ("age", "left", "made"),
    [
        ("0", 8, NOW),
        ("1", 7, NOW - 1),
        ("2", 6, NOW - 7),  # one event of a second is in, the other is not
        ("3", 5, NOW - 7),
        ("8", 0, NOW - 86_401),
        ("100", 0, NOW - 86_401),
        ("1s", 7, NOW - 1),  # an event at the cut is not in it
        ("2s", 7, NOW - 2),
        ("1h", 3, NOW - 3_600),
        ("3599s", 4, NOW - 3_599),
        ("3601s", 2, NOW - 3_601),
        ("1d", 1, NOW - 86_400),
        ("2d", 0, NOW - 172_800),
    ],
)
def test_the_cut_is_exact(dataset, age, left, made):
    (mine, other, nobody), now = read(dataset, age)
    assert mine == TIMES[0][:left] and now[0] == made
    assert other == ([5] if age == "0" or age[-1] in "sh" or age == "1d" else []) and nobody == []
    assert read(dataset, age, max_history=2)[0][0] == TIMES[0][max(0, left - 2) : left]


def test_lengths_are_those_before_the_request(dataset):
    users, moments = torch.tensor([0, 0, 1, 2]), torch.tensor([NOW, NOW + 1, 5, 9])
    assert history_lengths(dataset, users, moments).tolist() == [8, 9, 0, 0]


def test_ages():
    assert [str(age) for age in AGES] == [
        "fresh",
        "1 event",
        "5 events",
        "20 events",
        "100 events",
        "1 h",
        "2 h",
        "1 d",
    ]
    assert Age.parse("90m") == Age(seconds=5400) and str(Age.parse("90m")) == "90 m" and Age.parse("0h") == FRESH
    for wrong in ("", "x", "-1", "1.5h", "2w", "1e3"):
        with pytest.raises(ValueError, match="an age must be a number of events"):
            Age.parse(wrong)


@pytest.fixture(scope="module")
def found(trained):
    from vista_ext.runs import Run

    run = Run.open(trained)
    return run, deliveries(run.vista, run.dataset, run.config.data, "test", requests=37)


def test_fresh_float32_rows_score_as_histories_do(found):
    run, delivery = found
    direct = predict(run.vista, run.dataset, "test", run.config.data)
    assert torch.equal(delivery.labels, direct.labels[:, 0]) and torch.equal(delivery.users, direct.users)
    assert torch.allclose(delivery.direct, direct.logits[:, 0], atol=1e-5)
    fresh = delivery.ways["float32", FRESH]
    assert torch.allclose(fresh, delivery.direct, atol=1e-5)
    assert delivery.quality(fresh).auc == pytest.approx(delivery.quality(delivery.direct).auc, abs=1e-4)


def test_precision_and_age_cost_what_they_should(found):
    _, delivery = found
    assert list(delivery.ways) == [(precision, age) for age in AGES for precision in PRECISIONS]

    def change(precision, age="0"):
        return float((delivery.ways[precision, Age.parse(age)].sigmoid() - delivery.direct.sigmoid()).abs().mean())

    assert change("float32") < 1e-6 < change("int8") < change("fp8_e4m3") < change("int4")
    assert change("float32") < change("float32", "5") < change("float32", "20") < change("float32", "100")


def test_every_request_has_its_own_summary(found):
    """Against summaries made one request at a time."""
    run, delivery = found
    samples = run.dataset.samples("test")
    for row in (0, 5, len(samples) - 1):
        user, moment = samples.users[row : row + 1], samples.timestamps[row : row + 1]
        histories = run.dataset.histories(user, moment, run.config.data.max_history, 20)
        first_missed = run.dataset.histories(user, moment, 20).timestamps[0]
        histories = type(histories)(**{**vars(histories), "now": first_missed[None]})
        summary = run.vista.summarize(histories).expand(run.dataset.num_users, -1, -1)
        logits = predict_from(from_table(summary), run.vista, run.dataset, "test", run.config.data).logits[row, 0]
        assert float(delivery.ways["float32", Age(events=20)][row]) == pytest.approx(float(logits), abs=1e-5)
