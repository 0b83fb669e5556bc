"""Columnar snapshots: a store as Parquet files in Hive-style partitions, complete or not there at all.

    SNAPSHOT/_manifest.json  _SUCCESS  _erased.parquet  bucket=0/part-0.parquet  bucket=1/...

A user's bucket is the top of a hash of the id, so buckets are ranges of the hash and of equal size; within a bucket
summaries are sorted by user id and model version. Rows are fixed-size binary, uncompressed: the bytes of the store.
Erased users are in a file of their own. docs/delivery.md has the format.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch

from vista_ext.store import StoreSpec, Summaries, record
from vista_ext.store.checks import check_summaries

FORMAT = 2
MANIFEST, SUCCESS, ERASED = "_manifest.json", "_SUCCESS", "_erased.parquet"
KEYS = np.dtype([(name, "<i8") for name in ("user_id", "model_version", "event_time", "crc32")])


@dataclass(frozen=True)
class PartFile:
    """A file of a snapshot: its path there, its length, its records, and checksums of its keys and of its footer."""

    path: str
    bytes: int
    rows: int
    keys_crc32: int
    footer_crc32: int


@dataclass(frozen=True)
class ErasedFile:
    """The file of erased users: its length, its rows, and a checksum of all of it."""

    bytes: int
    rows: int
    crc32: int


def bucket_of(users: np.ndarray, buckets: int) -> np.ndarray:
    """The bucket of each int64 user id: the top bits of the finalizer of SplitMix64."""
    x = users.astype(np.int64).view(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    # In two steps: a shift by all 64 bits is undefined.
    return ((x >> np.uint64(1)) >> np.uint64(63 - (buckets.bit_length() - 1))).astype(np.int64)


def keys_of(spec: StoreSpec, summaries: Summaries) -> np.ndarray:
    """User id, model version, event time and the record's checksum of each summary, `KEYS` `[n]`."""
    users, versions, rows, times = check_summaries("snapshot", summaries, spec.row_bytes)
    packed = record.pack(spec, users, versions, times, rows)
    headers = np.ascontiguousarray(packed[:, : record.HEADER_BYTES]).reshape(-1).view(record.HEADER)
    keys = np.empty(len(users), dtype=KEYS)
    for name in KEYS.names or ():
        keys[name] = headers[name].astype(np.int64)
    return keys


def footer_crc32(file: IO[bytes], size: int) -> int:
    """Checksum of a Parquet file's footer, which says where everything else is."""
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little") + 8
    if length > size:
        raise ValueError(f"a footer of {length} bytes in a file of {size}")
    file.seek(size - length)
    return zlib.crc32(file.read(length))


def as_summaries(keys: np.ndarray, rows: np.ndarray) -> Summaries:
    """Summaries of `KEYS` and rows."""
    users, versions, times = (
        torch.from_numpy(np.ascontiguousarray(keys[name])) for name in ("user_id", "model_version", "event_time")
    )
    return Summaries(users, torch.from_numpy(rows), times, versions)
