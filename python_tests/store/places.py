"""Where a store under test lies, whatever kind it is: made, opened again, harmed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vista_ext.store import LmdbStore, record
from vista_ext.store.redis import RedisConfig, RedisStore


@dataclass
class LmdbPlace:
    path: Path

    def create(self, spec):
        return LmdbStore.create(self.path, spec)

    def open(self, spec=None):
        return LmdbStore.open(self.path, readonly=False, spec=spec)

    def change(self, store, user, version, change):
        """Replace what is stored of a user by `change` of it."""
        (key,) = record.keys(np.array([user]), np.array([version]))
        store._environment.write(lambda txn: txn.put(key, change(bytes(txn.get(key)))))


@dataclass
class RedisPlace:
    config: RedisConfig

    def create(self, spec):
        return RedisStore.create(self.config, spec)

    def open(self, spec=None):
        return RedisStore.open(self.config, spec=spec)

    def change(self, store, user, version, change):
        key = f"{self.config.prefix}:{{{user}}}:{version}"
        store._client.set(key, change(store._client.get(key)))
