"""Where summaries live between requests: quantized rows by user id and model version, durable and checked."""

from vista_ext.store.base import (
    STRICT,
    Erasures,
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
from vista_ext.store.feed import ChangeFeed
from vista_ext.store.hot import CacheFullError, HotCache
from vista_ext.store.lmdb import LmdbStore
from vista_ext.store.redis import RedisConfig, RedisStore

__all__ = [
    "STRICT",
    "CacheFullError",
    "ChangeFeed",
    "Erasures",
    "ExpiredError",
    "Found",
    "HotCache",
    "LmdbStore",
    "MissingUserError",
    "ReadPolicy",
    "RecordError",
    "RedisConfig",
    "RedisStore",
    "StoreError",
    "StoreSpec",
    "StoreUnavailableError",
    "Summaries",
    "SummaryStore",
    "VersionMismatchError",
]
