"""The commands as a user types them: those that are killed in processes of their own, the others here."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from python_tests.delivery.servers import nats_server
from python_tests.delivery.workers import SPEC, content, rows_of, summaries_of
from python_tests.test_cli import vista
from vista_ext.delivery.address import parse
from vista_ext.store import LmdbStore, StoreSpec

LAYOUT = ["--layout", "int8,4,128", "--model-version", "3"]


def fill(path, users, generation):
    with LmdbStore.open(path, readonly=False) if path.exists() else LmdbStore.create(path, SPEC) as store:
        store.add(summaries_of(users, generation))


def read(path):
    with LmdbStore.open(path) as store:
        return content(store)


@pytest.mark.slow
def test_publish_and_consume(tmp_path, nats, monkeypatch):
    pytest.importorskip("nats", reason="pip install '.[nats]'")
    address = f"nats://127.0.0.1:{nats.port}/commands"
    fill(tmp_path / "source", range(500), 1)
    options = tmp_path / "options.yaml"
    options.write_text("options: {name: '${oc.env:USER_OF_THE_QUEUE}'}\npatience: 5\n")
    monkeypatch.setenv("USER_OF_THE_QUEUE", "vista")
    told = vista("publish", tmp_path / "source", address, "--options", options).stdout
    assert told.startswith("500 messages: 500 written, 0 not newer, 0 erasures, 0 poison skipped; lag 0; ")
    fill(tmp_path / "source", range(490, 510), 2)
    assert vista("publish", tmp_path / "source", address).stdout.startswith("20 messages")  # what changed since
    told = vista("consume", address, tmp_path / "target", "--idle", "1", *LAYOUT).stdout
    # A user that was published twice may come in one batch.
    assert told.startswith("520 messages: 5") and "; lag 0; " in told
    assert read(tmp_path / "target") == read(tmp_path / "source")
    assert vista("consume", address, tmp_path / "target", "--idle", "0.5").stdout.startswith("0 messages")
    fed = vista("consume", f"feed:{tmp_path}/source", tmp_path / "fed", "--idle", "0", *LAYOUT).stdout
    assert fed.startswith("510 messages: 510 written") and read(tmp_path / "fed") == read(tmp_path / "source")


@pytest.mark.slow
def test_commands_are_killed_and_stopped(tmp_path):
    """kill -9 in the middle, then SIGTERM: it finishes its batch, says what it did, and ends with status 0."""
    pytest.importorskip("nats", reason="pip install '.[nats]'")
    server = nats_server(tmp_path / "nats").start()
    address = f"nats://127.0.0.1:{server.port}/killed"
    fill(tmp_path / "source", range(3000), 1)
    commands = {
        "publish": ["publish", tmp_path / "source", address, "--follow"],
        "consume": ["consume", address, tmp_path / "target", *LAYOUT],
    }

    def start(name, log):
        command = [sys.executable, "-m", "vista_ext.cli", *map(str, commands[name])]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

    try:
        with open(tmp_path / "log", "w") as log:
            running = {name: start(name, log) for name in commands}
            for name in ("publish", "consume", "publish", "consume"):
                time.sleep(4)
                assert running[name].poll() is None, (tmp_path / "log").read_text()
                running[name].kill()
                running[name].wait()
                running[name] = start(name, log)
            fill(tmp_path / "source", range(3000, 3100), 1)  # once these arrive, the last two are up
            expected = read(tmp_path / "source")
            end = time.monotonic() + 90
            while time.monotonic() < end and (
                not (tmp_path / "target").exists() or read(tmp_path / "target") != expected
            ):
                time.sleep(0.5)
            for process in running.values():
                process.send_signal(signal.SIGTERM)
            told = {name: process.communicate(timeout=30)[0] for name, process in running.items()}
        assert read(tmp_path / "target") == expected
        assert all(process.returncode == 0 for process in running.values())
        assert all(" messages: " in text and "poison skipped; lag 0" in text for text in told.values()), told
    finally:
        for process in running.values():
            process.kill()
        server.stop()


def test_snapshots(tmp_path, here):
    fill(tmp_path / "store", range(100), 1)
    told = here("snapshot", "export", tmp_path / "store", tmp_path / "one", "--buckets", "2")
    assert told.startswith("100 summaries written in ") and "MB/s" in told
    fill(tmp_path / "store", range(95, 105), 2)
    here("snapshot", "export", tmp_path / "store", tmp_path / "two", "--buckets", "2")
    here("snapshot", "import", tmp_path / "two", tmp_path / "back")
    assert read(tmp_path / "back") == read(tmp_path / "store")
    told = here("snapshot", "import", tmp_path / "two", tmp_path / "some", "--first", "10", "--last", "19")
    assert told.startswith("10 summaries") and set(read(tmp_path / "some")) == {(u, 3) for u in range(10, 20)}
    told = here("snapshot", "diff", tmp_path / "one", tmp_path / "two")
    assert told == "95 same, 5 added, 0 removed, 5 newer, 0 older, 0 rewritten, 0 erased\n"
    listed = here("snapshot", "diff", tmp_path / "one", tmp_path / "two", "--users").splitlines()
    assert listed[0] == "user_id,model_version,change,event_time_before,event_time_after"
    assert sorted(listed[1:]) == sorted(
        [*(f"{u},3,newer,1,2" for u in range(95, 100)), *(f"{u},3,added,,2" for u in range(100, 105))]
    )


def test_erase(tmp_path, here):
    fill(tmp_path / "store", range(5), 1)
    here("snapshot", "export", tmp_path / "store", tmp_path / "one", "--buckets", "2")
    consume = ["consume", f"feed:{tmp_path}/store", tmp_path / "target", "--idle", "0", *LAYOUT]
    assert here(*consume).startswith("5 messages: 5 written")
    (tmp_path / "users").write_text("3\n\n 77 \n")
    told = here("erase", tmp_path / "store", "2", "3", "--file", tmp_path / "users", "--until", "1")
    assert told == "3 users erased until 1, 2 summaries removed\n"
    assert here(*consume).startswith("3 messages: 0 written, 0 not newer, 3 erasures, ")
    assert set(read(tmp_path / "target")) == {(0, 3), (1, 3), (4, 3)} == set(read(tmp_path / "store"))
    here("snapshot", "export", tmp_path / "store", tmp_path / "two", "--buckets", "2")
    told = here("snapshot", "diff", tmp_path / "one", tmp_path / "two")
    assert told == "3 same, 0 added, 2 removed, 0 newer, 0 older, 0 rewritten, 3 erased\n"
    assert "77,,erased,,1" in here("snapshot", "diff", tmp_path / "one", tmp_path / "two", "--users")
    assert here("snapshot", "import", tmp_path / "one", tmp_path / "target").startswith("3 summaries written")
    now = int(time.time())
    until = int(here("erase", tmp_path / "store", "0").split()[4].rstrip(","))
    assert now <= until <= now + 60


def test_a_poison_record_is_reported(tmp_path, here, caplog):
    lmdb = pytest.importorskip("lmdb")
    fill(tmp_path / "source", range(3), 1)
    env = lmdb.open(str(tmp_path / "source"), max_dbs=4)
    with env.begin(write=True, db=env.open_db(b"records")) as txn:
        key, value = next(iter(txn.cursor()))
        txn.put(key, value[:-1] + b"?")
    env.close()
    arguments = ["consume", f"feed:{tmp_path}/source", tmp_path / "target", "--idle", "0", *LAYOUT]
    assert here(*arguments).startswith("vista: 1 of 3 messages cannot be used, such as change 1: key b'0': ")
    told = here(*arguments, "--on-poison", "skip")
    assert told.startswith("2 messages: 2 written, 0 not newer, 0 erasures, 1 poison skipped; lag 0; ")
    assert "skipped a message that cannot be used: change 1" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publish", "nowhere", "nats://127.0.0.1:1/s"], "no data.mdb can be read there"),
        (
            ["publish", "store", "redis://h/s"],
            "address must begin with nats://, kafka:// or feed:, found 'redis://h/s'",
        ),
        (
            ["publish", "store", "nats://u:secret@h:1/s"],
            "credentials belong into the options, found some in the address",
        ),
        (["publish", "store", "nats://h:1/s", "--name", "a b"], "--name must be 1 to 200 letters, digits, _ and -"),
        (["consume", "nats://h:1/a/b", "store"], "address must look like nats://host:port,host:port/name"),
        (["consume", "feed:source", "store", "--group", "x.y"], "group must be 1 to 200 letters"),
        (["consume", "feed:source", "new"], "store new is not there; --layout, such as int8,128,256, makes it"),
        (["consume", "feed:source", "new", "--layout", "int8"], "--layout must look like int8,128,256"),
        (["consume", "feed:source", "new", "--layout", "int9,1,128"], "scheme must be"),
        (["consume", "feed:source", "store", "--on-poison", "eat"], "on_poison must be one of 'raise', 'skip'"),
        (["consume", "feed:source", "store", "--options", "no.yaml"], "--options: no.yaml: "),
        (["consume", "feed:other", "store"], "tokens: expected 4, found 2"),
        (["consume", "feed:store", "store"], "already open in this process"),
        (["erase", "store"], "expected user ids or --file, found neither"),
        (["erase", "store", str(2**63)], "users must be an integer from -9223372036854775808"),
        (["erase", "store", "--file", "store/data.mdb"], "--file: store/data.mdb: "),
        (["erase", "store", "u7"], "users must be a user id, found 'u7' (--run takes ids of the source)"),
        (["snapshot", "export", "store", "store"], "expected a path where nothing is"),
        (["snapshot", "export", "store", "new", "--buckets", "3"], "buckets must be a power of two, found 3"),
        (["snapshot", "import", "store", "new"], "no _SUCCESS, so it is not a snapshot"),
        (["snapshot", "diff", "store", "store"], "no _SUCCESS"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(tmp_path, here, arguments, message):
    for name, spec in (("store", SPEC), ("source", SPEC), ("other", StoreSpec("int8", 2, 128))):
        LmdbStore.create(tmp_path / name, spec).close()
    told = here(*arguments)
    assert told.startswith("vista: ") and message in told and "\n" not in told
    assert not (tmp_path / "new").exists()


def test_a_missing_client_is_named(tmp_path):
    fill(tmp_path / "store", [1], 1)
    program = "import sys; sys.modules['nats'] = None; from vista_ext.cli import main; main()"
    command = [sys.executable, "-c", program, "publish", str(tmp_path / "store"), "nats://127.0.0.1:1/s"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install '.[nats]'" in done.stderr


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("nats://h:4222/s", ("nats", "h:4222", "s")),
        ("kafka://a:1,b:2/topic_1", ("kafka", "a:1,b:2", "topic_1")),
        ("nats://[::1]:4222/s", ("nats", "[::1]:4222", "s")),
        ("feed:/some/where", ("feed", "", "/some/where")),
    ],
)
def test_addresses(address, parsed):
    assert parse(address) == parsed


def test_rows_are_distinct():
    assert not torch.equal(rows_of([1], [2]), rows_of([2], [1]))
