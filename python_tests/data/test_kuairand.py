"""KuaiRand in both forms: a made-up official release, and the public part when it is there."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vista_ext.data.dataset import EventDataset
from vista_ext.data.floors import floors
from vista_ext.data.importers import import_kuairand
from vista_ext.data.metrics import auc
from vista_ext.data.tables import DataError

LOG = [
    "user_id",
    "video_id",
    "date",
    "hourmin",
    "time_ms",
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "play_time_ms",
    "duration_ms",
    "profile_stay_time",
    "comment_stay_time",
    "is_profile_enter",
    "is_rand",
    "tab",
]
VIDEOS = ["video_id", "author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration", "tag"]


def row(user, video, day, second, click=0, long_view=0, like=0, tab=1, hour=7):
    values = dict.fromkeys(LOG, 0)
    values |= {"user_id": user, "video_id": video, "date": 20220400 + day, "hourmin": 100 * hour, "tab": tab}
    values |= {"time_ms": 1_650_000_000_000 + day * 86_400_000 + second * 1000 + 999}
    return values | {"is_click": click, "long_view": long_view, "is_like": like}


ROWS = [
    row(70, 5, 8, 0, click=1, long_view=1),
    row(70, 9, 8, 0),
    row(70, 5, 9, 3, click=1, like=1, tab=4, hour=23),
    row(31, 5, 10, 1),
    row(31, 8, 22, 9, click=1),
    row(70, 8, 101, 0, long_view=1),  # 2022-05-01
]


def write_csv(path, columns, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def official(tmp_path):
    folder = tmp_path / "KuaiRand-Pure" / "data"
    folder.mkdir(parents=True)
    write_csv(folder / "log_standard_4_08_to_4_21_pure.csv", LOG, ROWS[:4])
    write_csv(folder / "log_standard_4_22_to_5_08_pure.csv", LOG, ROWS[4:])
    write_csv(folder / "log_random_4_22_to_5_08_pure.csv", LOG, [row(99, 99, 22, 0)])
    video = dict.fromkeys(VIDEOS, "0")
    videos = [
        video | {"video_id": 9, "author_id": 40, "tag": "12,3"},
        video | {"video_id": 5, "author_id": 7, "tag": ""},
    ]
    write_csv(folder / "video_features_basic_pure.csv", VIDEOS, videos)
    return folder.parent


def test_official_release(official, tmp_path):
    import_kuairand(official, tmp_path / "set", valid_fraction=0.2)
    dataset = EventDataset(tmp_path / "set")
    assert dataset.user_sources == ["31", "70"]
    assert dataset.item_sources == ["5", "8", "9"]
    assert list(dataset.schema.item_features) == ["author", "tag"]
    assert dataset.item_features.tolist() == [[0, 0], [2, 0], [0, 0], [1, 1]]  # authors "40" < "7"
    assert dataset.schema.item_features == {"author": 3, "tag": 2}

    valid, test = dataset.samples("valid"), dataset.samples("test")
    assert (valid.users.tolist(), valid.items.tolist()) == ([0], [2])
    assert test.labels.tolist() == [[0, 1, 0]]
    train = dataset.samples("train")
    assert train.items.tolist() == [1, 1, 3, 1]
    assert train.context.tolist() == [[1, 7], [1, 7], [1, 7], [4, 23]]

    history = dataset.histories(test.users, test.timestamps, 10)
    assert history.items.tolist() == [1, 3, 1]
    assert history.actions.tolist() == [1 + 1 + 2, 1, 1 + 1 + 4]
    assert history.timestamps[0] == ROWS[0]["time_ms"] // 1000


def test_early_rows_can_be_history_only(official, tmp_path):
    import_kuairand(official, tmp_path / "set", train_from=20220410, test_from=20220422, valid_fraction=0)
    dataset = EventDataset(tmp_path / "set")
    assert [dataset.split_size(split) for split in ("train", "valid", "test")] == [1, 0, 2]
    assert dataset.num_events == len(ROWS)


def test_sequences_lie_before_the_labelled_days(official, tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    for name, rows in (("val", ROWS[:4]), ("test", ROWS[5:])):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    columns = ("user_id", "last_time_ms", "watch_seq", "like_seq", "long_watch_seq")
    values = [(70, 1_660_000_000_000, [5, 9, 5], [9], [5]), (12, 1_650_000_000_000, [9], [5], [])]
    sequences = [dict(zip(columns, row, strict=True)) for row in values]
    pq.write_table(pa.Table.from_pylist(sequences), folder / "user_sequences.parquet")
    (official / "data" / "video_features_basic_pure.csv").rename(folder / "video_features_basic_pure.csv")
    import_kuairand(folder, tmp_path / "set")
    dataset = EventDataset(tmp_path / "set")
    users = torch.tensor([dataset.user_index("70"), dataset.user_index("12")])
    history = dataset.histories(users, 1_650_816_000, 10)  # 25 April, 00:00 in UTC+8
    own = 3  # the user's own labelled rows, all earlier
    assert history.timestamps.tolist()[own:] == [1_650_815_997, 1_650_815_998, 1_650_815_999, 1_650_000_000]
    assert [dataset.item_sources[i - 1] for i in history.items[own:]] == ["5", "9", "5", "9"]
    assert history.actions.tolist()[own:] == [2 + 2, 2 + 4, 2 + 2, 2]


def test_wrong_values_are_named_in_the_file_of_the_origin(official, tmp_path):
    file = official / "data" / "log_standard_4_22_to_5_08_pure.csv"
    write_csv(file, LOG, [row(1, 1, 22, 0) | {"is_click": 2}])
    with pytest.raises(DataError, match=rf"{file.name}: is_click: expected values from 0 to 1, found 2 in row 0"):
        import_kuairand(official, tmp_path / "set")
    with pytest.raises(ValueError, match="valid_fraction must be at least 0 and below 1, found 1"):
        import_kuairand(official, tmp_path / "set", valid_fraction=1)


@pytest.fixture(scope="module")
def public(public_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("kuairand") / "set"
    import_kuairand(public_data("kuairand_pure"), path)
    return EventDataset(path)


def test_public_counts(public):
    assert public.num_users == 27_077
    assert [public.split_size(split) for split in ("train", "valid")] == pytest.approx(
        [0.9 * 94_784, 0.1 * 94_784], abs=20
    )
    assert public.split_size("test") == 133_545
    train, valid, test = (public.samples(split) for split in ("train", "valid", "test"))
    assert train.timestamps.max() < valid.timestamps.min()
    rates = [torch.cat([train.labels, valid.labels]).mean(0).tolist(), test.labels.mean(0).tolist()]
    assert np.round(rates, 4)[:, :2].tolist() == [[0.4379, 0.3073], [0.4448, 0.3133]]
    stored = public.num_events - 94_784 - 133_545
    assert stored / 26_469 == pytest.approx(30.9, abs=0.05)


def test_public_floors(public):
    test = public.samples("test")
    found = {name: auc(logits, test.labels[:, 0]) for name, logits in floors(public, "click").items()}
    expected = {"item mean": 0.6612, "user mean": 0.6284, "item + user": 0.6931, "item + user + tab": 0.7191}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=6e-4)
    assert "item + user + hour" in found
