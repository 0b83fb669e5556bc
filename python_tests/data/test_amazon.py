"""Amazon reviews in DIN's form, from made-up files of both spellings."""

import gzip
import json

import numpy as np
import pytest
import torch

from vista_ext.data.dataset import EventDataset
from vista_ext.data.importers import import_amazon
from vista_ext.data.importers._common import strictly_increasing
from vista_ext.data.tables import DataError

DAY = 86_400
META = [
    {"asin": "B0", "title": "it's", "categories": [["Electronics", "Cables"], ["Electronics", "Audio", "Headphones"]]},
    {"asin": "B1", "categories": [["Electronics", "Cables"]]},
    {"asin": "B2", "categories": [[]]},
    {"asin": "other", "categories": [["Books"]]},
]


def review(user, asin, day):
    return {"reviewerID": user, "asin": asin, "overall": 5.0, "helpful": [0, 1], "unixReviewTime": day * DAY}


# u1 has two reviews on day 3, u2 one review only.
REVIEWS = [review("u1", "B1", 3), review("u1", "B2", 3), review("u1", "B0", 2), review("u2", "B3", 1)]
REVIEWS += [review("u1", "B1", 4), review("u3", "B0", 8), review("u3", "B3", 5)]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "amazon"
    path.mkdir()
    with gzip.open(path / "reviews_Toys_5.json.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in REVIEWS)
    (path / "meta_Toys.json").write_text("".join(repr(line) + "\n" for line in META))
    return path


def test_prefixes_and_negatives(folder, tmp_path):
    import_amazon(folder, tmp_path / "set")
    dataset = EventDataset(tmp_path / "set")
    assert dataset.item_sources == ["B0", "B1", "B2", "B3"]
    assert dataset.user_sources == ["u1", "u2", "u3"]
    assert dataset.schema.item_features == {"category": 3}
    assert dataset.item_features[:, 0].tolist() == [0, 2, 1, 0, 0]  # "Cables" < "Headphones"
    assert dataset.num_events == len(REVIEWS)

    first_day_three = 3 * DAY
    everything = dataset.histories(torch.tensor([0]), None, 10)
    assert everything.items.tolist() == [1, 2, 3, 2]
    assert everything.timestamps.tolist() == [2 * DAY, first_day_three, first_day_three + 1, 4 * DAY]

    splits = {split: dataset.samples(split) for split in ("train", "valid", "test")}
    positives = {split: s.items[s.labels[:, 0] == 1].tolist() for split, s in splits.items()}
    assert positives == {"train": [2], "valid": [3], "test": [2, 1]}
    for samples in splits.values():
        assert samples.labels.sum() * 2 == len(samples)
        negative = samples.labels[:, 0] == 0
        for user, item in zip(samples.users[negative].tolist(), samples.items[negative].tolist(), strict=True):
            assert item not in dataset.histories(torch.tensor([user]), None, 10).items


def test_valid_can_be_train_and_the_seed_decides(folder, tmp_path):
    def negatives(name, **options):
        import_amazon(folder, tmp_path / name, valid=False, **options)
        dataset = EventDataset(tmp_path / name)
        assert dataset.split_size("valid") == 0
        samples = dataset.samples("test")
        return samples.items[samples.labels[:, 0] == 0].tolist()

    assert negatives("a") == negatives("b")
    assert len({tuple(negatives(f"seed {seed}", seed=seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'asin': 'B0', 'categories': 'Toys'}", r"line 5: categories: expected a list of lists of texts, found Toys"),
        ("{'asin': 'B0', 'categories': [[3]]}", r"line 5: categories"),
        ("{'asin': 7}", r"line 5: expected an object with the text asin"),
        ("{'asin': ", r"line 5: expected a JSON object or a Python literal"),
        ("[1]", r"line 5: expected an object"),
    ],
)
def test_a_bad_line_of_the_meta_file_is_named(folder, tmp_path, line, message):
    with (folder / "meta_Toys.json").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"meta_Toys\.json: " + message):
        import_amazon(folder, tmp_path / "set")


def test_which_of_several_files_must_be_said(folder, tmp_path):
    (folder / "meta_Books.json").write_text("")
    with pytest.raises(DataError, match=r"expected one such file, .* found \['meta_Books.json', 'meta_Toys.json'\]"):
        import_amazon(folder, tmp_path / "set")
    import_amazon(folder, tmp_path / "set", name="Toys*")


def test_no_item_left_for_a_negative(folder, tmp_path):
    with gzip.open(folder / "reviews_Toys_5.json.gz", "at") as file:
        file.write(json.dumps(review("u1", "B3", 9)) + "\n")
    with pytest.raises(DataError, match="asin: expected items that a user did not review, found a user with all 4"):
        import_amazon(folder, tmp_path / "set")


def test_times_move_as_little_as_needed():
    users = np.array([1, 0, 1, 1, 1, 1, 0])
    times = np.array([5, 9, 5, 6, 5, 90, 3])
    assert strictly_increasing(users, times).tolist() == [5, 9, 6, 8, 7, 90, 3]
