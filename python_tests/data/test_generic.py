"""Own logs, as CSV and as Parquet."""

import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from vista_ext.data.dataset import EventDataset
from vista_ext.data.importers import import_generic
from vista_ext.data.tables import DataError

LOG = {
    "who": ["b", "a", "b", "b", "a", "b"],
    "what": [10, 10, 20, 30, 20, 10],
    "when": [1_000, 2_000, 3_500, 4_000, 5_000, 6_000],
    "clicked": [1, 0, 1, 0, 1, 1],
    "bought": [0.0, 0.0, 1.0, 0.0, 0.0, 1.0],
    "how": ["view", "skip", "buy", "skip", "view", "buy"],
    "brand": ["x", "x", "", "y", "", "other"],
    "device": ["phone", "web", "phone", "phone", "web", "tv"],
    "part": ["train", "train", "train", "valid", "test", "test"],
}
MAPPING = {
    "user": "who",
    "item": "what",
    "timestamp": "when",
    "timestamp_unit": "ms",
    "labels": {"click": "clicked", "buy": "bought"},
    "item_features": {"brand": "brand"},
    "context": {"device": "device"},
}


@pytest.fixture(params=["log.csv", "log.csv.gz", "log.parquet"])
def log(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.table(LOG), path)
    else:
        with pa.output_stream(str(path)) as stream:
            pa.csv.write_csv(pa.table(LOG), stream)
    return path


def test_columns_arrive(log, tmp_path):
    import_generic(log, tmp_path / "set", **MAPPING, split="part", name="mine", description="a log")
    dataset = EventDataset(tmp_path / "set")
    assert (dataset.name, dataset.source) == ("mine", "a log")
    assert dataset.user_sources == ["a", "b"]
    assert dataset.item_sources == ["10", "20", "30"]
    assert dataset.item_features[:, 0].tolist() == [0, 1, 0, 2]
    assert dataset.schema.context == {"device": 3}
    assert dataset.schema.tasks == ("click", "buy")
    test = dataset.samples("test")
    assert test.timestamps.tolist() == [5, 6]
    assert test.context.tolist() == [[2], [1]]
    assert test.labels.tolist() == [[1, 0], [1, 1]]
    history = dataset.histories(test.users, test.timestamps, 10)
    assert history.items.tolist() == [1, 1, 2, 3]
    assert history.actions.tolist() == [0, 1, 1 + 2, 0]


def test_split_by_time_and_named_actions(log, tmp_path):
    import_generic(log, tmp_path / "set", **MAPPING, action="how", test_fraction=0.34, valid_fraction=0.25)
    dataset = EventDataset(tmp_path / "set")
    times = {split: dataset.samples(split).timestamps.sort().values.tolist() for split in ("train", "valid", "test")}
    assert times == {"train": [1, 2, 3], "valid": [4], "test": [5, 6]}
    assert dataset.schema.num_actions == 3
    assert dataset.histories(torch.tensor([1]), None, 10).actions.tolist() == [2, 0, 1, 0]


def test_names_that_differ_by_case_only_are_told_apart(tmp_path):
    columns = {"Clicked": [0] * 6} | LOG
    pa.csv.write_csv(pa.table(columns), tmp_path / "log.csv")
    import_generic(tmp_path / "log.csv", tmp_path / "set", **MAPPING, split="part")
    assert EventDataset(tmp_path / "set").samples("test").labels[:, 0].tolist() == [1, 1]
    columns["CLICKED"] = columns.pop("clicked")
    pa.csv.write_csv(pa.table(columns), tmp_path / "log.csv")
    with pytest.raises(DataError, match=r"clicked: expected one column of that name, found 2 among"):
        import_generic(tmp_path / "log.csv", tmp_path / "other", **MAPPING)


def test_a_label_is_no_feature(log, tmp_path):
    with pytest.raises(ValueError, match="column 'clicked' is asked to be float and id"):
        import_generic(log, tmp_path / "set", **MAPPING | {"context": {"click": "clicked"}})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"user": "nobody"}, DataError, r"nobody: expected one column of that name, found 0 among \['bought'"),
        ({"timestamp": "how"}, DataError, r"how: expected .*, found "),
        ({"labels": {"price": "what"}, "item": "who"}, DataError, r"what: expected values from 0 to 1, found 10"),
        ({"split": "how"}, DataError, r"how: expected one of .*, found \['buy', 'skip', 'view'\]"),
        ({"labels": {}}, ValueError, "labels must name at least one task"),
        ({"timestamp_unit": "h"}, ValueError, "timestamp_unit must be one of"),
        ({"test_fraction": -0.1}, ValueError, "test_fraction must be at least 0"),
    ],
)
def test_a_wrong_mapping_is_named(log, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        import_generic(log, tmp_path / "set", **MAPPING | change)
    assert not (tmp_path / "set").exists()


def test_milliseconds_taken_for_seconds_are_caught(log, tmp_path):
    table = pa.table(LOG | {"when": [1_700_000_000_000] * 6})
    pa.parquet.write_table(table, tmp_path / "ms.parquet")
    with pytest.raises(DataError, match=r"ms\.parquet: when: expected values from 0 to"):
        import_generic(tmp_path / "ms.parquet", tmp_path / "set", **MAPPING | {"timestamp_unit": "s"})


GROWN = {
    "who": ["0", "b", "c", "a"],
    "what": [5, 20, 5, 20],
    "when": [7_000, 7_000, 8_000, 9_000],
    "clicked": [1, 1, 0, 1],
    "bought": [0.0, 0.0, 1.0, 0.0],
    "how": ["add", "view", "buy", "add"],
    "brand": ["a", "", "a", "w"],
    "device": ["car", "tv", "web", "car"],
    "part": ["train", "train", "train", "test"],
}
COLUMNS = MAPPING | {"action": "how"}


def test_an_update_keeps_what_has_a_code(tmp_path):
    """New users, items, actions, features and context that sort first come last; what is gone from the log stays."""
    pa.parquet.write_table(pa.table(LOG), tmp_path / "log.parquet")
    pa.parquet.write_table(pa.table(GROWN), tmp_path / "grown.parquet")
    import_generic(tmp_path / "log.parquet", tmp_path / "set", **COLUMNS, update=True)  # nothing there yet
    first = EventDataset(tmp_path / "set")
    import_generic(tmp_path / "log.parquet", tmp_path / "set", **COLUMNS, update=True)
    assert json.loads((tmp_path / "set" / "meta.json").read_text())["schema"] == first.schema.to_dict()
    import_generic(tmp_path / "grown.parquet", tmp_path / "set", **COLUMNS, split="part", update=True)
    grown = EventDataset(tmp_path / "set")
    assert grown.user_sources == [*first.user_sources, "0", "c"] == ["a", "b", "0", "c"]
    assert grown.item_sources == [*first.item_sources, "5"] == ["10", "20", "30", "5"]
    assert first.item_features[:, 0].tolist() == [0, 1, 0, 2]
    assert grown.item_features[:, 0].tolist() == [0, 1, 4, 2, 3]  # 20 got its first brand, w; a is that of 5
    assert grown.schema.item_features == {"brand": 5} and grown.schema.context == {"device": 4}
    assert json.loads((tmp_path / "set" / "meta.json").read_text())["categories"] == {
        "item_brand": ["x", "y", "a", "w"],
        "ctx_device": ["phone", "tv", "web", "car"],
        "action": ["buy", "skip", "view", "add"],
    }
    history = grown.histories(torch.arange(4), None, 10)
    assert history.seq_offsets.tolist() == [0, 1, 2, 3, 4]
    assert history.items.tolist() == [2, 2, 4, 4] and history.actions.tolist() == [3, 2, 3, 0]
    assert grown.samples("train").context[:, 0].tolist() == [1, 3, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown.parquet", "log.parquet", "set"]


def test_items_that_a_model_does_not_know(tmp_path):
    pa.parquet.write_table(pa.table(LOG), tmp_path / "log.parquet")
    import_generic(tmp_path / "log.parquet", tmp_path / "set", **COLUMNS, split="part")
    dataset = EventDataset(tmp_path / "set", known_items=2)
    assert dataset.schema.num_items == 2 and dataset.item_features.tolist() == [[0], [1], [0]]
    assert dataset.histories(torch.tensor([1]), None, 10).items.tolist() == [1, 2, 0, 1]
    assert dataset.samples("valid").items.tolist() == [0]
    assert [dataset.item_index(item) for item in ("10", "20", "30")] == [1, 2, 0]
    assert EventDataset(tmp_path / "set", known_items=3).schema == EventDataset(tmp_path / "set").schema


def test_an_update_of_something_else_is_refused(tmp_path):
    pa.parquet.write_table(pa.table(LOG), tmp_path / "log.parquet")
    import_generic(tmp_path / "log.parquet", tmp_path / "set", **COLUMNS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    for change, message in (
        ({"update": False}, r"set: expected no such folder yet, an empty one, or `update` .*, found something"),
        (
            {"labels": {"click": "clicked"}},
            r"schema: tasks: expected \['click', 'buy'\], to be updated, found \['click'\]",
        ),
        ({"item_features": {}}, r"schema: item features: expected \['brand'\]"),
        ({"context": {"tab": "device"}}, r"schema: context: expected \['device'\]"),
        ({"action": None}, r"schema: an action column: expected True, to be updated, found False now"),
    ):
        with pytest.raises(DataError, match=message):
            import_generic(tmp_path / "log.parquet", tmp_path / "set", **COLUMNS | {"update": True} | change)
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    meta = json.loads(before["meta.json"])
    for damage, message in (({}, "found none, as earlier versions wrote it"), ({"categories": [1]}, "lists of texts")):
        left = {key: value for key, value in meta.items() if key != "categories"} | damage
        (tmp_path / "set" / "meta.json").write_text(json.dumps(left))
        with pytest.raises(DataError, match=message):
            import_generic(tmp_path / "log.parquet", tmp_path / "set", **COLUMNS, update=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(DataError, match=r"meta\.json: expected the description of a data set, found no such file"):
        import_generic(tmp_path / "log.parquet", tmp_path / "other", **COLUMNS, update=True)


def test_an_update_that_was_killed_between_its_renames(tmp_path):
    pa.parquet.write_table(pa.table(LOG), tmp_path / "log.parquet")
    pa.parquet.write_table(pa.table(GROWN), tmp_path / "grown.parquet")
    import_generic(tmp_path / "log.parquet", tmp_path / "set", **COLUMNS)
    (tmp_path / "set").rename(tmp_path / ".set.old")
    assert EventDataset(tmp_path / "set").user_sources == ["a", "b"]
    import_generic(tmp_path / "grown.parquet", tmp_path / "set", **COLUMNS, update=True)
    assert EventDataset(tmp_path / "set").user_sources == ["a", "b", "0", "c"]
    assert not (tmp_path / ".set.old").exists()
