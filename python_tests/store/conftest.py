import importlib
import multiprocessing

import pytest
import torch
from workers import SPEC, rows_of

from vista_ext import _C
from vista_ext.store import LmdbStore, liblmdb


@pytest.fixture(scope="session")
def processes():
    """Clean processes without the cost of importing torch in each: LMDB must not be carried across a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "vista_ext.store"])
    return context


@pytest.fixture(params=["native", "python"])
def engine(request, monkeypatch):
    """liblmdb itself and py-lmdb: either opens the environments of this process. Others choose for themselves."""
    module = liblmdb.engine() if request.param == "native" else importlib.import_module("lmdb")
    if request.param == "native" and module is not _C.lmdb:
        pytest.skip("no liblmdb on this machine")
    monkeypatch.setattr(liblmdb, "engine", lambda: module)
    return request.param


@pytest.fixture
def path(tmp_path, engine):
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
