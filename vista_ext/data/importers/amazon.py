"""Amazon reviews (McAuley et al., 2015) as DIN (Zhou et al., KDD 2018) uses them: reviewed, or a sampled other item."""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vista_ext.data.batch import FeatureSchema
from vista_ext.data.folder import MAX_TIMESTAMP, write_dataset
from vista_ext.data.importers._common import (
    check_not_empty,
    dense,
    feature_codes,
    find_files,
    positions,
    split_names,
    strictly_increasing,
)
from vista_ext.data.tables import Array, DataError, Kind, check_range, read_json_lines
from vista_ext.progress import track

REVIEWS: dict[str, Kind] = {"reviewerID": "string", "asin": "string", "unixReviewTime": "int"}


def import_amazon(
    source: Path | str,
    target: Path | str,
    *,
    name: str = "*",
    valid: bool = True,
    seed: int = 0,
) -> None:
    """Write Amazon reviews as an event data set with the task `bought`.

    Every review is an event. Each but a user's first is also a sample with label 1, joined by an item that the user
    never reviewed, drawn uniformly, with label 0. A user's last review is test, the one before valid. Item feature:
    category, the last word of the last category path. Reviews know only the day: those of one day keep the order of the
    file and are moved apart by seconds.

    Args:
        source: the folder with reviews_<name>.json and meta_<name>.json, gzipped or not; one object per line, JSON or
            (as published in 2014) a Python literal in the meta file.
        target: the folder to make.
        name: the part of the file names that tells several sets in one folder apart.
        valid: make a valid split; without it those reviews are train.
        seed: of the negatives.

    Raises:
        DataError: a file or field is missing or damaged, or a user reviewed every item.
    """
    folder = Path(source)
    reviews_file = _only(find_files(folder, f"reviews_{name}.json", f"reviews_{name}.json.gz"))
    meta_file = _only(find_files(folder, f"meta_{name}.json", f"meta_{name}.json.gz"))
    reviews = read_json_lines(reviews_file, REVIEWS)
    check_not_empty(reviews_file, reviews["asin"])
    check_range(reviews_file, "unixReviewTime", reviews["unixReviewTime"], 0, MAX_TIMESTAMP // 2)
    user, users = dense(reviews["reviewerID"])
    item, asins = dense(reviews["asin"])
    time = strictly_increasing(user, reviews["unixReviewTime"])
    asin, category = _categories(meta_file, set(asins.tolist()))
    categories, names = feature_codes(asin, category, asins, unknown=category == "")

    place, reviewed = positions(user, time)
    sample = np.flatnonzero(place > 0)
    from_end = (reviewed - 1 - place)[sample]
    negative = _unseen(reviews_file, user, item, len(asins), sample, np.random.default_rng(seed))
    write_dataset(
        target,
        name="amazon",
        schema=FeatureSchema(len(asins), num_actions=1, item_features={"category": len(names) + 1}, tasks=("bought",)),
        source=f"Amazon product data, McAuley et al. 2015 ({reviews_file.name}); the origin states no licence",
        items={"source_id": asins, "category": categories},
        users={"source_id": users},
        events={"user_id": user, "timestamp": time, "item_id": item + 1, "action": np.zeros_like(user)},
        samples={
            "user_id": np.tile(user[sample], 2),
            "timestamp": np.tile(time[sample], 2),
            "item_id": np.concatenate([item[sample], negative]) + 1,
            "split": np.tile(split_names(from_end == 0, (from_end == 1) & valid), 2),
            "label_bought": np.repeat([1.0, 0.0], len(sample)),
        },
    )


def _only(files: list[Path]) -> Path:
    if len(files) > 1:
        names = [file.name for file in files]
        raise DataError(files[0].parent, None, "one such file, or a `name` that picks one", str(names))
    return files[0]


def _unseen(file: Path, user: Array, item: Array, items: int, rows: Array, rng: np.random.Generator) -> Array:
    """For each of `rows` an item that its user has in no row: int64 [rows]."""
    seen = np.unique(user * items + item)
    most = np.bincount(seen // items).max()
    if most >= items:
        raise DataError(file, "asin", "items that a user did not review", f"a user with all {items}")
    drawn = np.empty(len(rows), np.int64)
    open_rows = np.arange(len(rows))
    while len(open_rows):
        drawn[open_rows] = rng.integers(0, items, len(open_rows))
        pair = user[rows[open_rows]] * items + drawn[open_rows]
        at = np.minimum(np.searchsorted(seen, pair), len(seen) - 1)
        open_rows = open_rows[seen[at] == pair]
    return drawn


def _categories(file: Path, wanted: set[str]) -> tuple[Array, Array]:
    """Item and category of the lines about wanted items; a line without categories has the category ""."""
    found: list[tuple[str, str]] = []
    for number, line in enumerate(track(_lines(file), f"reading {file.name}", None, unit="lines"), 1):
        entry = _object(file, number, line)
        if entry.get("asin") in wanted:
            found.append((entry["asin"], _category(file, number, entry.get("categories", []))))
    asins, categories = zip(*found, strict=True) if found else ((), ())
    return np.array(asins, object), np.array(categories, object)


def _lines(file: Path) -> Iterator[str]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            yield from lines
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(file, None, "lines of text", str(error)) from error


def _object(file: Path, number: int, line: str) -> dict[str, Any]:
    entry: Any = None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        try:
            entry = ast.literal_eval(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise DataError(file, f"line {number}", "a JSON object or a Python literal", str(error)) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("asin"), str):
        raise DataError(file, f"line {number}", "an object with the text asin", f"{line.strip()[:60]!r}")
    return entry


def _category(file: Path, number: int, paths: Any) -> str:
    if paths in ([], [[]]):
        return ""
    try:
        category = paths[-1][-1]
    except (TypeError, LookupError):
        category = None
    if not isinstance(category, str) or isinstance(paths[-1], str):
        raise DataError(file, f"line {number}: categories", "a list of lists of texts", f"{str(paths)[:60]}")
    return category
