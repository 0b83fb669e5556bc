"""MovieLens in its spellings, and the public small set when it is there."""

import gzip

import pytest
import torch

from vista_ext.data.dataset import EventDataset
from vista_ext.data.floors import floors
from vista_ext.data.importers import import_movielens
from vista_ext.data.metrics import auc, normalized_entropy
from vista_ext.data.tables import DataError

# user, movie, rating, timestamp
RATINGS = [(9, 30, 4.0, 50 + i) for i in range(7)] + [(9, 10, 3.5, 40), (9, 20, 5.0, 40), (9, 30, 0.5, 90)]
RATINGS += [(4, 20, 4.5, 7)]
MOVIES = [
    (10, "Seven (a.k.a. Se7en) (1995)", "Thriller|Drama"),
    (20, "Bébé, Une vie: II (1999)", "Drama"),
    (30, "No year", "(no genres listed)"),
]


def write_csv(folder, header="userId,movieId,rating,timestamp", compress=False):
    movies = "".join(f'{movie},"{title}",{genres}\n' for movie, title, genres in MOVIES)
    texts = {
        "ratings.csv": header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in RATINGS),
        "movies.csv": "movieId,title,genres\n" + movies,
    }
    for name, text in texts.items():
        data = text.encode()
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(data) if compress else data)


def write_dat(folder):
    for name, rows in (("ratings", RATINGS), ("movies", MOVIES)):
        text = "".join("::".join(map(str, row)) + "\n" for row in rows)
        (folder / f"{name}.dat").write_bytes(text.encode("latin-1"))


@pytest.mark.parametrize(
    "write",
    [
        write_csv,
        lambda folder: write_csv(folder, header="userid,movieid,rating,timestamp", compress=True),
        write_dat,
    ],
    ids=["csv", "gzip, lower case", "dat"],
)
def test_all_spellings_read_the_same(tmp_path, write):
    write(tmp_path)
    import_movielens(tmp_path, tmp_path / "set", valid_fraction=0.25)
    dataset = EventDataset(tmp_path / "set")
    assert dataset.user_sources == ["4", "9"]
    assert dataset.item_sources == ["10", "20", "30"]
    assert dataset.schema.item_features == {"genre": 3, "year": 2}
    assert dataset.item_features.tolist() == [[0, 0], [2, 1], [1, 1], [0, 0]]

    test, valid, train = (dataset.samples(split) for split in ("test", "valid", "train"))
    assert test.timestamps.tolist() == [56, 90]
    assert test.labels.tolist() == [[1], [0]]
    assert valid.timestamps.tolist() == [54, 55]
    assert train.timestamps.tolist() == [7, 40, 40, 50, 51, 52, 53]
    assert train.labels.tolist() == [[1], [0], [1], [1], [1], [1], [1]]

    history = dataset.histories(torch.tensor([1, 1]), torch.tensor([40, 51]), 10)
    assert history.seq_offsets.tolist() == [0, 0, 3]
    assert history.actions.tolist() == [7, 10, 8]


def test_options(tmp_path):
    write_csv(tmp_path)
    import_movielens(tmp_path, tmp_path / "set", positive_rating=5, test_fraction=0.5, valid_fraction=0)
    dataset = EventDataset(tmp_path / "set")
    assert [dataset.split_size(split) for split in ("train", "valid", "test")] == [6, 0, 5]
    assert dataset.samples("train").labels.sum() == 1
    with pytest.raises(ValueError, match=r"test_fraction .* found 1\.5"):
        import_movielens(tmp_path, tmp_path / "other", test_fraction=1.5)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"expected a file ratings\.csv or ratings\.csv\.gz or ratings\.dat"):
        import_movielens(tmp_path, tmp_path / "set")
    write_csv(tmp_path)
    (tmp_path / "movies.csv").unlink()
    with pytest.raises(DataError, match=r"expected a file movies\.csv .*found \['ratings\.csv'\]"):
        import_movielens(tmp_path, tmp_path / "set")


@pytest.fixture(scope="module")
def public(public_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("movielens") / "set"
    import_movielens(public_data("ml_latest_small"), path)
    return EventDataset(path)


def test_public_counts(public):
    assert (public.num_users, public.schema.num_items, public.num_events) == (610, 9_724, 100_836)
    labels = torch.cat([public.samples(split).labels for split in ("train", "valid", "test")])
    assert len(labels) == 100_836
    assert labels.mean().item() == pytest.approx(0.4818, abs=5e-5)
    assert public.samples("test").users.unique().numel() == 610


def test_public_floors(public):
    labels = public.samples("test").labels[:, 0]
    logits = floors(public, "liked", item_prior=5)
    expected = {"item mean": 0.6708, "user mean": 0.7133, "item + user": 0.7632}
    assert {name: auc(score, labels) for name, score in logits.items()} == pytest.approx(expected, abs=6e-4)
    assert all(normalized_entropy(score, labels) < 1 for score in logits.values())
