import multiprocessing

import pytest
import torch
from workers import SPEC, rows_of

from vista_ext.store import LmdbStore


@pytest.fixture(scope="session")
def processes():
    """Clean processes without the cost of importing torch in each: LMDB must not be carried across a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "vista_ext.store"])
    return context


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(path):
    with LmdbStore.create(path, SPEC) as store:
        yield store


@pytest.fixture
def put(store):
    """Insert users at an event time, with rows that tell both."""

    def put(users, time=1, into=store, **options):
        users, times = torch.tensor(users), torch.full((len(users),), time)
        return into.insert(users, rows_of(users, times), times, **options)

    return put
