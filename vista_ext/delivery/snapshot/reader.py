"""Reads snapshots: footers, pages, keys and records are compared with their checksums before they are used.

Files are opened by Arrow and read into its memory. Of a Python file its threads would hold Python's, and to free that
while the interpreter ends, as they may, aborts the process.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista_ext._extras import require
from vista_ext.delivery.snapshot.format import (
    ERASED,
    FORMAT,
    KEYS,
    MANIFEST,
    SUCCESS,
    ErasedFile,
    PartFile,
    as_summaries,
    footer_crc32,
    keys_of,
)
from vista_ext.store import Erasures, RecordError, StoreError, StoreSpec, Summaries, SummaryStore
from vista_ext.store.checks import check_integer
from vista_ext.store.lmdb import BATCH_BYTES, BATCH_RECORDS

MERGED = 16  # buckets that are read beside each other
HALF_PAGE = 2048  # an embedded store gives larger records pages of their own, wherever their neighbours are


def import_snapshot(
    snapshot: Snapshot,
    store: SummaryStore,
    first: int | None = None,
    last: int | None = None,
    *,
    on_batch: Callable[[int], None] = lambda summaries: None,
) -> int:
    """Merge a snapshot into a store: newest event time wins, and who is erased there is erased here. Small rows are
    written in the order of the keys, so that what is committed together shares pages of the store.

    Args:
        first, last: only users from `first` to `last`, both included.
        on_batch: told how many summaries were read.

    Returns:
        How many summaries it wrote.
    """
    erased = snapshot.erasures(first, last)
    store.erase(erased.user_ids, erased.until)
    written = 0
    read = snapshot.read_merged if snapshot.spec.row_bytes < HALF_PAGE else snapshot.read
    for batch in read(first, last):
        written += store.add(batch)
        on_batch(len(batch))
    return written


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
        self._erased = ErasedFile(**values["erased"])
        for name in ("bytes", "rows", "crc32"):
            check_integer(MANIFEST, f"erased.{name}", getattr(self._erased, name), 0)
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
        low, high = _range(first, last)
        most = max(1, min(BATCH_RECORDS, BATCH_BYTES // self.spec.row_bytes))  # what a store commits together
        for file in self.files:
            yield from _summaries(self.path, file, self.spec, low, high, most)

    def read_merged(self, first: int | None = None, last: int | None = None) -> Iterator[Summaries]:
        """As `read`, by ascending user id over `MERGED` buckets at a time, of each of which it holds a row group."""
        low, high = _range(first, last)
        most = min(4 * BATCH_RECORDS, BATCH_BYTES // self.spec.row_bytes)  # some commits of a store
        for begin in range(0, len(self.files), MERGED):
            files = self.files[begin : begin + MERGED]
            yield from _merged([_summaries(self.path, file, self.spec, low, high, 1) for file in files], most)

    def erasures(self, first: int | None = None, last: int | None = None) -> Erasures:
        """Who is erased, by ascending user id; arguments and errors as of `read`. All of them are held at once, 16
        bytes each."""
        low, high = _range(first, last)
        users, until = _read_erased(self.path, self._erased)
        inside = (users >= low) & (users <= high)
        return Erasures(torch.from_numpy(users[inside]), torch.from_numpy(until[inside]))

    def keys(self, bucket: int) -> np.ndarray:
        """The `KEYS` of a bucket, in order, without reading the rows."""
        return _all_keys(self.path, self.files[bucket])

    def __iter__(self) -> Iterator[Summaries]:
        return self.read()


def _range(first: int | None, last: int | None) -> tuple[int, int]:
    low, high = -(2**63) if first is None else first, 2**63 - 1 if last is None else last
    check_integer("read", "first", low, -(2**63))
    check_integer("read", "last", high, -(2**63))
    return low, high


def _read_erased(folder: Path, file: ErasedFile) -> tuple[np.ndarray, np.ndarray]:
    """Users and times, after the checksum of the whole file."""
    arrow, parquet = require("pyarrow", extra="run"), require("pyarrow.parquet", extra="run")
    where = f"snapshot {folder}: {ERASED}"
    try:
        with arrow.OSFile(str(folder / ERASED)) as opened:
            data = opened.read_buffer()
        if (len(data), zlib.crc32(data)) != (file.bytes, file.crc32):
            expected = f"{file.bytes} bytes of crc32 {file.crc32:#010x}"
            raise StoreError(f"{where}: expected {expected}, found {len(data)} of {zlib.crc32(data):#010x}")
        table = parquet.read_table(arrow.BufferReader(data))
        columns = [table.column(name).to_numpy().astype(np.int64) for name in ("user_id", "until")]
    except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise StoreError(f"{where}: {error}") from error
    if len(table) != file.rows:
        raise StoreError(f"{where}: rows expected {file.rows}, found {len(table)}")
    return columns[0], columns[1]


@contextmanager
def _open(folder: Path, file: PartFile) -> Iterator[Any]:
    """The Parquet file, its footer checked; what goes wrong while it is read is a StoreError that names it."""
    arrow, parquet = require("pyarrow", extra="run"), require("pyarrow.parquet", extra="run")
    where = f"snapshot {folder}: {file.path}"
    try:
        with arrow.OSFile(str(folder / file.path)) as data:
            found = footer_crc32(data, file.bytes)
            if found != file.footer_crc32:
                raise StoreError(f"{where}: footer crc32 expected {file.footer_crc32:#010x}, found {found:#010x}")
            opened = parquet.ParquetFile(data, page_checksum_verification=True)
            if opened.metadata.num_rows != file.rows:
                raise StoreError(f"{where}: rows expected {file.rows}, found {opened.metadata.num_rows}")
            yield opened
    except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise StoreError(f"{where}: {error}") from error


def _summaries(folder: Path, file: PartFile, spec: StoreSpec, first: int, last: int, most: int) -> Iterator[Summaries]:
    """The summaries of users from `first` to `last`, at most `most` at a time, or a row group."""
    crc, seen = 0, 0
    with _open(folder, file) as opened:
        for groups in _batches(opened.metadata, first, last, most):
            table = opened.read_row_groups(groups)
            keys, rows = _keys(table), _rows(table, spec)
            del table  # as large as the rows, and many files may be read beside each other
            crc, seen = zlib.crc32(keys, crc), seen + len(keys)
            found = as_summaries(keys, rows)
            _check_records(spec, found, keys)
            inside = (keys["user_id"] >= first) & (keys["user_id"] <= last)
            yield found if inside.all() else as_summaries(keys[inside], rows[inside])
    if seen == file.rows:
        _check_keys(folder, file, crc)


def _merged(streams: list[Iterator[Summaries]], most: int) -> Iterator[Summaries]:
    """The summaries of streams in which users ascend, so that they ascend over all; about `most` at a time. Of a stream
    in which they do not, none is lost."""
    sources = [filter(len, stream) for stream in streams]
    heads = [(source, head) for source in sources if (head := next(source, None)) is not None]
    while heads:
        size = max(1, most // len(heads))
        ends = [int(head.user_ids[:size][-1]) for _, head in heads]
        least = min(range(len(ends)), key=ends.__getitem__)  # nobody up to its end is missing from the heads
        cuts = [int(torch.searchsorted(head.user_ids, ends[least], right=True)) for _, head in heads]
        cuts[least] = max(cuts[least], min(size, len(heads[least][1])))
        found = [_columns(head, slice(cut)) for (_, head), cut in zip(heads, cuts, strict=True)]
        users = np.concatenate([columns[0] for columns in found])
        place = np.empty(len(users), dtype=np.int64)
        # Stable: a user is in one bucket, its versions in order.
        place[np.argsort(users, kind="stable")] = np.arange(len(users))
        places = np.split(place, np.cumsum(cuts)[:-1])
        yield Summaries(*(_placed(column, places) for column in zip(*found, strict=True)))
        rest = [
            (source, Summaries(*map(torch.from_numpy, _columns(head, slice(cut, None)))))
            for (source, head), cut in zip(heads, cuts, strict=True)
        ]
        heads = [(source, left) for source, head in rest if (left := head if len(head) else next(source, None))]


def _placed(parts: tuple[np.ndarray, ...], places: list[np.ndarray]) -> torch.Tensor:
    """Parts of a column put together, each row in its place."""
    out = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for part, place in zip(parts, places, strict=True):
        out[place] = part
    return torch.from_numpy(out)


def _columns(summaries: Summaries, part: slice) -> list[np.ndarray]:
    columns = (summaries.user_ids, summaries.rows, summaries.event_times, summaries.versions)
    return [column.numpy()[part] for column in columns]


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
