"""Where summaries live between requests: quantized rows by user id and model version, durable and checked."""

from vista_ext.store.base import (
    STRICT,
    ExpiredError,
    Found,
    MissingUserError,
    ReadPolicy,
    RecordError,
    StoreError,
    StoreSpec,
    StoreUnavailableError,
    Summaries,
    SummaryStore,
    VersionMismatchError,
)
from vista_ext.store.lmdb import LmdbStore

__all__ = [
    "STRICT",
    "ExpiredError",
    "Found",
    "LmdbStore",
    "MissingUserError",
    "ReadPolicy",
    "RecordError",
    "StoreError",
    "StoreSpec",
    "StoreUnavailableError",
    "Summaries",
    "SummaryStore",
    "VersionMismatchError",
]
