"""Processes for the store's tests, and the rows they write: a row tells its user and generation in every byte."""

import os
import sys

import torch

from vista_ext import _C
from vista_ext.store import LmdbStore, StoreSpec, liblmdb

SPEC = StoreSpec("int8", 16, 256, model_version=3, extra={"checkpoint": "one"})


def version(number, **changes):
    return StoreSpec(SPEC.scheme, SPEC.tokens, SPEC.dim, model_version=number, **changes)


def ids(*users):
    return torch.tensor(users, dtype=torch.int64)


def rows_of(users, generations, spec=SPEC):
    """Rows that differ by user and generation, as bytes that repeat: a mixture of two cannot pass for one."""
    users, generations = torch.as_tensor(users), torch.as_tensor(generations)
    pattern = torch.stack([users % 251, users // 251 % 251, generations % 251, generations // 251 % 251], 1)
    return pattern.to(torch.uint8).repeat(1, spec.row_bytes // 4)


def constant(n, value):
    return torch.full((n,), value, dtype=torch.int64)


def write_generations(path, report, generation, batch, batches):
    """Overwrite the same users, one generation after the other, and report each batch once it is written."""
    with LmdbStore.open(path, readonly=False) as store:
        while True:
            generation += 1
            for first in range(0, batch * batches, batch):
                users = torch.arange(first, first + batch)
                generations = constant(batch, generation)
                assert store.insert(users, rows_of(users, generations), generations) == batch
                report.send((first, generation))


def read_while(path, stop, result, users):
    """Read all users over and over; report how many reads there were, or what was wrong."""
    users, reads, seen = torch.arange(users), 0, set()
    try:
        with LmdbStore.open(path) as store:
            while not stop.is_set():
                found = store.find(users)
                assert torch.equal(found.rows, rows_of(users, found.event_times)), "a mixed row"
                seen.update(found.event_times.tolist())
                reads += 1
        result.send((reads, len(seen), None))
    except BaseException as error:
        result.send((reads, len(seen), repr(error)))


def find_after(path, opened, truncated, result):
    """Open, wait until somebody has truncated the file, read."""
    with LmdbStore.open(path) as store:
        store.find(ids(0))
        opened.set()
        truncated.wait(30)
        try:
            store.find(ids(0))
            result.send("found")
        except Exception as error:
            result.send(f"{type(error).__name__}: {error}")


def open_once(path, readonly, result):
    try:
        with LmdbStore.open(path, readonly=readonly) as store:
            result.send(f"{len(store)}")
    except Exception as error:
        result.send(f"{type(error).__name__}: {error}")


def grow(path, first, count):
    """Write enough to grow the map under everybody else's feet."""
    with LmdbStore.open(path, readonly=False) as store:
        users = torch.arange(first, first + count)
        store.insert(users, rows_of(users, users), constant(count, 1))


def loaded(module, result):
    result.send(module in sys.modules)


def engine_of(candidates, environment, path, result):
    """The name of the LMDB that this process takes, once a store was made and read with it; or the error."""
    os.environ.update(environment)
    if candidates is not None:
        liblmdb.candidates = lambda: candidates
    try:
        engine = liblmdb.engine()
        assert liblmdb.engine() is engine
        with LmdbStore.create(path, SPEC) as store:
            store.insert(ids(5), rows_of([5], [1]), ids(1))
            assert torch.equal(store.find(ids(5)).rows, rows_of([5], [1]))
        result.send(engine.__name__)
    except Exception as error:
        result.send(str(error))


def open_unloaded(path, result):
    try:
        _C.lmdb.open(str(path), 0, 1)
    except _C.lmdb.Error as error:
        result.send(str(error))


def write_when_told(path, pipe):
    """Write one more generation of user 1 each time, and say so."""
    with LmdbStore.open(path, readonly=False) as store:
        for generation in iter(pipe.recv, None):
            store.insert(ids(1), rows_of([1], [generation]), ids(generation))
            pipe.send(generation)


def erase_elsewhere(path, user):
    with LmdbStore.open(path, readonly=False) as store:
        assert store.erase(ids(user), ids(2**40)) == 1
