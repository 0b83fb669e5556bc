"""Reads of 256 users, checksums verified: each store beside what its engine does by itself.

The embedded store through liblmdb against py-lmdb, warm and cold. Cold: the store's pages are dropped from the page
cache before each read, which needs no root. Both sides read the same users from the same file, in turns, and close the
store in between: a mapped page cannot be dropped. A server against redis-py's plain pipeline of GETs, which checks and
gathers nothing. The hot cache, all hits, against the embedded store that it spares.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from python_tests.servers import RedisServer
from vista_ext import _C
from vista_ext.store import HotCache, LmdbStore, RedisConfig, RedisStore, StoreSpec, liblmdb

SPEC = StoreSpec("int8", 128, 256)
BATCH = 256
USERS, QUICK_USERS = 20_000, 1_000
ROUNDS, QUICK_ROUNDS = 15, 2


@pytest.fixture(scope="module")
def engines() -> dict[str, Any]:
    """Ours first."""
    if liblmdb.engine() is not _C.lmdb:
        pytest.skip("no liblmdb on this machine")
    return {"ours": _C.lmdb, "py_lmdb": importlib.import_module("lmdb")}


@pytest.fixture(scope="module")
def path(request: pytest.FixtureRequest, engines: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.config.getoption("--device") != "cpu":
        pytest.skip("the embedded store is read by the CPU")
    users = QUICK_USERS if request.config.getoption("--quick") else USERS
    folder = tmp_path_factory.mktemp("bench") / "store"
    with LmdbStore.create(folder, SPEC) as store:
        for ids in torch.arange(users).split(1000):
            store.insert(ids, rows_of(ids), ids)
    return folder


def rows_of(ids: torch.Tensor) -> torch.Tensor:
    """Rows that tell their user, without a pattern that a disk could compress."""
    noise = torch.randint(0, 256, (SPEC.row_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return noise[None] ^ (ids[:, None] * 37 % 251).to(torch.uint8)


@contextmanager
def opened(engine: Any, path: Path) -> Iterator[LmdbStore]:
    with mock.patch.object(liblmdb, "engine", lambda: engine), LmdbStore.open(path) as store:
        yield store


def drop_pages(path: Path) -> None:
    fd = os.open(path / "data.mdb", os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@pytest.mark.parametrize("state", ["warm", "cold"])
def bench_find(state: str, benchmark: Any, engines: dict[str, Any], path: Path, request: pytest.FixtureRequest) -> None:
    quick = request.config.getoption("--quick")
    generator = torch.Generator().manual_seed(1)
    total = QUICK_USERS if quick else USERS
    out = torch.empty((BATCH, SPEC.row_bytes), dtype=torch.uint8)
    best = dict.fromkeys(engines, float("inf"))

    def batch() -> torch.Tensor:
        return torch.randint(0, total, (BATCH,), generator=generator)

    for name, engine in engines.items():
        users = batch()
        with opened(engine, path) as store:
            if not torch.equal(store.find(users, out=out).rows, rows_of(users)):
                raise AssertionError(f"{name} is wrong, nothing was timed")

    def read(name: str, users: torch.Tensor) -> None:
        with opened(engines[name], path) as store:
            if state == "warm":
                store.find(users, out=out)
            begin = time.perf_counter()
            store.find(users, out=out)
            best[name] = min(best[name], time.perf_counter() - begin)

    def round_of_all() -> None:
        users = batch()
        for name in engines:
            if state == "cold":
                drop_pages(path)
            read(name, users)

    benchmark.group = "store_find"
    # The rounds time themselves: what pytest-benchmark sees includes opening the store.
    benchmark.pedantic(round_of_all, rounds=QUICK_ROUNDS if quick else ROUNDS)
    report(benchmark, f"{BATCH}-users-{state}", best)


def bench_server(benchmark: Any, server: RedisStore, request: pytest.FixtureRequest) -> None:
    out = torch.empty((BATCH, SPEC.row_bytes), dtype=torch.uint8)
    prefix, client = server._config.prefix, server._client

    def plain(users: torch.Tensor) -> Any:
        pipe = client.pipeline(transaction=False)
        for user in users.tolist():
            pipe.get(f"{prefix}:{{{user}}}:0")
        return pipe.execute()

    sides = {"ours": lambda users: server.find(users, out=out), "redis_py": plain}
    take_turns(benchmark, "server", sides, QUICK_USERS, request)


def bench_hot(benchmark: Any, engines: dict[str, Any], path: Path, request: pytest.FixtureRequest) -> None:
    out = torch.empty((BATCH, SPEC.row_bytes), dtype=torch.uint8)
    with opened(engines["ours"], path) as store:
        cache = HotCache(store, QUICK_USERS)
        for users in torch.arange(QUICK_USERS).split(BATCH):
            cache.gather(users).release()

        def hold(users: torch.Tensor) -> None:
            with cache.gather(users):
                pass

        sides = {"ours": hold, "lmdb": lambda users: store.find(users, out=out)}
        take_turns(benchmark, "hot-by-slot", sides, QUICK_USERS, request)
        assert cache.stats().misses == QUICK_USERS


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisStore]:
    if request.config.getoption("--device") != "cpu":
        pytest.skip("a server is read by the CPU")
    process = RedisServer(tmp_path_factory.mktemp("bench") / "redis")
    try:
        with RedisStore.create(RedisConfig(process.url), SPEC) as store:
            ids = torch.arange(QUICK_USERS)
            store.insert(ids, rows_of(ids), ids)
            if not torch.equal(store.find(ids[:BATCH]).rows, rows_of(ids[:BATCH])):
                raise AssertionError("the server's store is wrong, nothing was timed")
            yield store
    finally:
        process.stop()


def take_turns(
    benchmark: Any,
    case: str,
    sides: dict[str, Callable[[torch.Tensor], Any]],
    users: int,
    request: pytest.FixtureRequest,
) -> None:
    """Time both sides on the same users, one after the other."""
    generator = torch.Generator().manual_seed(2)
    best = dict.fromkeys(sides, float("inf"))

    def round_of_all() -> None:
        batch = torch.randint(0, users, (BATCH,), generator=generator)
        for name, side in sides.items():
            begin = time.perf_counter()
            side(batch)
            best[name] = min(best[name], time.perf_counter() - begin)

    benchmark.group = "store_find"
    benchmark.pedantic(round_of_all, rounds=QUICK_ROUNDS if request.config.getoption("--quick") else 4 * ROUNDS)
    report(benchmark, f"{BATCH}-users-{case}", best)


def report(benchmark: Any, case: str, best: dict[str, float]) -> None:
    """Keep the best time of each side; ours is the first. The hot cache moves nothing: its rate is that of a copy."""
    size = BATCH * (64 + SPEC.row_bytes)
    ours, (peer, theirs) = best["ours"], list(best.items())[1]
    benchmark.extra_info.update(
        op="store_find",
        case=case,
        threads=os.cpu_count(),
        bytes=size,
        flops=0,
        bytes_per_s=size / ours,
        flop_per_s=0,
        ours_ms=1e3 * ours,
        **{f"{peer}_ms": 1e3 * theirs, f"ratio_to_{peer}": theirs / ours},
    )
