"""The batch refresh of everybody: shared among processes, interrupted anywhere, the same bytes in the end."""

import logging
import os
import random
import signal
import time

import pytest
import torch

from python_tests import ranks
from python_tests.serve.workers import SHARDS, summarize_share, summarize_to_server
from python_tests.servers import RedisServer
from vista_ext.data.dataset import EventDataset
from vista_ext.processes import Processes
from vista_ext.serve.job import Summarized, summarize_all
from vista_ext.serve.summarize import open_for_writing
from vista_ext.store import LmdbStore, RedisConfig, RedisStore

USERS = 60  # of the tiny data
KILLS = int(os.environ.get("VISTA_KILL_ROUNDS", "6"))
SEED = int(os.environ.get("VISTA_KILL_SEED", "0"))


def content(path):
    """All of a store: users, times, rows."""
    with LmdbStore.open(path) as store:
        parts = list(store)
    return tuple(torch.cat([getattr(p, name) for p in parts]) for name in ("user_ids", "event_times", "rows"))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def store(run, tmp_path):
    with open_for_writing(tmp_path / "store", run.store_spec()) as store:
        yield store


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    """The content that a job alone and in peace gives."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("undisturbed") / "store"
    summarize_share(trained, path)
    assert not (path / "job").exists()
    return content(path)


class Killed(BaseException):
    pass


class Mortal:
    """A store that dies before or after some write."""

    def __init__(self, store, writes, after):
        self.store, self.left, self.after, self.spec = store, writes, after, store.spec

    def find(self, *arguments):
        return self.store.find(*arguments)

    def insert(self, *arguments):
        self.left -= 1
        if self.left < 0 and not self.after:
            raise Killed
        written = self.store.insert(*arguments)
        if self.left < 0:
            raise Killed
        return written


@pytest.mark.parametrize("after", [False, True])
def test_cut_off_anywhere_it_goes_on(run, store, tmp_path, undisturbed, after):
    """With other numbers of processes each time; nothing finished is done twice, and the counts are exact."""
    job, shards = tmp_path / "job", -(-USERS // SHARDS["users_per_shard"])
    for writes in (0, 1, 5, 2, 7, 3, 40):
        finished = len(list(job.rglob("shard-*")))
        mortal = Mortal(store, writes, after)
        try:
            done = summarize_all(run.vista, run.dataset, mortal, job, **SHARDS)
        except Killed:
            now = len(list(job.rglob("shard-*")))
            assert finished <= now < shards and now - finished == writes // 2
        else:
            assert done == Summarized(USERS, USERS, finished * SHARDS["users_per_shard"]) and 0 < finished < shards
            break
    assert "by an interrupted run" in str(done) and not job.exists()
    store.close()
    assert same(content(tmp_path / "store"), undisturbed)


def test_only_the_same_job_goes_on(run, store, tmp_path):
    job = tmp_path / "job"

    def cut_off(**choice):
        with pytest.raises(Killed):
            summarize_all(run.vista, run.dataset, Mortal(store, 4, False), job, **SHARDS, **choice)
        return len(list(job.rglob("shard-*")))

    assert cut_off() == 2
    assert cut_off(max_history=9) == 2  # begun anew, and the other forgotten
    assert cut_off() == 2
    moments = run.dataset.end_of_events(torch.arange(USERS)) - 5
    assert cut_off(before=moments) == 2
    assert summarize_all(run.vista, run.dataset, store, job, **SHARDS).resumed == 0


def test_a_finished_shard_that_the_store_lost_or_the_disk_tore_is_done_again(run, store, tmp_path):
    job = tmp_path / "job"
    with pytest.raises(Killed):
        summarize_all(run.vista, run.dataset, Mortal(store, 9, False), job, **SHARDS)
    store.erase(torch.tensor([6]))
    (shard,) = job.rglob("shard-2")
    shard.write_text("")
    assert summarize_all(run.vista, run.dataset, store, job, **SHARDS) == Summarized(USERS, USERS, 2 * 4)
    assert len(store) == USERS


def test_a_newer_summary_stays_and_is_not_counted(run, store, tmp_path):
    times = torch.tensor([2**40])
    store.insert(torch.tensor([3]), torch.zeros(1, store.spec.row_bytes, dtype=torch.uint8), times)
    done = summarize_all(run.vista, run.dataset, store, tmp_path / "job", **SHARDS)
    assert (done.users, done.written, str(done)) == (USERS, USERS - 1, "59 summaries written")


def test_nobody(run, store, tmp_path, monkeypatch):
    monkeypatch.setattr(EventDataset, "num_users", 0)
    assert summarize_all(run.vista, run.dataset, store, tmp_path / "job") == Summarized(0, 0, 0)


def test_a_process_alone_does_its_share(run, store, tmp_path, caplog):
    """Of three processes one: every third shard, and what it says on the way."""
    caplog.set_level(logging.INFO, "vista")
    shares = []
    for rank in range(3):
        processes = _Unmet(rank, 3)
        done = summarize_all(run.vista, run.dataset, store, tmp_path / "job", processes=processes, **SHARDS)
        shares.append(done.users)
    assert shares == [20, 20, 20]
    assert "process 1 of 3: 20 of 20 users" in caplog.text


class _Unmet(Processes):
    """Sums over itself only, so that the processes of a job can run one after the other."""

    def sum(self, values):
        return values


def test_two_processes_write_one_store(trained, tmp_path, forkserver, undisturbed):
    told = forkserver.Queue()
    assert ranks.run(forkserver, 2, summarize_share, trained, tmp_path / "store", told) == [0, 0]
    assert sorted(told.get(timeout=10) for _ in range(2)) == [(rank, Summarized(60, 60, 0)) for rank in range(2)]
    assert same(content(tmp_path / "store"), undisturbed)


def test_two_processes_write_one_server(trained, tmp_path, forkserver, undisturbed):
    """As processes of several machines do."""
    pytest.importorskip("redis", reason="pip install '.[redis]'")
    server = RedisServer(tmp_path / "redis")
    try:
        config, told = RedisConfig(server.url), forkserver.Queue()
        assert ranks.run(forkserver, 2, summarize_to_server, trained, config, tmp_path / "job", told) == [0, 0]
        assert [told.get(timeout=10)[1] for _ in range(2)] == [Summarized(60, 60, 0)] * 2
        with RedisStore.open(config) as store:
            found = store.find(undisturbed[0])
            assert len(store) == USERS
        assert torch.equal(found.rows, undisturbed[2]) and torch.equal(found.event_times, undisturbed[1])
    finally:
        server.stop()


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_store(trained, tmp_path, forkserver, undisturbed):
    """All processes killed, as torchrun does when one has died, and begun again with another number of them."""
    chance, path, kills = random.Random(SEED), tmp_path / "store", 0
    for _ in range(KILLS):
        before = len(list(path.rglob("shard-*")))
        size = chance.randint(1, 3)
        # The whole job takes about 30 writes of this delay, shared; it must not end before it is killed.
        started = ranks.start(forkserver, size, summarize_share, trained, path, None, 0.05 * size)
        end = time.monotonic() + 60
        while len(list(path.rglob("shard-*"))) == before and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        for process in started:
            kills += process.is_alive()
            os.kill(process.pid, signal.SIGKILL)
        for process in started:
            process.join(30)
    assert kills
    told = forkserver.Queue()
    assert ranks.run(forkserver, 2, summarize_share, trained, path, told) == [0, 0]
    done = told.get(timeout=10)[1]
    assert (done.users, done.written) == (USERS, USERS)
    print(f"{kills} processes killed, {done.resumed} of {USERS} users were done before the last run")
    assert same(content(path), undisturbed)
    with LmdbStore.open(path) as store:
        assert store.find(torch.arange(USERS)).hits.all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE must be a number, as torchrun sets it, found None"),
        ({"WORLD_SIZE": "2"}, "RANK must be a number"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a number, as torchrun sets it, found 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be below WORLD_SIZE = 2, found 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK must be a number"),
    ],
)
def test_what_the_environment_says(monkeypatch, given, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.from_environment() == Processes(0, 1)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Processes.from_environment()


def test_the_device_of_a_process():
    assert [Processes(3, 4, 1).device(name) for name in ("cuda", "cpu", "cuda:0")] == ["cuda:1", "cpu", "cuda:0"]
    assert Processes().device("cuda") == "cuda"
