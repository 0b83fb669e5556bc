"""Where summaries live between requests: quantized rows by user id and model version, durable and checked."""

from vista_ext.store.base import (
    Found,
    MissingUserError,
    RecordError,
    StoreError,
    StoreSpec,
    Summaries,
    SummaryStore,
    VersionMismatchError,
)
from vista_ext.store.feed import ChangeFeed
from vista_ext.store.lmdb import LmdbStore

__all__ = [
    "ChangeFeed",
    "Found",
    "LmdbStore",
    "MissingUserError",
    "RecordError",
    "StoreError",
    "StoreSpec",
    "Summaries",
    "SummaryStore",
    "VersionMismatchError",
]
