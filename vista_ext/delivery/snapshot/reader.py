"""Reads snapshots: footers, pages, keys and records are compared with their checksums before they are used."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vista_ext._extras import require
from vista_ext.delivery.snapshot.format import (
    FORMAT,
    KEYS,
    MANIFEST,
    SUCCESS,
    PartFile,
    as_summaries,
    footer_crc32,
    keys_of,
)
from vista_ext.store import RecordError, StoreError, StoreSpec, Summaries, SummaryStore
from vista_ext.store.checks import check_integer
from vista_ext.store.lmdb import BATCH_BYTES, BATCH_RECORDS


def import_snapshot(snapshot: Iterable[Summaries], store: SummaryStore) -> int:
    """Merge what `Snapshot.read` yields into a store, newest event time wins; returns how many it wrote."""
    return sum(map(store.add, snapshot))


class Snapshot:
    """A snapshot at `path`, opened for reading. Footers, pages and records are checked before they are used.

    Raises:
        StoreError: not a complete snapshot, naming what is wrong.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            if not (self.path / SUCCESS).is_file():
                raise ValueError(f"no {SUCCESS}, so it is not a snapshot, or not a complete one")
            self._read_manifest(json.loads((self.path / MANIFEST).read_text()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreError(f"snapshot {self.path}: {error}") from error

    def _read_manifest(self, values: dict[str, Any]) -> None:
        if values["format"] != FORMAT:
            raise ValueError(f"format expected {FORMAT}, found {values['format']!r}")
        self.spec = StoreSpec.from_dict(values["spec"])
        self.files = [PartFile(**file) for file in values["files"]]
        for i, file in enumerate(self.files):
            for name in ("bytes", "rows", "keys_crc32", "footer_crc32"):
                check_integer(MANIFEST, name, getattr(file, name), 0)
            if file.path != f"bucket={i}/part-0.parquet":
                raise ValueError(f"file {i} expected in bucket={i}, found {file.path!r}")
            size = (self.path / file.path).stat().st_size
            if size != file.bytes:
                raise ValueError(f"{file.path}: expected {file.bytes} bytes, found {size}")
        rows = sum(file.rows for file in self.files)
        if values["buckets"] != len(self.files) or values["rows"] != rows:
            found = f"{values['buckets']!r} and {values['rows']!r}"
            raise ValueError(f"buckets and rows expected {len(self.files)} and {rows}, found {found}")

    def __len__(self) -> int:
        return sum(file.rows for file in self.files)

    def read(self, first: int | None = None, last: int | None = None) -> Iterator[Summaries]:
        """Its summaries in batches, bucket by bucket, by ascending user id within each.

        Args:
            first, last: read only users from `first` to `last`, both included. What lies outside is not read from disk,
                except for the neighbours in a row group.

        Raises:
            StoreError: a file is damaged; RecordError, which is one, if it is a record.
        """
        low, high = -(2**63) if first is None else first, 2**63 - 1 if last is None else last
        check_integer("read", "first", low, -(2**63))
        check_integer("read", "last", high, -(2**63))
        for file in self.files:
            yield from _summaries(self.path, file, self.spec, low, high)

    def keys(self, bucket: int) -> np.ndarray:
        """The `KEYS` of a bucket, in order, without reading the rows."""
        return _all_keys(self.path, self.files[bucket])

    def __iter__(self) -> Iterator[Summaries]:
        return self.read()


@contextmanager
def _open(folder: Path, file: PartFile) -> Iterator[Any]:
    """The Parquet file, its footer checked; what goes wrong while it is read is a StoreError that names it."""
    arrow, parquet = require("pyarrow", extra="run"), require("pyarrow.parquet", extra="run")
    where = f"snapshot {folder}: {file.path}"
    try:
        with (folder / file.path).open("rb") as data:
            found = footer_crc32(data, file.bytes)
            if found != file.footer_crc32:
                raise StoreError(f"{where}: footer crc32 expected {file.footer_crc32:#010x}, found {found:#010x}")
            data.seek(0, io.SEEK_SET)
            opened = parquet.ParquetFile(data, page_checksum_verification=True)
            if opened.metadata.num_rows != file.rows:
                raise StoreError(f"{where}: rows expected {file.rows}, found {opened.metadata.num_rows}")
            yield opened
    except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise StoreError(f"{where}: {error}") from error


def _summaries(folder: Path, file: PartFile, spec: StoreSpec, first: int, last: int) -> Iterator[Summaries]:
    """The summaries of users from `first` to `last`, as many at a time as a store commits together."""
    most = max(1, min(BATCH_RECORDS, BATCH_BYTES // spec.row_bytes))
    crc, seen = 0, 0
    with _open(folder, file) as opened:
        for groups in _batches(opened.metadata, first, last, most):
            table = opened.read_row_groups(groups)
            keys, rows = _keys(table), _rows(table, spec)
            crc, seen = zlib.crc32(keys, crc), seen + len(keys)
            found = as_summaries(keys, rows)
            _check_records(spec, found, keys)
            inside = (keys["user_id"] >= first) & (keys["user_id"] <= last)
            yield found if inside.all() else as_summaries(keys[inside], rows[inside])
    if seen == file.rows:
        _check_keys(folder, file, crc)


def _all_keys(folder: Path, file: PartFile) -> np.ndarray:
    """All `KEYS` of a file."""
    with _open(folder, file) as opened:
        found = _keys(opened.read(columns=list(KEYS.names or ())))
    _check_keys(folder, file, zlib.crc32(found))
    return found


def _batches(metadata: Any, first: int, last: int, most: int) -> Iterator[list[int]]:
    """Row groups that may hold some of the users, together at most `most` rows, or one group."""
    groups: list[int] = []
    rows = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        users = group.column(0).statistics
        if users is not None and users.has_min_max and (users.max < first or users.min > last):
            continue
        if groups and rows + group.num_rows > most:
            yield groups
            groups, rows = [], 0
        groups.append(i)
        rows += group.num_rows
    if groups:
        yield groups


def _keys(table: Any) -> np.ndarray:
    found = np.empty(len(table), dtype=KEYS)
    for name in KEYS.names or ():
        column = table.column(name)
        if column.null_count:
            raise ValueError(f"{name}: expected a value in each row, found {column.null_count} without")
        found[name] = column.to_numpy()
    return found


def _rows(table: Any, spec: StoreSpec) -> np.ndarray:
    arrow = require("pyarrow", extra="run")
    column = table.column("row")
    if column.type != arrow.binary(spec.row_bytes) or column.null_count:
        raise ValueError(f"row: expected {spec.row_bytes} bytes in each row, found {column.type}")
    parts = []
    for chunk in column.chunks:
        begin = chunk.offset * spec.row_bytes
        data = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)[begin : begin + len(chunk) * spec.row_bytes]
        parts.append(data.reshape(len(chunk), spec.row_bytes))
    # One copy: tensors want memory that may be written.
    return np.concatenate(parts) if parts else np.empty((0, spec.row_bytes), dtype=np.uint8)


def _check_records(spec: StoreSpec, found: Summaries, stored: np.ndarray) -> None:
    made = keys_of(spec, found)
    for i in np.flatnonzero(made["crc32"] != stored["crc32"])[:1]:
        problem = f"crc32 expected {stored['crc32'][i]:#010x}, found {made['crc32'][i]:#010x}"
        raise RecordError(int(stored["user_id"][i]), int(stored["model_version"][i]), problem)


def _check_keys(folder: Path, file: PartFile, crc: int) -> None:
    if crc != file.keys_crc32:
        expected = f"keys crc32 expected {file.keys_crc32:#010x}, found {crc:#010x}"
        raise StoreError(f"snapshot {folder}: {file.path}: {expected}")
