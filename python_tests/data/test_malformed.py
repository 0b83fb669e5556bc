"""Whatever is wrong with a folder, the answer is a DataError that names file, expectation and finding."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vista_ext.data.batch import FeatureSchema
from vista_ext.data.dataset import DataError, EventDataset, write_dataset
from vista_ext.data.importers import import_amazon, import_generic, import_kuairand, import_movielens

ROWS = 12
COUNT = np.arange(ROWS)


def write_table(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        pa.csv.write_csv(pa.table(columns), path)


def event_folder(path):
    ids = {"user_id": COUNT % 3, "timestamp": 100 + COUNT, "item_id": 1 + COUNT % 4}
    write_dataset(
        path,
        name="valid",
        schema=FeatureSchema(4, 2, {"genre": 3}, {"tab": 2}, ("click",)),
        source="",
        items={"source_id": list("abcd"), "genre": [0, 1, 2, 2]},
        users={"source_id": list("xyz")},
        events=ids | {"action": COUNT % 2},
        samples=ids | {"split": ["train"] * ROWS, "label_click": COUNT % 2, "ctx_tab": COUNT % 2},
    )


def kuairand_log():
    ids = {"user_id": COUNT % 3, "video_id": COUNT % 4, "date": 20220425 + 0 * COUNT, "hourmin": 100 * COUNT}
    return (
        ids
        | {"time_ms": 1_650_900_000_000 + COUNT, "tab": COUNT % 2}
        | dict.fromkeys(("is_click", "is_like", "long_view"), COUNT % 2)
    )


def kuairand_videos():
    return {"video_id": [0, 1, 2], "author_id": [7, 7, 8], "tag": ["3,4", "5", "3"]}


def kuairand_official(path):
    write_table(path / "log_standard_a.csv", kuairand_log())
    write_table(path / "video_features_basic_a.csv", kuairand_videos())


def kuairand_parquet(path):
    for part in ("val", "test"):
        write_table(path / f"{part}.parquet", kuairand_log())
    lists = {f"{name}_seq": [[0, 1], [], [3]] for name in ("watch", "like", "long_watch")}
    write_table(path / "user_sequences.parquet", {"user_id": [0, 1, 2], "last_time_ms": [10**12] * 3} | lists)
    write_table(path / "video_features_basic_a.csv", kuairand_videos())


def movielens(path):
    ratings = {"userId": COUNT % 3, "movieId": COUNT % 4, "rating": COUNT % 5 + 0.5, "timestamp": 100 + COUNT}
    write_table(path / "ratings.csv", ratings)
    write_table(path / "movies.csv", {"movieId": [0, 1, 2, 3], "title": ["A (1990)"] * 4, "genres": ["Drama"] * 4})


def amazon(path):
    path.mkdir(parents=True)
    reviews = [{"reviewerID": f"u{i % 3}", "asin": f"B{i % 5}", "unixReviewTime": int(i)} for i in COUNT[:9]]
    (path / "reviews_A.json").write_text("".join(json.dumps(line) + "\n" for line in reviews))
    meta = [{"asin": f"B{i}", "categories": [["X", "Y"]]} for i in range(5)]
    (path / "meta_A.json").write_text("".join(f"{line}\n" for line in meta))


def own_log(file, path):
    columns = {"who": COUNT % 3, "what": COUNT % 4, "when": 100 + COUNT, "clicked": COUNT % 2, "brand": ["x"] * ROWS}
    write_table(path / file, columns)


def import_own_log(file, source, target):
    labels, features = {"click": "clicked"}, {"brand": "brand"}
    import_generic(
        source / file, target, user="who", item="what", timestamp="when", labels=labels, item_features=features
    )


# How to write a good folder, and how to read it.
FORMS = {
    "event data set": (event_folder, lambda source, target: EventDataset(source)),
    "kuairand csv": (kuairand_official, import_kuairand),
    "kuairand parquet": (kuairand_parquet, import_kuairand),
    "movielens": (movielens, import_movielens),
    "amazon": (amazon, import_amazon),
    "generic csv": (partial(own_log, "log.csv"), partial(import_own_log, "log.csv")),
    "generic parquet": (partial(own_log, "log.parquet"), partial(import_own_log, "log.parquet")),
}


@pytest.fixture(params=FORMS)
def form(request, tmp_path):
    """A function that makes a fresh good folder and one that reads it."""
    write, read = FORMS[request.param]
    write(tmp_path / "good")
    read(tmp_path / "good", tmp_path / "imported")

    def fresh():
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        return Path(shutil.copytree(tmp_path / "good", tmp_path / "bad"))

    def read_fresh(folder):
        shutil.rmtree(tmp_path / "imported", ignore_errors=True)
        return read(folder, tmp_path / "imported")

    return fresh, read_fresh


def refused(read, folder, *names):
    with pytest.raises(DataError, match=r"(?s)expected .*, found .+") as error:
        read(folder)
    for name in names:
        assert name in str(error.value)


def files_of(folder):
    return sorted(path for path in folder.iterdir() if path.is_file())


def tables_of(folder):
    return [path for path in files_of(folder) if path.suffix in (".parquet", ".csv")]


def read_table(path):
    return pq.read_table(path) if path.suffix == ".parquet" else pa.csv.read_csv(path)


def read_or_refused(read, folder, *names):
    """No other error than DataError: some damage leaves a folder that can be read."""
    try:
        read(folder)
    except DataError as error:
        for part in ("expected ", ", found ", *names):
            assert part in str(error)


# Ids and features of the origin, which may be any text.
FREE = {"who", "what", "brand", "author_id"}
# The folder is made anew in each example.
many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_a_missing_or_empty_file(form):
    fresh, read = form
    for name in [file.name for file in files_of(fresh())]:
        folder = fresh()
        (folder / name).unlink()
        refused(read, folder, re.split(r"[_.]", name)[0])
        (folder / name).mkdir()
        refused(read, folder, name)
        if not name.startswith("meta_"):  # where no item is described, none has a category
            (folder / name).rmdir()
            (folder / name).touch()
            refused(read, folder, name)


def columns_of(fresh):
    return [(file.name, column) for file in tables_of(fresh()) for column in read_table(file).column_names]


def test_a_missing_or_repeated_column(form):
    fresh, read = form
    for name, column in columns_of(fresh):
        folder = fresh()
        table = read_table(folder / name)
        write_table(folder / name, table.drop_columns([column]))
        refused(read, folder, name, column)
        write_table(folder / name, table.append_column(column, table.column(column)))
        refused(read, folder, name, column, "found 2")


def test_a_column_of_another_type_or_with_a_gap(form):
    fresh, read = form
    for name, column in columns_of(fresh):
        folder = fresh()
        table = read_table(folder / name)
        old, parquet = table.column(column), name.endswith(".parquet")
        gap = pa.chunked_array([old[1:].combine_chunks(), pa.nulls(1, old.type)])
        wrong = []
        if column in FREE:
            wrong += [gap, pa.array([1.5] * len(old))] if parquet else []
        elif pa.types.is_string(old.type):
            wrong += [gap, pa.array([3] * len(old))] if parquet else []
        else:
            wrong += [gap, pa.array(["x"] * len(old))]
            wrong += [] if pa.types.is_floating(old.type) else [pa.array([1.5] * len(old))]
        for values in wrong:
            write_table(folder / name, table.set_column(table.column_names.index(column), column, values))
            refused(read, folder, name, column)


@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("kuairand csv", "log_standard_a.csv"),
        ("kuairand parquet", "test.parquet"),
        ("movielens", "ratings.csv"),
        ("generic csv", "log.csv"),
        ("generic parquet", "log.parquet"),
    ],
    indirect=["form"],
)
def test_a_log_without_rows(form, file):
    fresh, read = form
    folder = fresh()
    write_table(folder / file, read_table(folder / file)[:0])
    refused(read, folder, file, "at least one row")


@many
@given(data=st.data())
def test_any_integer_is_read_or_refused(form, data):
    fresh, read = form
    numbers = [
        (name, column)
        for name, column in columns_of(fresh)
        if pa.types.is_integer(read_table(fresh() / name).column(column).type)
    ]
    if not numbers:
        return
    name, column = data.draw(st.sampled_from(numbers))
    folder = fresh()
    table = read_table(folder / name)
    values = table.column(column).to_pylist()
    values[data.draw(st.integers(0, len(values) - 1))] = data.draw(st.integers(-(2**63), 2**63 - 1))
    write_table(folder / name, table.set_column(table.column_names.index(column), column, pa.array(values)))
    read_or_refused(read, folder, name, column)


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("items", "item_id", 0),
        ("items", "item_id", 2),
        ("items", "genre", 3),
        ("items", "genre", -1),
        ("users", "user_id", 1),
        ("events", "user_id", 3),
        ("events", "user_id", -1),
        ("events", "item_id", 5),
        ("events", "action", 2),
        ("events", "timestamp", 2**41),
        ("samples", "user_id", 3),
        ("samples", "item_id", -1),
        ("samples", "ctx_tab", 2),
        ("samples", "label_click", 1.5),
        ("samples", "label_click", float("nan")),
        ("samples", "split", "dev"),
    ],
)
def test_ids_and_codes_out_of_range(tmp_path, name, column, value):
    event_folder(tmp_path / "set")
    file = tmp_path / "set" / f"{name}.parquet"
    table = read_table(file)
    values = pa.array([value, *table.column(column).to_pylist()[1:]])
    write_table(file, table.set_column(table.column_names.index(column), column, values))
    refused(EventDataset, tmp_path / "set", file.name, column)


def test_rows_out_of_order(tmp_path):
    event_folder(tmp_path / "set")
    file = tmp_path / "set" / "events.parquet"
    write_table(file, read_table(file).take(list(range(ROWS))[::-1]))
    refused(EventDataset, tmp_path / "set", file.name, "sorted by (user_id, timestamp)")


@many
@given(data=st.data())
def test_a_truncated_file(form, data):
    fresh, read = form
    folder = fresh()
    file = data.draw(st.sampled_from(files_of(folder)))
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    if file.suffix == ".parquet":
        refused(read, folder, file.name)
    else:
        read_or_refused(read, folder, file.name)


@many
@given(data=st.data())
def test_damaged_bytes(form, data):
    fresh, read = form
    folder = fresh()
    file = data.draw(st.sampled_from(files_of(folder)))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    read_or_refused(read, folder)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_description(tmp_path, data):
    folder = tmp_path / "set"
    if not folder.exists():
        event_folder(folder)
        shutil.copy(folder / "meta.json", tmp_path / "meta.json")
    meta = json.loads((tmp_path / "meta.json").read_text())
    inner = data.draw(st.sampled_from([meta, meta["schema"]]))
    key = data.draw(st.sampled_from(sorted(inner)))
    inner[key] = data.draw(values.filter(lambda value: value != inner[key]))
    (folder / "meta.json").write_text(json.dumps(meta))
    if inner is meta and key in ("name", "source") and isinstance(inner[key], str):
        EventDataset(folder)
    elif inner is not meta and key == "num_actions" and isinstance(inner[key], int) and inner[key] >= 2:
        EventDataset(folder)  # more actions than occur
    else:
        read_or_refused(EventDataset, folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "null", '{"format": 2}', "\ud800"])
def test_a_description_that_is_none(tmp_path, text):
    event_folder(tmp_path / "set")
    (tmp_path / "set" / "meta.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(EventDataset, tmp_path / "set", "meta.json")
