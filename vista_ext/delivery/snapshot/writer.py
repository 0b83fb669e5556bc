"""Writes snapshots: a bucket's summaries are gathered into row groups, so memory does not grow with the store."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
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
    bucket_of,
    footer_crc32,
    keys_of,
)
from vista_ext.store import Erasures, StoreError, StoreSpec, Summaries, SummaryStore
from vista_ext.store.checks import check_integer
from vista_ext.store.environment import new_folder

BUCKETS = 16
GROUP_BYTES = 4 << 20  # of rows in a row group, the least that is read; each bucket holds one in memory while writing


def export_snapshot(
    summaries: SummaryStore | Iterable[Summaries],
    path: Path | str,
    spec: StoreSpec,
    buckets: int = BUCKETS,
    *,
    erasures: Callable[[], Erasures] | None = None,
) -> int:
    """Write summaries as a snapshot, which appears at `path` when it is complete and synced.

    Args:
        summaries: a store, or batches by ascending user id and model version. Each summary is whole; of a store that
            is written meanwhile, some may be newer than others.
        path: where nothing is yet.
        spec: the layout of the rows, kept in the manifest.
        buckets: a power of two up to 1024; memory is 4 MiB for each.
        erasures: asked for after the last summary, so that who was erased meanwhile is known to be; of a store given
            as `summaries`, its own by default.

    Returns:
        How many summaries it has.

    Raises:
        StoreError: something is at `path`, it cannot be written, or the summaries are not in order.
    """
    check_integer("export", "buckets", buckets, 1, 1024)
    if buckets & (buckets - 1):
        raise ValueError(f"export: buckets must be a power of two, found {buckets}")
    with new_folder(Path(path), "snapshot") as folder, ExitStack() as stack:
        parts = [stack.enter_context(_Part(folder, i, spec)) for i in range(buckets)]
        for batch in summaries:
            keys = keys_of(spec, batch)
            rows = batch.rows.numpy()
            where = bucket_of(keys["user_id"], buckets)
            for i in np.unique(where).tolist():
                chosen = np.flatnonzero(where == i)
                parts[i].append(keys[chosen], rows[chosen])
        files = [part.finish() for part in parts]
        total = sum(file.rows for file in files)
        if erasures is None and isinstance(summaries, SummaryStore):
            erasures = summaries.erasures
        erased = _write_erased(folder, erasures() if erasures else Erasures(*torch.empty(2, 0, dtype=torch.int64)))
        manifest = {"format": FORMAT, "spec": spec.to_dict(), "buckets": buckets, "rows": total}
        manifest["erased"] = asdict(erased)
        text = json.dumps(manifest | {"files": [asdict(file) for file in files]}, indent=1)
        (folder / MANIFEST).write_text(text)
        (folder / SUCCESS).touch()
    return total


def _write_erased(folder: Path, erasures: Erasures) -> ErasedFile:
    arrow, parquet = require("pyarrow", extra="run"), require("pyarrow.parquet", extra="run")
    columns = {"user_id": arrow.array(erasures.user_ids.numpy()), "until": arrow.array(erasures.until.numpy())}
    data = io.BytesIO()
    parquet.write_table(arrow.table(columns), data)
    (folder / ERASED).write_bytes(data.getvalue())
    return ErasedFile(len(data.getvalue()), len(erasures), zlib.crc32(data.getvalue()))


class _Part:
    """The file of one bucket while it is written."""

    def __init__(self, folder: Path, bucket: int, spec: StoreSpec) -> None:
        self._arrow, parquet = require("pyarrow", extra="run"), require("pyarrow.parquet", extra="run")
        self._name = f"bucket={bucket}/part-0.parquet"
        (folder / self._name).parent.mkdir()
        self._file = (folder / self._name).open("w+b")
        fields = [(name, self._arrow.int64()) for name in KEYS.names or ()]
        schema = self._arrow.schema([*fields, ("row", self._arrow.binary(spec.row_bytes))])
        options = {"compression": "none", "use_dictionary": False, "write_statistics": ["user_id"]}
        self._writer = parquet.ParquetWriter(
            self._file, schema, store_schema=False, write_page_checksum=True, **options
        )
        group = max(1, GROUP_BYTES // spec.row_bytes)
        self._keys, self._rows = np.empty(group, dtype=KEYS), np.empty((group, spec.row_bytes), dtype=np.uint8)
        self._filled = self._written = self._crc = 0
        self._last = np.array([(-(2**63), -1, 0, 0)], dtype=KEYS)

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        begin = 0
        while begin < len(keys):
            n = min(len(keys) - begin, len(self._keys) - self._filled)
            self._keys[self._filled : self._filled + n] = keys[begin : begin + n]
            self._rows[self._filled : self._filled + n] = rows[begin : begin + n]
            self._filled, begin = self._filled + n, begin + n
            if self._filled == len(self._keys):
                self._flush()

    def _flush(self) -> None:
        if not self._filled:
            return
        keys, rows = self._keys[: self._filled], self._rows[: self._filled]
        self._check_order(keys)
        columns = [self._arrow.array(keys[name]) for name in KEYS.names or ()]
        data = self._arrow.py_buffer(rows)
        columns.append(self._arrow.Array.from_buffers(self._writer.schema.field("row").type, len(keys), [None, data]))
        self._writer.write_table(self._arrow.Table.from_arrays(columns, schema=self._writer.schema))
        self._crc = zlib.crc32(keys, self._crc)
        self._written += self._filled
        self._filled = 0

    def _check_order(self, keys: np.ndarray) -> None:
        before, self._last = np.concatenate([self._last, keys[:-1]]), keys[-1:].copy()
        same_user = before["user_id"] == keys["user_id"]
        ascends = (before["user_id"] < keys["user_id"]) | (
            same_user & (before["model_version"] < keys["model_version"])
        )
        for i in np.flatnonzero(~ascends)[:1]:
            found = f"{keys[i].tolist()[:2]} after {before[i].tolist()[:2]}"
            raise StoreError(f"snapshot: summaries must ascend by user and version, found {found}")

    def finish(self) -> PartFile:
        self._flush()
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.seek(0, os.SEEK_END)
        return PartFile(self._name, size, self._written, self._crc, footer_crc32(self._file, size))

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self._writer.close()  # after a failure, too: it would close itself later, into a file that is closed
        finally:
            self._file.close()
