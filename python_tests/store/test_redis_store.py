"""What is a server's own: races, limits, credentials, TLS, and what happens when it is not there."""

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from places import RedisPlace
from workers import SPEC, constant, ids, rows_of, version

from python_tests.needs import program
from python_tests.servers import RedisServer
from vista_ext._extras import MissingExtraError
from vista_ext.store import LmdbStore, ReadPolicy, RecordError, StoreError, StoreUnavailableError, record
from vista_ext.store.redis import RedisConfig, RedisStore


@pytest.fixture
def store(redis_config):
    with RedisStore.create(redis_config, SPEC) as store:
        yield store


def test_the_bytes_are_those_of_the_embedded_store(store, redis_config, put, path):
    put([7], 5)
    with LmdbStore.create(path, SPEC) as embedded:
        put([7], 5, into=embedded)
        (key,) = record.keys(ids(7).numpy(), ids(3).numpy())
        with embedded._environment.read() as txn:
            assert bytes(txn.get(key)) == store._client.get(f"{redis_config.prefix}:{{7}}:3")


@pytest.mark.parametrize(("stored", "offered", "wins"), [
    (2**53, 2**53 + 1, True), (2**53 + 1, 2**53, False), (-1, 0, True), (0, -1, False), (-2**63, 2**63 - 1, True),
    (2**63 - 1, -2**63, False), (2**32, 2**32 - 1, False), (2**32 - 1, 2**32, True), (-2**32, -2**32 - 1, False),
    (2**31, 2**31 - 1, False), (-5, -5, True),
])  # fmt: skip
def test_times_are_compared_exactly(store, put, stored, offered, wins):
    """Lua has only doubles, which do not tell 2^53 from 2^53 + 1."""
    put([1], stored)
    assert put([1], offered) == int(wins)
    assert store.find(ids(1)).event_times.item() == (offered if wins else stored)


def test_racing_writers_leave_the_newest(store, redis_config):
    users, generations = torch.arange(20), torch.randperm(40)

    def write(generation):
        with RedisStore.open(redis_config) as mine:
            times = constant(len(users), generation)
            mine.insert(users, rows_of(users, times), times)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, generations.tolist()))
    found = store.find(users)
    assert (found.event_times == 39).all() and torch.equal(found.rows, rows_of(users, constant(20, 39)))


def test_readers_see_whole_summaries(store, redis_config):
    users = torch.arange(30)
    store.insert(users, rows_of(users, constant(30, 0)), constant(30, 0))
    stop = time.monotonic() + 1.5

    def read(_):
        seen = set()
        while time.monotonic() < stop:
            found = store.find(users)
            assert torch.equal(found.rows, rows_of(users, found.event_times))
            seen.update(found.event_times.tolist())
        return seen

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read, i) for i in range(3)]
        generation = 0
        with RedisStore.open(redis_config) as writer:
            while time.monotonic() < stop:
                generation += 1
                times = constant(30, generation)
                writer.insert(users, rows_of(users, times), times)
        assert all(len(reader.result()) > 2 for reader in readers)


def test_a_corrupt_record_is_found_and_healed(store, redis_config, put):
    put([17], 10)
    place = RedisPlace(redis_config)
    for offset in (0, 6, 24, 32, 48, 60, 64 + 1000, 64 + SPEC.row_bytes - 1):
        place.change(store, 17, 3, lambda v, at=offset: v[:at] + bytes([v[at] ^ 1]) + v[at + 1 :])
        with pytest.raises(RecordError, match="record of user 17, model version 3: "):
            store.find(ids(17))
        with pytest.raises(RecordError):
            list(store)
        # A header that is not this key's is newer than nothing; the rest of a record the server does not check.
        assert put([17], 5) == int(offset < 40)
        put([17], 10, newest_wins=False)
        assert store.find(ids(17)).hits.all()


def test_what_else_is_on_the_server_is_left_alone(store, redis_config, put):
    put([1])
    for key in ("{x}:3", "{}:3", "{01}:3", "{-0}:3", "{99999999999999999999}:3", "{5}:99999999999999999999", "other"):
        store._client.set(f"{redis_config.prefix}:{key}", "x")
    store._client.set(f"{redis_config.prefix}x:{{5}}:3", "x")
    assert len(store) == 1 and [s.user_ids.tolist() for s in store] == [[1]]
    store._client.sadd(f"{redis_config.prefix}:versions", "three")
    with pytest.raises(StoreError, match="versions must be model versions, found b'three'"):
        store.erase(ids(1))


def test_nothing_is_left_behind(store, redis_config, put):
    put([1, 2], 5)
    put([1, 2], 4)
    store.update(ids(9), rows_of([9], [1]), ids(1))
    keys = set(store._client.scan_iter(match=f"{redis_config.prefix}:*"))
    assert keys == {f"{redis_config.prefix}:{k}".encode() for k in ("spec", "versions", "{1}:3", "{2}:3")}
    assert all(store._client.ttl(key) == -1 for key in keys)


def test_a_write_that_is_sent_twice_is_done_once(store, redis_config):
    """The script ran, but its answer was lost: what is sent again finds the work done."""
    commands = []
    execute = store._execute
    store._execute = lambda c: commands.extend(c) or execute(c)
    store.insert(ids(1), rows_of([1], [5]), ids(5))
    (script,) = (command for command in commands if command[0] == "EVAL")
    assert execute([script]) == [1] and store.find(ids(1)).event_times.item() == 5
    store.insert(ids(1), rows_of([1], [6]), ids(6))
    with pytest.raises(StoreError, match="no such key"):  # neither there nor done: nobody may believe that it is
        execute([script])
    assert store.find(ids(1)).event_times.item() == 6


def test_stores_share_a_server(store, redis_config, put):
    put([1])
    with pytest.raises(StoreError, match="expected a prefix where nothing is"):
        RedisStore.create(redis_config, SPEC)
    other = RedisConfig(redis_config.url, prefix=redis_config.prefix + "-b")
    with pytest.raises(StoreError, match="no store with this prefix"):
        RedisStore.open(other)
    with RedisStore.create(other, version(9)) as second:
        assert len(second) == 0
    store._client.set(f"{redis_config.prefix}:spec", b'{"format": 2}')
    with pytest.raises(StoreError, match="its spec cannot be read: format expected 1, found 2"):
        RedisStore.open(redis_config)


def test_a_server_that_is_not_there(redis_config, tmp_path):
    server = RedisServer(tmp_path / "redis", "--appendonly", "yes")
    try:
        with RedisStore.create(RedisConfig(server.url, timeout=1), SPEC) as store:
            store.insert(ids(1), rows_of([1], [1]), ids(1))
            server.stop()
            begin = time.monotonic()
            for call in (lambda: store.find(ids(1)), lambda: store.erase(ids(1)), lambda: len(store)):
                with pytest.raises(StoreUnavailableError, match=r"store redis://127\.0\.0\.1:\d+ \(vista\): "):
                    call()
            assert time.monotonic() - begin < 5
            server.start()
            assert store.find(ids(1)).hits.all()  # the same object goes on
    finally:
        server.stop()
    with pytest.raises(StoreUnavailableError):
        RedisStore.open(RedisConfig(server.url, cluster=True, timeout=1))


def test_a_server_that_does_not_answer(tmp_path):
    server = RedisServer(tmp_path / "redis")
    try:
        with RedisStore.create(RedisConfig(server.url, timeout=0.2, retries=0), SPEC) as store:
            store._client.execute_command("CLIENT PAUSE", 1000, "ALL")
            with pytest.raises(StoreUnavailableError, match=r"[Tt]imeout"):
                store.find(ids(1))
    finally:
        server.stop()


def test_a_full_server_refuses(tmp_path):
    server = RedisServer(tmp_path / "redis", "--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    try:
        with RedisStore.create(RedisConfig(server.url), SPEC) as store, pytest.raises(StoreError, match="maxmemory"):
            users = torch.arange(2000)
            store.insert(users, rows_of(users, users), users)
    finally:
        server.stop()


def test_credentials_come_from_the_environment_and_are_never_shown(tmp_path, monkeypatch):
    server = RedisServer(tmp_path / "redis", "--requirepass", "correct horse")
    try:
        with pytest.raises(StoreError, match="authenticat") as info:
            RedisStore.create(RedisConfig(server.url), SPEC)
        assert not isinstance(info.value, StoreUnavailableError)
        monkeypatch.setenv("VISTA_REDIS_URL", server.url)
        monkeypatch.setenv("VISTA_REDIS_PASSWORD", "wrong battery")
        config = RedisConfig.from_environment()
        with pytest.raises(StoreError) as info:
            RedisStore.create(config, SPEC)
        assert "wrong battery" not in f"{info.value} {config!r}" and server.url in str(info.value)
        monkeypatch.setenv("VISTA_REDIS_PASSWORD", "correct horse")
        with RedisStore.create(RedisConfig.from_environment(prefix="p"), SPEC) as store:
            assert len(store) == 0
        inside = RedisConfig(server.url.replace("//", "//default:correct%20horse@"), prefix="q")
        with RedisStore.create(inside, SPEC) as store:
            store.close()
            with pytest.raises(StoreError, match="closed") as info:
                store.find(ids(1))
        assert "horse" not in f"{info.value} {inside!r} {inside.where}"
    finally:
        server.stop()


def test_tls(tmp_path):
    openssl = program("openssl", package="openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    server = RedisServer(
        tmp_path / "redis",
        "--tls-cert-file",
        str(certificate),
        "--tls-key-file",
        str(key),
        "--tls-ca-cert-file",
        str(certificate),
        tls=True,
    )
    url = server.url.replace("redis://", "rediss://")
    try:
        config = RedisConfig(url, tls={"ssl_ca_certs": str(certificate)})
        with pytest.raises(StoreUnavailableError, match="certificate"):  # nobody told that it may be trusted
            RedisStore.create(RedisConfig(url), SPEC)
        with pytest.raises(StoreError):  # a client of the server that does not know it
            RedisStore.create(config, SPEC)
        trusting = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)} | config.tls
        with RedisStore.create(RedisConfig(url, tls=trusting), SPEC) as store:
            store.insert(ids(1), rows_of([1], [1]), ids(1))
            assert store.find(ids(1)).hits.all()
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "http://x"}, "url must start with redis://, rediss:// or unix://"),
        ({"prefix": "a{b}"}, "prefix must be 1 to 64 letters, digits or any of ._-, found 'a{b}'"),
        ({"prefix": ""}, "prefix must be"),
        ({"timeout": 0}, "timeout must be above 0, found 0"),
        ({"timeout": float("nan")}, "timeout must be above 0"),
        ({"retries": -1}, "retries must be an integer from 0"),
        ({"tls": {"ssl_ca_certs": "x"}}, "tls options need a url that starts with rediss://"),
        ({"url": "rediss://x", "tls": {"password": "x"}}, "that start with ssl_, found 'password'"),
    ],
)
def test_bad_configuration(arguments, message):
    with pytest.raises(ValueError) as info:
        RedisConfig(**arguments)
    assert message in str(info.value)


def test_one_master_lost_is_an_error_that_says_so(redis_cluster, put, tmp_path):
    """Without replicas a cluster stops as a whole; readers are told that the store is unavailable."""
    config = RedisConfig(redis_cluster.url, cluster=True, prefix="lost", timeout=1, retries=0)
    users = torch.arange(60)
    with RedisStore.create(config, SPEC) as store:
        store.insert(users, rows_of(users, users), users)
        assert len({store._client.keyslot(f"lost:{{{u}}}:3") // 5462 for u in users.tolist()}) == 3
        redis_cluster.nodes[1].process.send_signal(19)  # SIGSTOP
        try:
            begin = time.monotonic()
            with pytest.raises(StoreUnavailableError):
                store.find(users)
            assert time.monotonic() - begin < 10  # some timeouts, not one for each user
        finally:
            redis_cluster.nodes[1].process.send_signal(18)
        end = time.monotonic() + 30
        while True:  # until the cluster has found out that it is whole again
            try:
                assert store.find(users).hits.all()
                break
            except StoreUnavailableError:
                assert time.monotonic() < end
                time.sleep(0.1)


def test_redis_is_optional(redis_config, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "redis"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MissingExtraError, match=r"'redis.*' is needed here .*pip install '\.\[redis\]'"):
        RedisStore.create(redis_config, SPEC)


def test_a_snapshot_of_a_server_is_an_embedded_store(store, put, tmp_path, engine):
    users = torch.arange(700)
    store.insert(users, rows_of(users, users), users)
    store.save_snapshot(tmp_path / "snap")
    with LmdbStore.open(tmp_path / "snap") as snapshot:
        assert len(snapshot) == 700 and torch.equal(snapshot.find(users).rows, rows_of(users, users))
    store.erase(users[::2])
    assert store.load_snapshot(tmp_path / "snap") == 350 + 350  # equal times are written again
    assert store.find(users, ReadPolicy()).hits.all()
    shutil.rmtree(tmp_path / "snap")
