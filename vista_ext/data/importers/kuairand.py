"""KuaiRand (Gao et al., CIKM 2022): exposures of short videos with click, long view and like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from vista_ext.data.batch import FeatureSchema
from vista_ext.data.folder import write_dataset
from vista_ext.data.importers._common import (
    check_fraction,
    check_not_empty,
    concat,
    dense,
    feature_codes,
    find_files,
    latest,
    split_names,
    texts,
)
from vista_ext.data.tables import Array, Kind, Table, check_range, read_csv, read_lists, read_parquet

LOG_LIMITS = {
    "user_id": (0, 2**62),
    "video_id": (0, 2**62),
    "date": (19700101, 99991231),
    "hourmin": (0, 2359),
    "time_ms": (0, 2**50),
    "is_click": (0, 1),
    "is_like": (0, 1),
    "long_view": (0, 1),
    "tab": (0, 99),
}
LOG_COLUMNS: dict[str, Kind] = dict.fromkeys(LOG_LIMITS, "int")
# The sequences of the folder form end with 24 April in the logs' time zone (UTC+8).
SEQUENCES_END = 1_650_816_000


def import_kuairand(
    source: Path | str,
    target: Path | str,
    *,
    train_from: int | None = None,
    test_from: int = 20220501,
    valid_fraction: float = 0.1,
) -> None:
    """Write KuaiRand as an event data set with the tasks click, long_view and like.

    Every exposure is an event; its action is 1 + click + 2 * long view + 4 * like. Item features: author, first tag.
    Context: tab, hour. What the user did with a row's video is in no feature of that row.

    Args:
        source: the folder of the official CSV files (log_standard_*.csv, video_features_basic_*.csv; the random log is
            left out), or a folder with user_sequences.parquet, val.parquet and test.parquet, whose sequences have no
            times: they are laid one second apart up to the user's last one.
        target: the folder to make.
        train_from: date (yyyymmdd) from which rows are samples, and not only events; None: all are.
        test_from: date from which they are test. The Parquet form has its own test part.
        valid_fraction: share of the samples before the test, the last by time, that are valid.

    Raises:
        DataError: a file or column is missing or damaged, or a value out of range.
    """
    check_fraction("valid_fraction", valid_fraction)
    folder = Path(source)
    folder = folder / "data" if (folder / "data").is_dir() else folder
    if (folder / "test.parquet").exists() or (folder / "user_sequences.parquet").exists():
        parts = [_log(read_parquet, folder / f"{part}.parquet") for part in ("val", "test")]
        log = concat(parts)
        is_test = np.arange(len(log["date"])) >= len(parts[0]["date"])
        past = _sequence_events(folder / "user_sequences.parquet")
    else:
        log = concat([_log(read_csv, file) for file in find_files(folder, "log_standard_*.csv*")])
        is_test = log["date"] >= test_from
        past = {name: np.zeros(0, np.int64) for name in ("user_id", "video_id", "timestamp", "action")}

    log["timestamp"] = log["time_ms"] // 1000
    log["action"] = 1 + log["is_click"] + 2 * log["long_view"] + 4 * log["is_like"]
    events = concat([past, {name: log[name] for name in past}])
    event_user, users = dense(events["user_id"])
    event_item, videos = dense(events["video_id"])
    user, item = event_user[len(past["user_id"]) :], event_item[len(past["video_id"]) :] + 1
    features, counts = _video_features(folder, videos)

    labelled = np.ones(len(user), bool) if train_from is None else (log["date"] >= train_from) | is_test
    is_valid = np.zeros(len(user), bool)
    before_test = labelled & ~is_test
    is_valid[before_test] = latest(log["timestamp"][before_test], valid_fraction)
    samples = {
        "user_id": user,
        "timestamp": log["timestamp"],
        "item_id": item,
        "split": split_names(is_test, is_valid),
        "label_click": log["is_click"],
        "label_long_view": log["long_view"],
        "label_like": log["is_like"],
        "ctx_tab": log["tab"],
        "ctx_hour": log["hourmin"] // 100,
    }
    write_dataset(
        target,
        name="kuairand",
        schema=FeatureSchema(
            num_items=len(videos),
            num_actions=9,
            item_features=counts,
            context={"tab": int(log["tab"].max(initial=14)) + 1, "hour": 24},
            tasks=("click", "long_view", "like"),
        ),
        source="KuaiRand, Gao et al., CIKM 2022, doi 10.1145/3511808.3557624; CC BY-SA 4.0",
        items={"source_id": texts(videos), **features},
        users={"source_id": texts(users)},
        events={
            "user_id": event_user,
            "timestamp": events["timestamp"],
            "item_id": event_item + 1,
            "action": events["action"],
        },
        samples={name: values[labelled] for name, values in samples.items()},
    )


def _log(read: Callable[[Path, Mapping[str, Kind]], Table], file: Path) -> Table:
    table = read(file, LOG_COLUMNS)
    check_not_empty(file, table["user_id"])
    for column, (low, high) in LOG_LIMITS.items():
        check_range(file, column, table[column], low, high)
    return table


def _sequence_events(file: Path) -> Table:
    """The events of the sequences; a video that is in the user's like or long watch sequence counts as such."""
    scalars = read_parquet(file, {"user_id": "int", "last_time_ms": "int"})
    user, video = read_lists(file, "watch_seq")
    for column, values in (*scalars.items(), ("watch_seq", video)):
        check_range(file, column, values, 0, 2**62)

    def member(column: str) -> Array:
        other_user, other_video = read_lists(file, column)
        codes, videos = dense(np.concatenate([video, other_video]))
        # One number per (user, video) pair.
        pairs = np.concatenate([user, other_user]) * len(videos) + codes
        return np.isin(pairs[: len(video)], pairs[len(video) :])

    length = np.bincount(user, minlength=len(scalars["user_id"]))
    from_end = np.repeat(np.cumsum(length), length) - 1 - np.arange(len(video))
    last = np.minimum(scalars["last_time_ms"] // 1000, SEQUENCES_END - 1)
    return {
        "user_id": scalars["user_id"][user],
        "video_id": video,
        "timestamp": np.maximum(last[user] - from_end, 0),
        "action": 2 + 2 * member("long_watch_seq") + 4 * member("like_seq"),
    }


def _video_features(folder: Path, videos: Array) -> tuple[Table, dict[str, int]]:
    """Codes of author and first tag of the videos, and how many values each has."""
    files = find_files(folder, "video_features_basic_*.csv*")
    table = concat([read_csv(file, {"video_id": "int", "author_id": "string", "tag": "string"}) for file in files])
    first_tag = np.array([tag.partition(",")[0] for tag in table["tag"]], object)
    features, counts = {}, {}
    for name, values in (("author", table["author_id"]), ("tag", first_tag)):
        features[name], names = feature_codes(table["video_id"], values, videos, unknown=values == "")
        counts[name] = len(names) + 1
    return features, counts
