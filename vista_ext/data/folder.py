"""The folder of an event data set (docs/data_format.md): written whole, read and validated."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vista_ext._extras import require
from vista_ext.data.batch import FeatureSchema
from vista_ext.data.tables import DataError, Kind, Table, as_table, check_range, read_parquet
from vista_ext.progress import track, working

FORMAT = 1
SPLITS = ("train", "valid", "test")
# Seconds reach the year 36,000 here; milliseconds, a common mistake, do not fit since 2004.
MAX_TIMESTAMP = 2**40


def write_dataset(
    path: Path | str,
    *,
    name: str,
    schema: FeatureSchema,
    source: str,
    items: Mapping[str, Any],
    users: Mapping[str, Any],
    events: Mapping[str, Any],
    samples: Mapping[str, Any],
    categories: Mapping[str, list[str]] | None = None,
    replace: bool = False,
) -> None:
    """Validate, sort and write a data set; the folder appears only once it is complete.

    Args:
        path: the folder to make; it may not exist yet, or be empty.
        name: of the data set.
        source: where the data came from and under which terms, as text.
        items: `source_id` (str) and one integer column per item feature; row i is item i + 1.
        users: `source_id` (str); row i is user i.
        events: integers `user_id`, `timestamp` (s), `item_id`, `action`, in any order; the order of equal
            (user, timestamp) is kept.
        samples: `user_id`, `timestamp`, `item_id`, `split`, `label_<task>` in [0, 1], `ctx_<name>`, in any order.
        categories: what codes stand for, in their order: of `action`, `ctx_<name>`, and `item_<feature>` from 1 on.
        replace: a data set that is there; until the new one is complete it stays.

    Raises:
        DataError: naming the file and the column that is wrong.
    """
    target = Path(path)
    if is_taken(target) and not (replace and (target / "meta.json").is_file()):
        raise DataError(target, None, "no such folder yet, or an empty one", "something that would be overwritten")
    given: dict[str, Mapping[str, Any]] = {
        "items": {"item_id": np.arange(1, schema.num_items + 1)} | dict(items),
        "users": {"user_id": np.arange(len(users.get("source_id", ())))} | dict(users),
        "events": events,
        "samples": samples,
    }
    columns = _columns(target, schema)
    with working(f"checking {name}"):
        tables = {table: as_table(target / f"{table}.parquet", given[table], columns[table]) for table in columns}
        for table in ("events", "samples"):
            order = np.lexsort((tables[table]["timestamp"], tables[table]["user_id"]))
            tables[table] = {column: values[order] for column, values in tables[table].items()}
        _validate(target, schema, tables)

    pa, parquet = require("pyarrow", extra="run"), require("pyarrow.parquet", extra="run")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir()
        for table, values in track(tables.items(), f"writing {name}", len(tables), unit="tables"):
            file = unfinished / f"{table}.parquet"
            # Strings have a type of their own only where there are some.
            types = [(column, pa.string() if values[column].dtype == object else None) for column in values]
            arrays = {column: pa.array(values[column], kind) for column, kind in types}
            parquet.write_table(pa.table(arrays), file, compression="zstd", write_page_checksum=True)
        meta = {"format": FORMAT, "name": name, "schema": schema.to_dict(), "source": source}
        if categories is not None:
            meta["categories"] = dict(categories)
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        if replace and is_taken(target):  # a full folder cannot be renamed onto: `present` knows where the old one is
            shutil.rmtree(_aside(target), ignore_errors=True)
            target.rename(_aside(target))
        unfinished.rename(target)
        if replace:
            shutil.rmtree(_aside(target), ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_taken(folder: Path) -> bool:
    """Whether a data set written there would overwrite something."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def read_categories(folder: Path) -> dict[str, list[str]] | None:
    """What codes stand for, as `write_dataset` was told; None if it was not.

    Raises:
        DataError: meta.json is damaged.
    """
    file = present(folder) / "meta.json"
    _read_meta(file)
    found: dict[str, list[str]] | None = json.loads(file.read_text(encoding="utf-8")).get("categories")
    if found is not None and not (isinstance(found, dict) and all(map(_is_texts, found.values()))):
        raise DataError(file, "categories", "lists of texts", repr(found)[:60])
    return found


def read_ids(folder: Path) -> tuple[list[str], list[str]]:
    """The ids of the origin alone, of users and of items.

    Raises:
        DataError: a file is missing or damaged.
    """
    users, items = (
        read_parquet(present(folder) / f"{table}.parquet", {"source_id": "string"})["source_id"].tolist()
        for table in ("users", "items")
    )
    return users, items


def _is_texts(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def present(folder: Path) -> Path:
    """The folder, or where `write_dataset` was killed while it replaced it."""
    return _aside(folder) if not folder.exists() and _aside(folder).exists() else folder


def read_folder(folder: Path) -> tuple[str, str, FeatureSchema, dict[str, Table]]:
    """Name, source, schema, and the columns of each file.

    Raises:
        DataError: naming the file and column that is wrong, what was expected and what was found.
    """
    folder = present(folder)
    name, source, schema = _read_meta(folder / "meta.json")
    columns = _columns(folder, schema)
    tables = {table: read_parquet(folder / f"{table}.parquet", columns[table]) for table in columns}
    with working(f"checking {name}"):
        _validate(folder, schema, tables)
    return name, source, schema, tables


def _read_meta(path: Path) -> tuple[str, str, FeatureSchema]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(path, None, "the description of a data set", "no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, None, "JSON", str(error)) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = f"format {meta.get('format')!r}" if isinstance(meta, dict) else f"a {type(meta).__name__}"
        raise DataError(path, "format", str(FORMAT), found)
    for key in ("name", "source"):
        if not isinstance(meta.get(key), str):
            raise DataError(path, key, "a text", repr(meta.get(key)))
    try:
        schema = FeatureSchema.from_dict(meta.get("schema"))  # type: ignore[arg-type]  # whatever the file holds
        names = [*schema.tasks, *schema.item_features, *schema.context]
    except (ValueError, TypeError) as error:
        raise DataError(path, "schema", "a feature schema", str(error)) from error
    if not all(isinstance(name, str) for name in names):
        raise DataError(path, "schema", "names that are texts", repr(names))
    return meta["name"], meta["source"], schema


def _columns(folder: Path, schema: FeatureSchema) -> dict[str, dict[str, Kind]]:
    """The columns of each file."""
    taken = {"item_id", "source_id"} & set(schema.item_features)
    if taken:
        raise DataError(folder / "meta.json", "schema", "item features with names of their own", str(sorted(taken)))
    features: dict[str, Kind] = dict.fromkeys(schema.item_features, "int")
    labels: dict[str, Kind] = {f"label_{task}": "float" for task in schema.tasks}
    context: dict[str, Kind] = {f"ctx_{name}": "int" for name in schema.context}
    return {
        "items": {"item_id": "int", "source_id": "string", **features},
        "users": {"user_id": "int", "source_id": "string"},
        "events": {"user_id": "int", "timestamp": "int", "item_id": "int", "action": "int"},
        "samples": {"user_id": "int", "timestamp": "int", "item_id": "int", "split": "string", **labels, **context},
    }


def _validate(folder: Path, schema: FeatureSchema, tables: dict[str, Table]) -> None:
    """Values, lengths and order; the types are right already."""
    files = {table: folder / f"{table}.parquet" for table in tables}
    counts = {"items": schema.num_items, "users": len(tables["users"]["user_id"])}
    for table, column, first in (("items", "item_id", 1), ("users", "user_id", 0)):
        ids, sources = tables[table][column], tables[table]["source_id"]
        if not np.array_equal(ids, np.arange(first, first + counts[table])):
            raise DataError(files[table], column, f"{counts[table]} rows counting from {first}", f"{len(ids)} rows")
        if len(set(sources.tolist())) != len(sources):
            raise DataError(files[table], "source_id", "different ids", "an id twice")
    for name, count in schema.item_features.items():
        check_range(files["items"], name, tables["items"][name], 0, count - 1)
    for table in ("events", "samples"):
        file, values = files[table], tables[table]
        check_range(file, "user_id", values["user_id"], 0, counts["users"] - 1)
        check_range(file, "item_id", values["item_id"], 0, schema.num_items)
        check_range(file, "timestamp", values["timestamp"], 0, MAX_TIMESTAMP)
        step, time = np.diff(values["user_id"]), np.diff(values["timestamp"])
        disorder = (step < 0) | ((step == 0) & (time < 0))
        if disorder.any():
            raise DataError(file, "timestamp", "rows sorted by (user_id, timestamp)", f"row {disorder.argmax() + 1}")
    check_range(files["events"], "action", tables["events"]["action"], 0, schema.num_actions - 1)
    for task in schema.tasks:
        check_range(files["samples"], f"label_{task}", tables["samples"][f"label_{task}"], 0, 1)
    for name, count in schema.context.items():
        check_range(files["samples"], f"ctx_{name}", tables["samples"][f"ctx_{name}"], 0, count - 1)
    split = tables["samples"]["split"]
    unknown = set(split.tolist()) - set(SPLITS)
    if unknown:
        raise DataError(files["samples"], "split", f"one of {SPLITS}", str(sorted(unknown)))
