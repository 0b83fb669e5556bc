"""What importers share: dense ids, splits by time, files found by pattern."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vista_ext._extras import require
from vista_ext.data.tables import Array, DataError, Table


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """The files of a folder that match the first pattern that any matches, by name; DataError if there is none."""
    for pattern in patterns:
        if files := sorted(folder.glob(pattern)):
            return files
    found = f"{sorted(path.name for path in folder.iterdir())}" if folder.is_dir() else "no such folder"
    raise DataError(folder, None, f"a file {' or '.join(patterns)}", found)


def check_not_empty(file: Path, rows: Array) -> None:
    """Raise DataError if a file had no rows."""
    if not len(rows):
        raise DataError(file, None, "at least one row", "none")


def concat(tables: list[Table]) -> Table:
    """The rows of tables with the same columns, one table after the other."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def dense(values: Array, known: Sequence[str] = ()) -> tuple[Array, Array]:
    """Codes from 0 of values, and what they stand for: int64 [m], [codes].

    Args:
        known: values of the first codes, whether they occur or not; the other values follow, sorted.
    """
    codes, names = _sorted_codes(values)
    if not known:
        return codes, names
    place = {name: code for code, name in enumerate(known)}
    for name in names.tolist():
        place.setdefault(name, len(place))
    return np.array([place[name] for name in names.tolist()], np.int64)[codes], np.array(list(place), object)


def _sorted_codes(values: Array) -> tuple[Array, Array]:
    if values.dtype != object:
        unique, codes = np.unique(values, return_inverse=True)
        return codes.astype(np.int64), unique
    # Sorting Python strings is slow: sort the different ones only.
    encoded = require("pyarrow", extra="run").array(values).dictionary_encode()
    names = encoded.dictionary.to_numpy(zero_copy_only=False)
    order = np.argsort(names)
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    return rank[encoded.indices.to_numpy()], names[order]


def feature_codes(
    keys: Array, values: Array, wanted: Array, unknown: Array, known: Sequence[str] = ()
) -> tuple[Array, list[str]]:
    """Codes of a categorical feature for `wanted` keys, dense over the values that occur, 0 where none is known.

    Args:
        keys, values: the feature as a table; of a repeated key the first row counts.
        unknown: bool like `values`, rows that say nothing.
        known: values of the first codes from 1 on, as for `dense`.

    Returns:
        int64 like `wanted`, and what the codes from 1 on stand for.
    """
    present, first = np.unique(keys[~unknown], return_index=True)
    if not len(present):
        return np.zeros(len(wanted), np.int64), list(known)
    at = np.minimum(np.searchsorted(present, wanted), len(present) - 1)
    found = present[at] == wanted
    result = np.zeros(len(wanted), np.int64)
    codes, names = dense(values[~unknown][first][at[found]], known)
    result[found] = codes + 1
    return result, names.tolist()


def positions(users: Array, times: Array) -> tuple[Array, Array]:
    """Place of each row among the rows of its user by time (ties in row order), and how many the user has."""
    order = np.lexsort((times, users))
    _, inverse, counts = np.unique(users, return_inverse=True, return_counts=True)
    place = np.empty(len(users), np.int64)
    place[order] = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place, counts[inverse]


def strictly_increasing(users: Array, times: Array) -> Array:
    """Times moved up by as little as makes those of one user differ, ties in row order.

    For logs that know the day only: what happened earlier on a day becomes history of what happened later.
    """
    if not len(times):
        return times
    place, count = positions(users, times)
    order = np.lexsort((times, users))
    codes, _ = dense(users)
    # With a user's place taken off, "later than the one before" reads "not before it", a running maximum; users lie
    # so far apart that it starts anew with each.
    lift = codes * (times.max() - times.min() + count.max() + 1) - place
    moved = np.empty_like(times)
    moved[order] = np.maximum.accumulate((times + lift)[order])
    return moved - lift


def latest(times: Array, fraction: float) -> Array:
    """Mask of about the last `fraction` of rows by time; rows of one time stay together, on the earlier side."""
    kept = len(times) - round(fraction * len(times))
    if kept == 0 or kept == len(times):
        return np.full(len(times), kept == 0)
    return times > np.partition(times, kept - 1)[kept - 1]


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless `value` lies in `[0, 1)`."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, found {value}")


def split_names(test: Array, valid: Array) -> Array:
    """Of each row: test, else valid, else train."""
    return np.where(test, "test", np.where(valid, "valid", "train"))


def texts(values: Array) -> Array:
    """Source ids as strings."""
    return np.array([str(value) for value in values.tolist()], object)
