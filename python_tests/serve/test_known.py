"""A log that grows is imported again: rows keep their users, or the run refuses the data set."""

import csv
import shutil

import pytest
import torch

from vista_ext.data.tables import DataError
from vista_ext.runs import Run
from vista_ext.serve.summarize import summarize_users
from vista_ext.serve.worker import open_stage2
from vista_ext.store import LmdbStore

COLUMNS = ["--user", "who", "--item", "what", "--timestamp", "when", "--label", "like=liked"]
COLUMNS += ["--item-feature", "b=brand", "--action", "how"]
USERS = [str(user) for user in range(10, 70)]
LOG = [
    (user, str(200 + (7 * int(user) + t * t) % 23), 1000 + 10 * t, (int(user) + t) % 2, f"b{t * t % 5}", "view")
    for user in USERS
    for t in range(20)
]
# One user, one item and one brand more, all of which sort first.
NEW = [("1", "100", 1500, 1, "a", "view"), ("1", "205", 1510, 0, "", "view")]
ERASED = ["12", "40"]


def write_log(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("who", "what", "when", "liked", "brand", "how"), *rows])


def rows_of(folder):
    """Stored rows by the users' ids of the source."""
    run = Run.open(folder)
    users = run.dataset.user_sources
    with LmdbStore.open(run.store_path, spec=run.store_spec()) as store:
        return {
            users[user]: row.numpy().tobytes()
            for batch in store
            for user, row in zip(batch.user_ids.tolist(), batch.rows, strict=True)
        }


def summaries_of(folder):
    run = Run.open(folder)
    everybody = torch.arange(run.dataset.num_users)
    summaries = torch.cat([some for _, some, _ in summarize_users(run.vista, run.dataset, everybody)])
    return dict(zip(run.dataset.user_sources, summaries, strict=True))


@pytest.fixture
def summarized(tmp_path, here):
    """A run whose users are summarized, two of them erased since by their ids of the source."""
    write_log(tmp_path / "log.csv", LOG)
    here("import", "generic", "log.csv", "data", *COLUMNS)
    (tmp_path / "run.yaml").write_text("folder: run\ndata: {path: data}\ntrain: {epochs: 1}\nthreads: 1\n")
    here("train", "run.yaml", "model.options.num_seeds=4")
    assert "60 summaries written" in here("summarize", "run")
    told = here("erase", "run/store", "nobody", "--run", "run")
    assert told == "vista: --run run: expected ids of its data set, found others: users 'nobody'"
    (tmp_path / "gone").write_text(f"{ERASED[1]}\n")
    assert "2 users erased" in here("erase", "run/store", ERASED[0], "--file", "gone", "--run", "run")
    return tmp_path / "run"


def test_everybody_keeps_his_summary(summarized, here, tmp_path):
    before, summaries = rows_of(summarized), summaries_of(summarized)
    assert before.keys() == set(USERS) - set(ERASED)
    write_log(tmp_path / "log.csv", LOG + NEW)
    here("import", "generic", "log.csv", "data", *COLUMNS, "--update")
    assert here("refresh", "run") == "61 users, 2 erased, 1 due, 1 summaries written\n"
    after = rows_of(summarized)
    assert after.keys() == before.keys() | {"1"} and {user: after[user] for user in before} == before
    # What is summarized from now on is the same user too, by the same items.
    grown = summaries_of(summarized)
    assert all(torch.allclose(grown[user], summaries[user], atol=1e-5) for user in USERS)
    assert here("score", "run", "--user", "1", "--items", "100,205").splitlines()[2].startswith("1,205,0.")
    # No action stands in for one that the model does not know.
    write_log(tmp_path / "log.csv", [*LOG, (*NEW[0][:-1], "add")])
    here("import", "generic", "log.csv", "data", *COLUMNS, "--update")
    expected = "meta.json: schema: num_actions: expected at most the 1 actions of the training, found 2"
    assert expected in here("refresh", "run")
    # The next one has to agree with this one.
    write_log(tmp_path / "log.csv", [*LOG, ("0", *NEW[0][1:])])
    shutil.rmtree(tmp_path / "data")
    here("import", "generic", "log.csv", "data", *COLUMNS)
    assert "users.parquet: source_id: expected the 61 users of run/ids.json" in here("refresh", "run")


def test_rows_that_moved_are_refused(summarized, here, tmp_path):
    shutil.rmtree(tmp_path / "data")
    write_log(tmp_path / "log.csv", LOG + NEW)
    here("import", "generic", "log.csv", "data", *COLUMNS)
    with LmdbStore.open(summarized / "store") as store:
        size = len(store)
    expected = "users.parquet: source_id: expected the 60 users of run/ids.json in their rows (CRC-32 "
    for command in (
        ["summarize", "run"],
        ["refresh", "run"],
        ["score", "run", "--user", "42", "--items", "205"],
        ["evaluate", "run"],
        ["erase", "run/store", "42", "--run", "run"],
        ["train", "run.yaml", "model.options.num_seeds=4"],
    ):
        told = here(*command)
        assert expected in told and "found other ids there (CRC-32 " in told and "--update" in told
    with pytest.raises(DataError, match="expected the 60 users"):
        open_stage2("run")
    with LmdbStore.open(summarized / "store") as store:
        assert len(store) == size
    # Users in their rows, items not; and fewer users.
    for rows, message in (([*LOG, (USERS[-1], *NEW[0][1:])], "the 23 items"), (LOG[:-20], "found 59 users")):
        shutil.rmtree(tmp_path / "data")
        write_log(tmp_path / "log.csv", rows)
        here("import", "generic", "log.csv", "data", *COLUMNS)
        assert message in here("refresh", "run")


def test_a_run_without_a_note(summarized, here, tmp_path):
    """As earlier versions left it: any data set is taken, and noted by what writes summaries."""
    note = summarized / "ids.json"
    noted = note.read_text()
    note.unlink()
    assert here("score", "run", "--user", "42", "--items", "205").startswith("user,item,like") and not note.exists()
    assert here("refresh", "run").startswith("60 users, 2 erased, 0 due")
    assert note.read_text() == noted
    open_stage2("run")
    note.write_text("[]")
    with pytest.raises(DataError, match=r"ids\.json: expected numbers and checksums of users and items"):
        open_stage2("run")
    shutil.rmtree(tmp_path / "data")  # a machine that serves and has no data
    open_stage2("run")
