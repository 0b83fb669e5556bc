"""Your own log: one CSV or Parquet file with a row per shown item, and the names of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vista_ext.data.batch import FeatureSchema
from vista_ext.data.folder import MAX_TIMESTAMP, SPLITS, is_taken, present, read_categories, read_folder, write_dataset
from vista_ext.data.importers._common import check_fraction, check_not_empty, dense, feature_codes, latest, split_names
from vista_ext.data.tables import Array, DataError, Kind, Table, check_range, read_csv, read_parquet

UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def import_generic(
    source: Path | str,
    target: Path | str,
    *,
    user: str,
    item: str,
    timestamp: str,
    labels: Mapping[str, str],
    action: str | None = None,
    item_features: Mapping[str, str] | None = None,
    context: Mapping[str, str] | None = None,
    split: str | None = None,
    timestamp_unit: str = "s",
    test_fraction: float = 0.2,
    valid_fraction: float = 0.1,
    name: str = "generic",
    description: str = "",
    update: bool = False,
) -> None:
    """Write a log as an event data set. Every row is an event and a sample.

    Users, items, actions, features and context are categories: integers or texts, of which each different value gets a
    code. An empty text is an unknown item feature. A label may not also be a feature.

    Args:
        source: a file .csv, .csv.gz or .parquet.
        target: the folder to make.
        user, item, timestamp: names of columns.
        labels: column of each task, values from 0 to 1; the first task is the main one.
        action: column with what the user did; None: which of the labels are above 1/2.
        item_features: column of each feature of the item; of an item's rows the first one counts.
        context: column of each feature of the row.
        split: column with train, valid or test; None: the last rows by time are test, those before valid.
        timestamp_unit: s, ms, us or ns.
        test_fraction: share of the rows that is test.
        valid_fraction: share of the other rows that is valid.
        name, description: for the data set; the description says where it came from.
        update: replace the data set that is in `target` by this log. Users, items, actions and values of features keep
            the codes that they have there, also those that the log has no more, and new ones follow: a run, its
            stores and their erasures stay right. Without a data set there, the same as without `update`.

    Raises:
        DataError: the file or a column is missing or damaged, or a value out of range; there is something at `target`,
            or, with `update`, not a data set with these tasks, features and context.
        ValueError: an option is out of range, or one column is asked to be two kinds of things.
    """
    check_fraction("test_fraction", test_fraction)
    check_fraction("valid_fraction", valid_fraction)
    if timestamp_unit not in UNITS:
        raise ValueError(f"timestamp_unit must be one of {sorted(UNITS)}, found {timestamp_unit!r}")
    if not labels:
        raise ValueError("labels must name at least one task, found none")
    item_features, context = item_features or {}, context or {}
    columns: dict[str, Kind] = {}
    for column, kind in _roles(user, item, timestamp, labels, action, item_features, context, split):
        if columns.setdefault(column, kind) != kind:
            raise ValueError(f"column {column!r} is asked to be {columns[column]} and {kind}: a column has one use")

    file, target = Path(source), Path(target)
    if is_taken(target) and not update:
        expected = "no such folder yet, an empty one, or `update` (--update), which keeps the codes of what is known"
        raise DataError(target, None, expected, "something that would be overwritten")
    before = _read_before(target, list(labels), list(item_features), list(context), action) if update else _Before()
    rows = (read_parquet if file.suffix == ".parquet" else read_csv)(file, columns)
    check_not_empty(file, rows[timestamp])
    check_range(file, timestamp, rows[timestamp], 0, MAX_TIMESTAMP * UNITS[timestamp_unit])
    for column in labels.values():
        check_range(file, column, rows[column], 0, 1)
    time = rows[timestamp] // UNITS[timestamp_unit]
    user_code, users = dense(rows[user], before.users)
    item_code, items = dense(rows[item], before.items)
    features, values_of = _item_features(rows, item, items, item_features, before)
    codes = {name: dense(rows[column], before.categories.get(f"ctx_{name}", ())) for name, column in context.items()}
    categories = {f"item_{feature}": names for feature, names in values_of.items()}
    categories |= {f"ctx_{feature}": names.tolist() for feature, (_, names) in codes.items()}
    if action is None:
        bits = [(rows[column] > 0.5) << place for place, column in enumerate(labels.values())]
        actions, num_actions = np.sum(bits, axis=0, dtype=np.int64), 2 ** len(bits)
    else:
        actions, names = dense(rows[action], before.categories.get("action", ()))
        num_actions, categories["action"] = len(names), names.tolist()
    write_dataset(
        target,
        name=name,
        schema=FeatureSchema(
            len(items),
            num_actions,
            {feature: len(names) + 1 for feature, names in values_of.items()},
            {feature: len(values) for feature, (_, values) in codes.items()},
            tuple(labels),
        ),
        source=description or f"imported from {file.name}",
        items={"source_id": items, **features},
        users={"source_id": users},
        events={"user_id": user_code, "timestamp": time, "item_id": item_code + 1, "action": actions},
        samples={
            "user_id": user_code,
            "timestamp": time,
            "item_id": item_code + 1,
            "split": _by_time(time, test_fraction, valid_fraction) if split is None else _known(file, rows, split),
            **{f"label_{task}": rows[column] for task, column in labels.items()},
            **{f"ctx_{feature}": values for feature, (values, _) in codes.items()},
        },
        categories=categories,
        replace=update,
    )


@dataclass(frozen=True)
class _Before:
    """What has codes already: ids of users and items, codes of item features by item, values by column."""

    users: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    features: Table = field(default_factory=dict)
    categories: dict[str, list[str]] = field(default_factory=dict)


def _read_before(
    target: Path, tasks: list[str], features: list[str], context: list[str], action: str | None
) -> _Before:
    """The data set that an update replaces; nothing is known if there is none."""
    if not is_taken(present(target)):
        return _Before()
    _, _, schema, tables = read_folder(target)
    categories, file = read_categories(target), target / "meta.json"
    if categories is None:
        expected = "what the codes stand for: import the log that this data set was made from into a new folder, once"
        raise DataError(file, "categories", expected, "none, as earlier versions wrote it")
    was = list(schema.tasks), list(schema.item_features), list(schema.context), "action" in categories
    now = tasks, features, context, action is not None
    for what, old, new in zip(("tasks", "item features", "context", "an action column"), was, now, strict=True):
        if old != new:
            raise DataError(file, f"schema: {what}", f"{old}, to be updated", f"{new} now")
    users, items = (tables[table]["source_id"].tolist() for table in ("users", "items"))
    return _Before(users, items, tables["items"], categories)


def _roles(
    user: str,
    item: str,
    timestamp: str,
    labels: Mapping[str, str],
    action: str | None,
    item_features: Mapping[str, str],
    context: Mapping[str, str],
    split: str | None,
) -> list[tuple[str, Kind]]:
    """Every column that is used, and what it has to hold."""
    roles: list[tuple[str, Kind]] = [(user, "id"), (item, "id"), (timestamp, "int")]
    roles += [(column, "float") for column in labels.values()]
    roles += [(column, "id") for column in (*item_features.values(), *context.values())]
    roles += [(action, "id")] if action else []
    roles += [(split, "string")] if split else []
    return roles


def _item_features(
    rows: Table, item: str, items: Array, item_features: Mapping[str, str], before: _Before
) -> tuple[Table, dict[str, list[str]]]:
    """Codes of the features of all items, and what they stand for."""
    features, categories = {}, {}
    for feature, column in item_features.items():
        values, known = rows[column], before.categories.get(f"item_{feature}", ())
        codes, categories[feature] = feature_codes(rows[item], values, items, values == "", known)
        if before.items:  # what the log does not say any more stays as it was
            old = codes[: len(before.items)]
            np.copyto(old, before.features[feature], where=old == 0)
        features[feature] = codes
    return features, categories


def _by_time(time: Array, test_fraction: float, valid_fraction: float) -> Array:
    is_test = latest(time, test_fraction)
    is_valid = np.zeros(len(time), bool)
    is_valid[~is_test] = latest(time[~is_test], valid_fraction)
    return split_names(is_test, is_valid)


def _known(file: Path, rows: Table, split: str) -> Array:
    unknown = set(rows[split].tolist()) - set(SPLITS)
    if unknown:
        raise DataError(file, split, f"one of {SPLITS}", str(sorted(unknown)))
    return rows[split]
