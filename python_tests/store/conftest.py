import importlib
import multiprocessing
import uuid

import pytest
import torch
from places import LmdbPlace, RedisPlace
from workers import SPEC, rows_of

from python_tests.needs import missing
from python_tests.servers import RedisCluster, RedisServer
from vista_ext import _C
from vista_ext.store import LmdbStore, liblmdb
from vista_ext.store.redis import RedisConfig


@pytest.fixture(scope="session")
def processes():
    """Clean processes without the cost of importing torch in each: LMDB must not be carried across a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "vista_ext.store"])
    return context


def use_engine(name, monkeypatch):
    module = liblmdb.engine() if name == "native" else importlib.import_module("lmdb")
    if name == "native" and module is not _C.lmdb:
        missing("no liblmdb is installed (Debian: apt-get install liblmdb0)")
    monkeypatch.setattr(liblmdb, "engine", lambda: module)


@pytest.fixture(params=["native", "python"])
def engine(request, monkeypatch):
    """liblmdb itself and py-lmdb: either opens the environments of this process. Others choose for themselves."""
    use_engine(request.param, monkeypatch)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory):
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture
def redis_config(redis_server):
    """Keys of its own for each test."""
    return RedisConfig(redis_server.url, prefix=uuid.uuid4().hex)


@pytest.fixture(params=["native", "python", "redis", "cluster"])
def place(request):
    """Where each kind of store may be made: in memory of a server, or in a folder by either LMDB."""
    if request.param == "redis":
        return RedisPlace(request.getfixturevalue("redis_config"))
    if request.param == "cluster":
        url = request.getfixturevalue("redis_cluster").url
        return RedisPlace(RedisConfig(url, cluster=True, prefix=uuid.uuid4().hex))
    use_engine(request.param, request.getfixturevalue("monkeypatch"))
    return LmdbPlace(request.getfixturevalue("tmp_path") / "store")


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
